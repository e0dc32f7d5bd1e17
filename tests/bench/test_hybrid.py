"""The bench of models with recurrent layers, on tiny ones: all layouts compute the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.systems import hybrid


def test_layouts_have_one_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layout leaves trajectories out, or the bound is not that of its tokens."""
    monkeypatch.setattr(hybrid, "VOCABULARY", 64)
    monkeypatch.setattr(hybrid, "SIZES", hybrid.SIZES | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64})
    options = ["--families", "qwen3_5,lfm2", "--overlaps", "0.6", "--scale", "100", "--repeats", "1"]
    hybrid.main([*options, "--padded", "200", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "cpu" / "hybrid_update.json").read_text())
    for family in ("qwen3_5", "lfm2"):
        entry = record["results"][family]["0.6"]
        assert not entry["failed"] and entry["bound"] == pytest.approx(1 / (1 - entry["overlap"]))
        assert entry["tokens"]["padded"] >= entry["tokens"]["unique"]
        assert entry["loss"]["flat"] == pytest.approx(entry["loss"]["tree"], rel=1e-3, abs=1e-6)
        assert entry["loss"]["loop"] == pytest.approx(entry["loss"]["tree"], rel=1e-3, abs=1e-6)
