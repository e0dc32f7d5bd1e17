"""Configuration files: YAML and `key=value` overrides in, a checked `Config` out; every error says where and what."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from atpo_fast.config.schema import Config, as_dict


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line per fault."""


@dataclass(frozen=True)
class _Setting:
    """One value of a leaf key and where it was given."""

    value: Any
    origin: str


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (none: the defaults) with `a.b=value` overrides, later ones winning.

    Values of overrides are YAML: `null`, `1e-6`, `[a.json, b.json]`. Raises ConfigError for a file that is missing,
    empty or malformed (file and line), for unknown keys (with the nearest legal one), and for values of the wrong type
    or out of range (key, value, file).
    """
    settings = {} if path is None else _read_settings(Path(path))
    for override in overrides:
        settings.update(_read_override(override))
    unknown = [f"{s.origin}: {_unknown_key(name)}" for name, s in settings.items() if name not in _LEAVES]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return TypeAdapter(Config).validate_python(_nested(settings))
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, settings, path))) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole configuration as YAML that `load_config` reads back equal; a killed write leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML text."""
    text: str = yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def read_deepspeed(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that `config.deepspeed` names; raises ConfigError when it is missing or no JSON object."""
    path = Path(config.deepspeed)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"deepspeed={config.deepspeed}: {error.strerror}; the path is relative to {Path.cwd()}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"deepspeed={config.deepspeed}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed={config.deepspeed}: must hold a JSON object, not {type(content).__name__}")
    return content


# --- reading -----------------------------------------------------------------------------------------------------


def _read_settings(path: Path) -> dict[str, _Setting]:
    """Leaf settings of a YAML file by dotted name."""
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


def _read_override(override: str) -> dict[str, _Setting]:
    """Leaf settings of one `a.b=value`."""
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: must look like key=value, for example train.steps=10")
    origin = f"override {override}"
    prefix = name.strip()
    return _parse(value, origin, prefix=prefix) or {prefix: _Setting(None, origin)}


def _parse(text: str, origin: str, prefix: str = "", lines: bool = False) -> dict[str, _Setting] | None:
    """Leaf settings of a YAML text whose top level is the section or key `prefix`; None for an empty text."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else dict(_leaves(loader, node, prefix, origin, lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}" if lines and mark else origin
        raise ConfigError(f"{where}: malformed YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: malformed YAML: {error}") from None


def _leaves(loader: _Loader, node: yaml.Node, name: str, origin: str, lines: bool) -> Iterator[tuple[str, _Setting]]:
    """(dotted name, setting) of every leaf under a YAML node; sections are walked, anything else is a leaf."""
    where = f"{origin}:{node.start_mark.line + 1}" if lines else origin
    if name and name not in _SECTIONS:
        yield name, _Setting(loader.construct_object(node, deep=True), where)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in seen:
                line = f" (line {key_node.start_mark.line + 1})" if lines else ""
                raise ConfigError(f"{origin}: key {_join(name, key)} is given twice{line}")
            seen.add(key)
            yield from _leaves(loader, value_node, _join(name, key), origin, lines)
    elif loader.construct_object(node, deep=True) is not None:  # an empty section keeps its defaults
        what = f"{name} is a section: give" if name else "the configuration must be a mapping of"
        raise ConfigError(f"{where}: {what} {_join(name, 'key')}: value, not {node.value!r}")


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _nested(settings: dict[str, _Setting]) -> dict[str, Any]:
    """Dotted names as nested dictionaries."""
    nested: dict[str, Any] = {}
    for name, setting in settings.items():
        *sections, key = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = setting.value
    return nested


# --- faults ------------------------------------------------------------------------------------------------------


def _unknown_key(name: str) -> str:
    """What to say about a key that does not exist."""
    section, _, key = name.rpartition(".")
    while section and section not in _SECTIONS:
        if section in _LEAVES:
            return f"unknown key {name}: {section} is a value, not a section"
        section = section.rpartition(".")[0]
    same_key = [leaf for leaf in _LEAVES if leaf.rpartition(".")[2] == key]
    inside = [leaf for leaf in _LEAVES if leaf.rpartition(".")[0] == section]
    legal = [*_LEAVES, *_SECTIONS]
    near = (
        difflib.get_close_matches(name, legal, n=1, cutoff=0.85)
        or difflib.get_close_matches(name, inside, n=1)
        or same_key
        or difflib.get_close_matches(name, legal, n=1, cutoff=0.0)
    )
    return f"unknown key {name}: did you mean {' or '.join(near)}?"


def _faults(error: ValidationError, settings: dict[str, _Setting], path: str | Path | None) -> Iterator[str]:
    """One line per fault that pydantic found."""
    for fault in error.errors(include_url=False):
        parts = [str(part) for part in fault["loc"]]
        name = next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in settings), "")
        message = fault["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:] if message.startswith("Input") else message
        if not name:  # a legality check of a whole section, which names its keys itself
            yield f"{path or 'overrides'}: {message}"
            continue
        setting = settings[name]
        hint = "; write null for none" if setting.value in ("none", "None") else ""
        yield f"{setting.origin}: {name}={setting.value!r}: {message}{hint}"


# --- the schema as dotted names ----------------------------------------------------------------------------------


def _dotted(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(dotted name, is it a section) of every field of a configuration class."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        name = _join(prefix, field.name)
        inner = hints[field.name]
        yield name, is_dataclass(inner)
        if is_dataclass(inner):
            yield from _dotted(cast(type, inner), name)


_LEAVES = [name for name, section in _dotted(Config) if not section]
_SECTIONS = [name for name, section in _dotted(Config) if section]


# --- YAML 1.2 scalars: `1e-6` is a number, `off` and `no` are words ------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would not read back as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quoted with escapes where PyYAML would otherwise write a character that it reads back as a line break."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)

_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
