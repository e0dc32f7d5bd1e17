"""YAML with the scalars of version 1.2, which people expect: `1e-6` is a number, `off` and `no` are words."""

from __future__ import annotations

import re

import yaml

_MOST_NODES = 10_000


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    def check_size(self, node: yaml.Node) -> None:
        """Raise YAMLError for a value that aliases blow up (`[*a, *a]` of `[*b, *b]` of ...), or that holds itself."""
        open_nodes, count = [node], 0
        while open_nodes:
            inner = open_nodes.pop()
            count += 1
            if count > _MOST_NODES:
                raise yaml.MarkedYAMLError(None, None, f"more than {_MOST_NODES:,} parts", node.start_mark)
            if isinstance(inner, yaml.SequenceNode):
                open_nodes += inner.value
            elif isinstance(inner, yaml.MappingNode):
                open_nodes += [part for pair in inner.value for part in pair]


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `Loader` would not read back as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote with escapes where PyYAML would otherwise write a character that it reads back as a line break."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


Dumper.add_representer(str, _represent_text)

_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
for _yaml_class in (Loader, Dumper):
    _yaml_class.yaml_implicit_resolvers = {}
    for _tag, (_pattern, _first) in _SCALARS.items():
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
