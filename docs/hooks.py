"""What MkDocs does beside rendering: tables of the configuration, formulas as MathML, links that leave docs/.

- The line `<!-- tables of the configuration -->` becomes one table for each section of the schema, from the docstrings
  of its fields, and `<!-- table of the presets -->` one of the objectives, so that no page falls behind the code.
- Formulas between dollar signs become MathML, which browsers render without a script.
- Links to files beside docs/ (`../bench/RESULTS.md`) work where the repository is read; the site shows their text.
"""

from __future__ import annotations

import dataclasses
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
TABLES = "<!-- tables of the configuration -->"
PRESETS = "<!-- table of the presets -->"
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+[^)]*\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables and take away links that leave docs/."""
    if TABLES in markdown:
        markdown = markdown.replace(TABLES, configuration_tables())
    if PRESETS in markdown:
        markdown = markdown.replace(PRESETS, preset_table())
    return _OUTSIDE.sub(r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML."""
    from latex2mathml.converter import convert

    def math(match: re.Match[str]) -> str:
        return str(convert(html.unescape(match[3]).strip(), display="block" if match[2] == "[" else "inline"))

    return _FORMULA.sub(math, content)


def preset_table() -> str:
    """Markdown of the objectives' presets."""
    _find_packages()
    from atpo_fast.objective.objective import PRESETS as presets

    rows = ["| preset | ratio | clip | below, above | dual cap | average | more |", "|---|---|---|---|---|---|---|"]
    for name, objective in presets.items():
        loss = objective.loss_config
        bounds = "–" if loss.clip == "sapo" else f"{loss.clip_low:g}, {loss.clip_high:g}"
        dual = "–" if loss.dual_cap is None else f"{loss.dual_cap:g}"
        terms = {
            f"KL `{loss.kl}` {loss.kl_coef:g}": loss.needs_reference,
            f"entropy bonus {loss.entropy_coef:g}": loss.needs_entropy,
            f"entropy advantage {objective.entropy_advantage:g}": objective.entropy_advantage,
            f"temperatures {loss.sapo_tau_pos:g}, {loss.sapo_tau_neg:g}": loss.clip == "sapo",
        }
        more = ", ".join(text for text, there in terms.items() if there)
        cells = [f"`{name}`", loss.level, f"`{loss.clip}`", bounds, dual, f"`{objective.aggregation}`", more]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _find_packages() -> None:
    """Let this repository's packages be imported, whether they are installed or not."""
    if str(ROOT) not in sys.path:
        sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def configuration_tables() -> str:
    """Markdown of every section: key, default, allowed values, meaning."""
    _find_packages()
    from atpo_fast.config.schema import Config

    return "\n".join(_section(Config, "", "Run"))


def _section(cls: type, prefix: str, title: str) -> Iterator[str]:
    """Yield the table of one section, and those of the sections in it."""
    from pydantic import TypeAdapter

    described = TypeAdapter(cls).json_schema()
    properties, definitions = described["properties"], described.get("$defs", {})
    hints = get_type_hints(cls)
    inner: list[tuple[type, str, str]] = []
    rows: list[str] = []
    for field in dataclasses.fields(cls):
        name, fact = f"{prefix}{field.name}", properties[field.name]
        sections = [part for part in _dataclasses(hints[field.name])]
        listed = str(hints[field.name]).startswith("list")
        for section in sections:
            what = f"{name}, each" if listed else name if len(sections) == 1 else f"{name}, {_chosen_by(section)}"
            inner.append((section, "" if listed else f"{name}.", what))
        if not sections or listed:
            values = _text(_values(fact, definitions))
            rows.append(f"| `{name}` | {_cell(_default(field))} | {values} | {_text(fact.get('description', ''))} |")
    yield f"\n## {title}\n"
    yield f"{_text((cls.__doc__ or '').strip())}\n"
    if rows:
        yield "| key | default | values | meaning |\n|---|---|---|---|"
        yield from rows
    for section, start, what in inner:
        yield from _section(section, start, what)


def _dataclasses(hint: Any) -> list[type]:
    """List the configuration classes in a type: itself, those of a union, or that of a list's items."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [cls for part in get_args(hint) for cls in _dataclasses(part)]


def _chosen_by(cls: type) -> str:
    """`name: vllm`, for the member of a union that a fixed field chooses."""
    for field in dataclasses.fields(cls):
        values = get_args(get_type_hints(cls)[field.name])
        if len(values) == 1 and isinstance(values[0], str):
            return f"{field.name}: {values[0]}"
    return cls.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _yaml(getattr(field.default, "default", field.default))
    if field.default_factory is not dataclasses.MISSING:
        return _yaml(field.default_factory())
    return ""


def _yaml(value: Any) -> str:
    """Write a value as a configuration file does."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{}" if not value else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(fact: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Which values are legal, in words."""
    if "$ref" in fact:
        return _values(definitions[fact["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in fact:
        return " or ".join(_values(option, definitions) for option in fact["anyOf"])
    if "enum" in fact or "const" in fact:
        return ", ".join(_yaml(value) for value in fact.get("enum", [fact.get("const")]))
    kind = {"null": "null", "string": "text", "boolean": "true, false", "object": "mapping", "array": "list"}.get(
        fact.get("type", ""), fact.get("type", "")
    )
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    return " ".join([kind, *(f"{sign} {fact[name]:g}" for name, sign in bounds if name in fact)])


def _cell(text: str) -> str:
    return f"`{text}`" if text and len(text) < 40 and "," not in text else _text(text)


def _text(text: str) -> str:
    """Prose in one line of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
