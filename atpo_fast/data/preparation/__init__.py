"""Preparation of data: read sets in any layout, take evaluation questions out of training, write one layout."""

from atpo_fast.data.preparation.prepare import PreparedSet, prepare
from atpo_fast.data.preparation.sources import SetSource, parse_source

__all__ = ["PreparedSet", "SetSource", "parse_source", "prepare"]
