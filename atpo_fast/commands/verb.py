"""What a verb of the command line is: its help, its arguments, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the verb has no arguments."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb of the command line, `atpo-fast NAME`."""

    name: str
    summary: str
    """Line for the list of verbs, without capital and full stop."""
    detail: str
    """Further help, in whole sentences."""
    example: str
    run: Callable[[argparse.Namespace], int]
    """Function that does it with the parsed arguments; returns the exit code."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    old_names: tuple[str, ...] = ()
    """Spellings of the name that are still understood."""

    def add_to(self, verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add the verb's parser to those of the command."""
        parser = verbs.add_parser(
            self.name,
            aliases=self.old_names,
            help=self.summary,
            description=f"{self.summary[0].upper()}{self.summary[1:]}. {self.detail}",
            epilog=f"example: {self.example}",
        )
        self.add_arguments(parser)
        parser.set_defaults(run=self.run)
