"""Commands in this process share a parser."""

from tests.helpers.one_parser import one_parser

__all__ = ["one_parser"]
