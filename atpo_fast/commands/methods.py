"""`atpo-fast methods`: the methods that the key `method` knows."""

from __future__ import annotations

import argparse
from textwrap import fill

from atpo_fast.commands.verb import Verb
from atpo_fast.config.method_table import HEADINGS, method_rows
from atpo_fast.config.methods import METHODS


def print_methods(arguments: argparse.Namespace) -> int:
    """Print the table of the methods, then the source of each and what differs from it; returns 0."""
    rows = [HEADINGS, *method_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for method in METHODS.values():
        text = f"{method.title}: {method.source}." + (f" Differs: {method.departs}." if method.departs else "")
        print("", fill(text, 118, initial_indent=f"{method.name}: ", subsequent_indent="    "), sep="\n")
    return 0


METHODS_VERB = Verb(
    name="methods",
    summary="the methods that `method=NAME` knows, with their sources",
    detail="A method fills in strategy, credit, objective and batch rules; every key given beside it still counts.",
    example="atpo-fast methods",
    run=print_methods,
)
