"""Corpora for the tests of retrieval."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_corpus(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl or .jsonl.gz file."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def random_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """wiki-18 rows of words whose frequencies differ widely, so that scores tie and differ."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)] + ["The", "Zoë", "и", "x-y", "42"]
    shares = 1 / np.arange(1, len(words) + 1)
    rows = []
    for i in range(number):
        text = " ".join(rng.choice(words, size=rng.integers(0, 40), p=shares / shares.sum()))
        rows.append({"id": f"p{i}", "contents": f'"Title {i % 7}"\n{text}'})
    return rows


def random_queries(number: int, seed: int = 1) -> list[str]:
    """Queries of known, repeated and unknown words."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)] + ["zoë", "the", "unknown", "title", "3", "42"]
    return ["", "the of", "unknown", *(" ".join(rng.choice(words, size=rng.integers(1, 6))) for _ in range(number))]
