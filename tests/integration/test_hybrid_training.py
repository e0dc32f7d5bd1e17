"""Training of a tiny model with recurrent layers, from its cold start to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import records, run, write_config

pytestmark = pytest.mark.distributed

MODEL = (
    "{model_type: qwen3_5_text, layer_types: [linear_attention, full_attention], linear_num_key_heads: 2, "
    "linear_num_value_heads: 2, linear_key_head_dim: 8, linear_value_head_dim: 8}"
)


def test_a_hybrid_model_trains(tmp_path: Path) -> None:
    """Fails if a part of the loop cannot take a model with states: a token is prefilled twice, engine and trainer
    disagree, or weights do not reach the engine."""
    steps = ("cold_start.steps=4", "train.steps=2", "train.save_every=2")
    run(write_config(tmp_path), f"model.architecture={MODEL}", "model.gradient_checkpointing=layer", *steps)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["prefilled_tokens"] == summary["unique_tokens"] > 0 and summary["overlap"] > 0
    for step in records(tmp_path / "run", "train").values():
        assert step["rollout/mismatch_kl"] < 1e-5 and step["policy/grad_norm"] > 0
    config = json.loads((tmp_path / "run/checkpoints/step_000002/hf/config.json").read_text())
    assert config["model_type"] == "qwen3_5_text"
