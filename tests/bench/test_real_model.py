"""The bench of a model of real size, on a tiny one: every part runs, and all implementations do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.systems import real_model


def test_every_part_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an implementation writes other tokens than asked for, or its update has another loss."""
    tiny = dict(vocab_size=600, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    monkeypatch.setattr(real_model, "SMOLLM2_135M", real_model.SMOLLM2_135M | tiny | {"head_dim": 16})
    monkeypatch.setattr(real_model, "SCALE", 80.0)
    options = ["--layers", "1", "--batch", "4", "--trees", "2", "--prompt", "12", "--new", "3", "--repeats", "1"]
    real_model.main([*options, "--dtype", "float32", "--record", "named", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "cpu" / "named.json").read_text())
    results = record["results"]
    assert record["bench"] == "real_model"
    for part in ("decode", "tree", "questions"):
        assert not results[part]["failed"] and {"generate", "ours"} <= results[part].keys()
        assert results[part]["ours"]["new_tokens_per_s"] > 0
    update = results["update"]
    assert not update["failed"] and update["tokens"]["flat"] > update["tokens"]["unique"]
    assert update["ours"]["loss"] == pytest.approx(update["loop"]["loss"], rel=1e-4, abs=1e-6)
