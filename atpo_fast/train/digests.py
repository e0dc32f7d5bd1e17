"""Digests of what a run is made from: weights, questions, texts. Equal digests stand for equal contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from atpo_fast.data.questions import Question

_PROBES = 16  # stretches of a weight file that its digest reads
_PROBE_BYTES = 1 << 16


def model_digest(folder: Path) -> str:
    """Return a digest of a model folder: its configuration, and names, sizes and samples of its weight files."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for i in range(_PROBES):
                file.seek(i * max(0, size - _PROBE_BYTES) // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def questions_digest(questions: Iterable[Question]) -> str:
    """Return the number of questions, and a digest of their ids, texts and answers."""
    listed = [json.dumps([q.id, q.text, list(q.answers)]) for q in questions]
    return f"{len(listed)}, {text_digest(listed)}"


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()[:16]
