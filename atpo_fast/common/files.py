"""Files and folders that are whole or absent, whenever the writer is killed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a path to write to in place of `path`; when the block succeeds, it is renamed over `path`.

    What is written may be a file or a folder. The path yielded is in the same folder, which is created if it does not
    exist, and its name begins with a dot. Remains of a killed writer are removed first. When the block raises, what it
    wrote is removed and `path` is unchanged; an OSError names it.
    """
    path = Path(path)
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():  # a folder can be renamed over an empty one only
            _remove(path)
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # of a full disk the system says only that it is full
            error.filename = str(path)
        raise
    finally:
        _remove(partial)


def free_name(path: Path, suffix: str = "") -> Path:
    """Return a path beside `path` that is not taken: its name with the first free number, before its `suffix`."""
    number, name = 1, path.name.removesuffix(suffix)
    while (aside := path.with_name(f"{name}.{number}{suffix}")).exists():
        number += 1
    return aside


def partial_path(path: Path) -> Path:
    """Return where `replacing` lets `path` be written, for the processes that only help to write it."""
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
