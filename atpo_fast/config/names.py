"""The schema as dotted names: which keys and sections there are, and which keys only some kinds of a section have."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from atpo_fast.config.schema import Config

KIND_KEY = "name"
"""Field that says of which kind a section is, where there are several: `engine.name`."""


@dataclass(frozen=True)
class Kinds:
    """The kinds of a section of which there are several."""

    default: str
    """Kind of a configuration that does not say."""
    keys: dict[str, frozenset[str]]
    """Kind -> dotted names of its keys."""

    def owners(self, name: str) -> list[str]:
        """Return the kinds that have a key."""
        return [kind for kind, keys in self.keys.items() if name in keys]


def join(prefix: str, key: str) -> str:
    """Return the dotted name of a key in a section."""
    return f"{prefix}.{key}" if prefix else key


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, list[type]]]:
    """Yield (dotted name, classes that the section may be, none for a value) of every field of a section."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        name, classes = join(prefix, field.name), _section_classes(hints[field.name])
        yield name, classes
        for inner in classes:
            yield from _walk(inner, name)


def _section_classes(hint: Any) -> list[type]:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [choice for choice in choices if isinstance(choice, type) and is_dataclass(choice)]


def _kinds(name: str, classes: list[type]) -> Kinds:
    """Return the kinds of the section `name`, which may be of any of `classes`."""
    by_kind = {str(_field(cls, KIND_KEY).default): cls for cls in classes}
    keys = {kind: frozenset(inner for inner, _ in _walk(cls, name)) for kind, cls in by_kind.items()}
    return Kinds(default=getattr(getattr(Config(), name), KIND_KEY), keys=keys)


def _field(cls: type, name: str) -> Field[Any]:
    return next(field for field in fields(cls) if field.name == name)


_NAMES = list(_walk(Config))
KEYS = list(dict.fromkeys(name for name, classes in _NAMES if not classes))
"""Dotted names of all values, those of every kind of a section among them."""
SECTIONS = [name for name, classes in _NAMES if classes]
"""Dotted names of all sections."""
KINDS = {name: _kinds(name, classes) for name, classes in _NAMES if len(classes) > 1}
"""Sections that are of one of several kinds."""


def unknown_key(name: str) -> str:
    """Say about a key that does not exist which one may be meant."""
    section, _, key = name.rpartition(".")
    while section and section not in SECTIONS:
        if section in KEYS:
            return f"unknown key {name}: {section} is a value, not a section"
        section = section.rpartition(".")[0]
    same_key = [other for other in KEYS if other.rpartition(".")[2] == key]
    inside = [other for other in KEYS if other.rpartition(".")[0] == section]
    legal = [*KEYS, *SECTIONS]
    near = (
        difflib.get_close_matches(name, legal, n=1, cutoff=0.85)
        or difflib.get_close_matches(name, inside, n=1)
        or same_key
        or difflib.get_close_matches(name, legal, n=1, cutoff=0.0)
    )
    return f"unknown key {name}: did you mean {' or '.join(near)}?"
