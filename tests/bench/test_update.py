"""The benches of layers and updates: that layouts do the same work, and what is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atpo_fast.packing import depth_first
from bench.attention.goals import GPU as ATTENTION_GPU
from bench.core.verdicts import judge
from bench.packing.report import CPU as PACKING_CPU
from bench.packing.report import GPU as PACKING_GPU
from bench.packing.rows import OBJECTIVE
from bench.update.cases import ModelCase
from bench.update.goals import CPU as UPDATE_CPU
from bench.update.goals import GPU as UPDATE_GPU
from bench.update.measure import Setting
from bench.update.models import SHAPES, Shape
from tests.helpers.tree_cases import tree_mask

VOCAB, SCALE, MAX_TOKENS = 512, 40, 512
GPU = ATTENTION_GPU | UPDATE_GPU | PACKING_GPU
CPU = UPDATE_CPU | PACKING_CPU


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a tiny model."""
    sizes: dict[str, int] = {
        "hidden": 32,
        "intermediate": 64,
        "layers": 2,
        "heads": 4,
        "key_heads": 2,
        "head_dim": 16,
        "vocab": VOCAB,
    }
    monkeypatch.setitem(SHAPES, "tiny", Shape(**sizes))


def case(**changes: Any) -> Any:
    """A small case whose tree does not fit one row."""
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": MAX_TOKENS, "scale": SCALE, "dtype": "float32"}
    return ModelCase(**fields | changes)


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_all_layouts_have_one_loss_and_gradient(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what is compared computes another loss or gradient than ours: other rows, weights or attention."""
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)  # or a tree as small as this would rather repeat its ancestors
    peers = ("tree_repeated", "tree_sdpa", "flat", "flat_full_head", "flat_padded", "flat_xformers")
    chosen = case(overlap=0.8, scale=160, max_tokens=200, peers=peers, checkpointing=checkpointing)
    record = chosen.measure("cpu", 0.0)
    entries = record["implementations"]
    if "skipped" in entries.get("flat_xformers", {}):
        del entries["flat_xformers"]
    assert not [entry["error"] for entry in entries.values() if "error" in entry]
    assert record["rows"]["unique"] > 1 and record["tokens"]["packed"] == record["tokens"]["unique"]
    losses, norms = ([entry[key] for entry in entries.values()] for key in ("loss", "gradient_norm"))
    np.testing.assert_allclose(losses, losses[0], atol=1e-6)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    assert all(entry["peak_bytes"] > entry["gradient_bytes"] > 0 for entry in entries.values())
    bounds = record["bounds"]
    assert bounds["tokens"] == record["tokens"]["flat"] / record["tokens"]["unique"]
    assert bounds["full_head"] > bounds["flops"] > 1


def test_clipped_turns_leave_the_backward() -> None:
    """Fails if other than half of the turns are clipped, or the bound counts other tokens than stay."""
    chosen = case(max_tokens=4096, clipped=0.5, checkpointing="layer", peers=("none_clipped",))
    setting = Setting.of(chosen, "cpu")
    (row,) = setting.layouts.trees

    coef = setting.model.policy(row, OBJECTIVE).coef
    turns = coef.split(row.turn_offsets.diff().tolist())
    assert sum(bool((turn == 0).all()) for turn in turns) == round(row.num_turns / 2)
    rows = row.predictor[coef != 0]  # that carry gradient
    needed = tree_mask(row.subtree_end)[rows].any(0)  # seen by one of them
    record = chosen.measure("cpu", 0.0)
    kept = record["bounds"]["kept"]
    assert kept == pytest.approx(float(needed.float().mean())) and 0 < kept < 1
    assert record["bounds"]["clipped"] == pytest.approx(4 / (1 + 3 * kept))
    assert record["implementations"]["none_clipped"]["skipped_tokens"] == 0


def test_layer_records() -> None:
    """Fails if a layout of a layer's rows is not timed, or a layer is compared with a bound of the head."""
    layer = case(scope="decoder_layer", max_tokens=4096, peers=("flat", "tree_sdpa")).measure("cpu", 0.0)
    assert all("ms" in entry for entry in layer["implementations"].values()) and "full_head" not in layer["bounds"]


def update_record(**changes: Any) -> dict[str, Any]:
    """A made-up record of an update on a GPU."""
    times = {"ours": 100.0, "flat": 200.0, "flat_varlen": 180.0, "flat_full_head": 220.0, "none_clipped": 130.0}
    entries = {name: {"ms": {"p50": ms}, "same_work": True} for name, ms in times.items()}
    entries["ours"]["mfu"] = {"unique": 0.5}
    fields: dict[str, Any] = {"model": "qwen3-1.7b", "max_tokens": 65536, "checkpointing": "layer", "overlap": 0.36}
    found = ModelCase(**fields | changes)
    tokens = {"unique": 10_000, "flat": 20_000}
    bounds = {"tokens": 2.0, "full_head": 2.5, "clipped": 1.3, "kept": 0.7}
    return {"bench": found.bench, **found.fields(), "implementations": entries, "tokens": tokens, "bounds": bounds}


def test_goals_of_updates_are_judged() -> None:
    """Fails if a goal passes when missed, or takes another case or a slower baseline than the best."""

    def verdicts(goals: Any, *records: dict[str, Any]) -> list[bool | None]:
        return [None if verdict is None else verdict.passed for verdict in judge(goals, list(records)).values()]

    none = [None] * 3
    assert verdicts(GPU, update_record()) == [*none, True, *[None] * 7]
    assert "1.80× (flat_varlen; bound 2.00×)" in str(list(judge(GPU, [update_record()]).values())[3])
    assert verdicts(GPU, update_record(overlap=0.8)) == [*none, None, False, *[None] * 6]
    published = [update_record(overlap=None, model=f"qwen3-{size}") for size in ("4b", "0.6b", "1.7b")]
    host: dict[str, Any] = {"bench": "host_preparation", "tokens": {"unique": 200_000}}
    host["implementations"] = {"ours": {"ms": {"p50": 10.0}}}
    found = [*none, None, None, True, True, None, True, True, True]
    assert verdicts(GPU, *published, host) == found
    host["implementations"]["ours"]["ms"]["p50"] = 151.0
    clipped = update_record(overlap=None, model="qwen3-4b", clipped=0.5)
    assert verdicts(GPU, *published, clipped, host) == [*none, None, None, True, True, True, True, False, False]
    cpu = {"model": "qwen3-20m", "max_tokens": 4096, "checkpointing": "none"}
    assert verdicts(CPU, update_record(**cpu)) == [True, *[None] * 4]
    slow = update_record(**cpu)
    slow["bounds"]["tokens"] = 2.3
    assert verdicts(CPU, slow)[0] is False
    halved = update_record(**cpu, clipped=0.5) | {"overlap": None}
    assert verdicts(CPU, halved)[3] is True
