"""Load what a configuration names of the user's own code: `package.module:name`, or `path/to/file.py:name`.

Modules are found from the working directory, and those beside a file from its folder, in the launched processes of a
run too, whose working directory is that of the command.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from atpo_fast.common.errors import ConfigError

_OTHERS_CODE = (str(Path(__file__).parents[1]), *sysconfig.get_paths().values())


def load_own(reference: str, key: str, default: str | None = None) -> Any:
    """Load the object that a reference names.

    Args:
        reference: a module, or a file that ends in .py, then a colon and the object's name in it.
        key: key of the configuration, for error messages.
        default: name of the object where the reference has no colon; none: it needs one.

    Raises:
        ConfigError: there is no such file, module or object, or its code fails; the message says where.
    """
    where = f"{key}={reference}"
    place, colon, name = reference.rpartition(":")
    if not colon:
        place, name = reference, default or ""
    if not (place and name):
        raise ConfigError(f"{where}: must look like package.module:name or path/to/file.py:name")
    found: Any = _load_file(Path(place), where) if place.endswith(".py") else _load_module(place, where)
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            raise ConfigError(f"{where}: {place} has no {name!r}{_others(found)}")
        found = getattr(found, attribute)
    return found


def place_of(error: BaseException) -> str:
    """Say where the user's own code raised an error, or the code that it has called; in brackets, with a space before."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if not frame.filename.startswith(_OTHERS_CODE)]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in (own or frames)[-1:])


def _load_module(name: str, where: str) -> ModuleType:
    _find_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module's own code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        if missing:
            raise ConfigError(
                f"{where}: there is no module {error.name!r} in the working directory {Path.cwd()}, on PYTHONPATH, or "
                "among the installed packages"
            ) from error
        raise _cannot(where, error) from error


def _load_file(path: Path, where: str) -> ModuleType:
    """Load a file as a module, once: a second reference to it gets the same."""
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path}; the path is relative to {Path.cwd()}")
    path = path.resolve()
    name = f"{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    _find_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for a name in .py there always is one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _cannot(where, error) from error
    return module


def _find_in(folder: Path) -> None:
    """Let modules in a folder be found, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _cannot(where: str, error: Exception) -> ConfigError:
    return ConfigError(f"{where}: cannot be imported: {type(error).__name__}: {error}{place_of(error)}")


def _others(found: Any) -> str:
    """List the public names of a module's own."""
    if not isinstance(found, ModuleType):
        return ""
    names = [name for name, value in vars(found).items() if name[0] != "_" and not isinstance(value, ModuleType)]
    return f"; it has {', '.join(names[:10])}" if names else ""
