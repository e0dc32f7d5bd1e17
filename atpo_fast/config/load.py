"""Configuration files: YAML and `key=value` overrides in, a checked `Config` out; every error says where and what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from atpo_fast.common.errors import ConfigError
from atpo_fast.common.files import replacing
from atpo_fast.common.secrets import redacted, shown
from atpo_fast.config.methods import METHODS, belongs_to_method
from atpo_fast.config.names import KEYS, KIND_KEY, KINDS, SECTIONS, join, unknown_key
from atpo_fast.config.renamed import OLD_SECTIONS, new_name, new_value
from atpo_fast.config.schema import Config
from atpo_fast.config.section import as_dict
from atpo_fast.config.yaml_text import Dumper, Loader


@dataclass(frozen=True)
class _Setting:
    """One value of a key and where it was given."""

    value: Any
    origin: str
    of_method: bool = False
    """Whether a method set it, and another method given later takes it back."""


_Settings = dict[str, _Setting]
_LONGEST_VALUE = 300  # characters of a value in an error
BASE = "base"
"""Key of a file, not of the configuration: another file that this one departs from."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file (none: the defaults) with `a.b=value` overrides, later ones winning.

    Values of overrides are YAML: `null`, `1e-6`, `[a.json, b.json]`. A file may depart from another, its `base` (a path
    relative to it). A `method` fills in its settings where it is given, under the other keys beside it, and takes the
    place of all that the base (or, given as an override, the file) said about objective, credit and the shape of the
    rollout. An engine takes the place of its section likewise.

    Raises:
        ConfigError: a file that is missing, empty or malformed (file and line), keys that are unknown (with the nearest
            legal one), renamed (with the new name) or of an engine that is not chosen, and values of the wrong type or
            out of range (key, value, file).
    """
    layers = [] if path is None else _read_layers(Path(path))
    given: _Settings = {}
    for override in overrides:
        given.update(_read_override(override))
    settings: _Settings = {}
    for layer in [*layers, given]:
        settings = _without_replaced_kinds(_with_method(settings, layer), layer) | layer
    faults = [*_misnamed(settings), *_misplaced(settings)]
    if faults:
        raise ConfigError("\n".join(faults))
    try:
        return TypeAdapter(Config).validate_python(_nested(settings))
    except ValidationError as error:
        raise ConfigError("\n".join(_illegal(error, settings, path))) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole configuration as YAML that `load_config` reads back equal; a killed write leaves the old file."""
    with replacing(path) as partial:
        partial.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML text; of the engines only the chosen one's options."""
    text: str = yaml.dump(as_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def read_deepspeed(config: Config) -> dict[str, Any]:
    """Read the DeepSpeed JSON that `config.deepspeed` names.

    Raises ConfigError when it is missing or no JSON object.
    """
    path = Path(config.deepspeed)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"deepspeed={config.deepspeed}: {error.strerror}; the path is relative to {Path.cwd()}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed={config.deepspeed}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed={config.deepspeed}: must hold a JSON object, not {type(content).__name__}")
    return content


# --- reading -----------------------------------------------------------------------------------------------------


def _read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[_Settings]:
    """Read a file and the files that it departs from, the last of them first."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: is its own base: {' -> '.join(str(file) for file in (*above, path.resolve()))}")
    settings = _read_settings(path)
    base = settings.pop(BASE, None)
    if base is None:
        return [settings]
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.origin}: {BASE}={base.value!r}: must be the path of a configuration")
    if not (path.parent / base.value).is_file():
        raise ConfigError(f"{base.origin}: {BASE}={base.value}: there is no such file in {path.parent.resolve()}")
    return [*_read_layers(path.parent / base.value, (*above, path.resolve())), settings]


def _with_method(settings: _Settings, layer: _Settings) -> _Settings:
    """Return the settings under those of the method that `layer` chooses, without what an earlier one is about."""
    chosen = layer.get("method")
    if chosen is None or not isinstance(chosen.value, str) or chosen.value not in METHODS:
        return settings
    kept = {name: setting for name, setting in settings.items() if not (setting.of_method or belongs_to_method(name))}
    origin = f"method {chosen.value}"
    filled = METHODS[chosen.value].settings.items()
    return kept | {name: _Setting(value, origin, of_method=True) for name, value in filled}


def _read_settings(path: Path) -> _Settings:
    """Read the settings of a YAML file by dotted name."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    settings = _parse(text, str(path), lines=True)
    if settings is None:
        raise ConfigError(f"{path}: the configuration is empty")
    return settings


def _read_override(override: str) -> _Settings:
    """Parse an override `a.b=value` into its settings."""
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {_brief(override)}: must look like key=value, for example train.steps=10")
    prefix = name.strip()
    # A mapping may hold headers with secrets, so it is not repeated in errors.
    origin = f"override {prefix}={{...}}" if "{" in value else f"override {_cut(redacted(override))}"
    return _parse(value, origin, prefix=prefix) or {prefix: _Setting(None, origin)}


def _parse(text: str, origin: str, prefix: str = "", lines: bool = False) -> _Settings | None:
    """Read the settings of a YAML text whose top level is the section or key `prefix`; None for an empty text."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return None if node is None else dict(_leaves(loader, node, prefix, origin, lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}" if lines and mark else origin
        raise ConfigError(f"{where}: malformed YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: malformed YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: malformed YAML: nested too deeply") from None


def _leaves(loader: Loader, node: yaml.Node, name: str, origin: str, lines: bool) -> Iterator[tuple[str, _Setting]]:
    """Yield (dotted name, setting) of every key under a YAML node; sections are walked, anything else is a value."""
    where = f"{origin}:{node.start_mark.line + 1}" if lines else origin
    old = name in OLD_SECTIONS and not (isinstance(node, yaml.MappingNode) and node.value)
    if old or (name and name not in SECTIONS and name not in OLD_SECTIONS):
        yield name, _Setting(_value(loader, node, where, name), where)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in seen:
                line = f" (line {key_node.start_mark.line + 1})" if lines else ""
                raise ConfigError(f"{origin}: key {join(name, key)} is given twice{line}")
            seen.add(key)
            yield from _leaves(loader, value_node, join(name, key), origin, lines)
    elif _value(loader, node, where, name) is not None:  # an empty section keeps its defaults
        what = f"{name} is a section: give" if name else "the configuration must be a mapping of"
        given = "a list" if isinstance(node.value, list) else repr(node.value)
        raise ConfigError(f"{where}: {what} {join(name, 'key')}: value, not {given}")


def _value(loader: Loader, node: yaml.Node, where: str, name: str) -> Any:
    """Return the value of a node. Raises ConfigError where its tag does not fit (`!!int abc`), or it is too large."""
    try:
        loader.check_size(node)
        return loader.construct_object(node, deep=True)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        text = " ".join(str(error).split())[:_LONGEST_VALUE]
        raise ConfigError(f"{where}: {name or 'the configuration'}: not a value of its YAML type: {text}") from None


def _nested(settings: _Settings) -> dict[str, Any]:
    """Turn dotted names into nested dictionaries, in which every section says of which kind it is."""
    nested: dict[str, Any] = {section: {KIND_KEY: kinds.default} for section, kinds in KINDS.items()}
    for name, setting in settings.items():
        *sections, key = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = setting.value
    return nested


# --- sections of several kinds -----------------------------------------------------------------------------------


def _without_replaced_kinds(settings: _Settings, given: _Settings) -> _Settings:
    """Leave out the file's sections of which the overrides in `given` choose another kind."""
    replaced: set[str] = set()
    for section in KINDS:
        kind = join(section, KIND_KEY)
        if kind in settings and kind in given and settings[kind].value != given[kind].value:
            replaced.add(section)
    return {name: setting for name, setting in settings.items() if name.rpartition(".")[0] not in replaced}


def _misplaced(settings: _Settings) -> Iterator[str]:
    """Yield a line per key that belongs to another kind of its section than the chosen one."""
    for section, kinds in KINDS.items():
        key = join(section, KIND_KEY)
        chosen = settings.get(key)
        kind = kinds.default if chosen is None else chosen.value
        if chosen is not None and (not isinstance(kind, str) or kind not in kinds.keys):
            other = new_value(key, kind)
            hint = f"; {kind} is now called {other}" if other else ""
            yield f"{chosen.origin}: {key}={kind!r}: must be one of {', '.join(kinds.keys)}{hint}"
            continue
        for name, setting in settings.items():
            owners = kinds.owners(name)
            if owners and kind not in owners:
                belongs = " or ".join(f"{key}={owner}" for owner in owners)
                yield f"{setting.origin}: {name} belongs to {belongs}, but {key} is {kind}"


# --- faults ------------------------------------------------------------------------------------------------------


def _misnamed(settings: _Settings) -> Iterator[str]:
    """Yield a line per key that does not exist, or not any more."""
    for name, setting in settings.items():
        if name not in KEYS:
            yield f"{setting.origin}: {new_name(name, setting.value) or unknown_key(name)}"


def _illegal(error: ValidationError, settings: _Settings, path: str | Path | None) -> Iterator[str]:
    """Yield a line per fault that pydantic found."""
    for fault in error.errors(include_url=False):
        parts = [str(part) for part in fault["loc"]]
        if parts[:1] and parts[0] in KINDS:  # pydantic puts the kind behind the section's name
            del parts[1:2]
        name = next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in settings), "")
        message = fault["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:] if message.startswith("Input") else message
        if not name:  # a legality check of a whole section, which names its keys itself
            yield f"{path or 'overrides'}: {message}"
            continue
        setting = settings[name]
        other = new_value(name, setting.value)
        hint = f"; {setting.value} is now {other}" if other else ""
        hint = "; write null for none" if setting.value in ("none", "None") else hint
        yield f"{setting.origin}: {name}={_brief(setting.value)}: {message}{hint}"


def _brief(value: Any) -> str:
    """Return a value as it is printed: on one line, cut, without secrets."""
    return _cut(repr(shown(value)))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
