"""Show the records of attention in the report."""

from __future__ import annotations

from typing import Any

from bench.core.tables import MODES, Section
from bench.core.verdicts import Record


def title(record: Record) -> str:
    """Describe the case of a record in words."""
    tokens = record["tokens"]
    counted = f"{tokens['unique']:,} unique of {tokens['flat']:,} flat tokens"
    heads, key_heads, width = record["heads"]
    shape = f"{heads} query and {key_heads} key heads of {width}"
    return f"{MODES[record['mode']]}, {counted}, {shape}, {record['dtype']}"


def order(record: Record) -> tuple[Any, ...]:
    """Sort key: by mode, then many heads before few, then short rows before long ones."""
    return (record["mode"], [-heads for heads in record["heads"]], record["row_tokens"])


SECTION = Section(bench="tree_attention", title=title, order=order)
WINDOWS = Section(bench="tree_attention_windows", title=title, order=order)
