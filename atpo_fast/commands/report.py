"""`atpo-fast report`: the HTML report of a run, or of a file of search trees."""

from __future__ import annotations

import argparse
from pathlib import Path

from atpo_fast.commands.verb import Verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument RUN, the source of the report."""
    parser.add_argument("source", metavar="RUN", help="run folder, or a file that `atpo-fast rollout` wrote")


def report(arguments: argparse.Namespace) -> int:
    """Write the page and print its path; returns the exit code."""
    if not Path(arguments.source).exists():
        raise FileNotFoundError(f"{arguments.source}: no run folder and no file of search trees")
    from atpo_fast.report import build_report

    print(build_report(Path(arguments.source)))
    return 0


REPORT = Verb(
    name="report",
    summary="the HTML report of a run, or of a file of search trees",
    detail="One self-contained file.",
    example="atpo-fast report runs/quickstart",
    run=report,
    add_arguments=add_arguments,
)
