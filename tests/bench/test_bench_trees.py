"""The benches of attention, layers and updates: forests, rows, that layouts do the same work, and what is judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_fast import assign_credit
from atpo_fast.tree import overlap
from tests.helpers.tree_cases import random_row, tree_mask

BENCH = Path(__file__).resolve().parents[2] / "bench"
VOCAB, SCALE, MAX_TOKENS = 512, 40, 512


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the benches can be imported, and there is a tiny model."""
    monkeypatch.syspath_prepend(BENCH)
    import models

    sizes = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "key_heads": 2, "head_dim": 16, "vocab": VOCAB}
    monkeypatch.setitem(models.SHAPES, "tiny", models.Shape(**sizes))


def case(**changes: Any) -> Any:
    """A small case whose tree does not fit one row."""
    from model_cases import ModelCase

    return ModelCase(**{"model": "tiny", "max_tokens": MAX_TOKENS, "scale": SCALE, "dtype": "float32"} | changes)


def test_forests_are_those_of_the_published_search() -> None:
    """Fails if trees are of another size, share or number of leaves than the published search's, or a synthetic forest
    misses its overlap."""
    from forests import PUBLISHED, SEARCH_3000, forest_of_overlap, random_tree

    trees = [random_tree(seed, PUBLISHED, VOCAB) for seed in range(10)]
    assert all(len(tree.leaves) == 22 and 17_000 <= tree.unique_tokens <= 65_000 for tree in trees)
    assert all(0.34 <= overlap([tree]) <= 0.56 for tree in trees)
    for target in (0, 0.36, 0.8, 0.9):
        assert abs(overlap(forest_of_overlap(target, 1, 8, VOCAB)) - target) < 0.02
    tree = random_tree(0, SEARCH_3000, VOCAB)
    assert [len(tree.path_ids(leaf)) for leaf in tree.leaves] == [3000] * 22


def test_visible_pairs_are_those_of_the_mask() -> None:
    """Fails if rates and bounds count other pairs than the attention computes."""
    from rows import visible_pairs

    for seed in range(5):
        end = random_row(100, 9, seed)
        assert visible_pairs(end) == int(tree_mask(end).sum())


def test_head_on_every_position_of_a_flat_row() -> None:
    """Fails if a position is left out or scored twice, its target is not its next token, or a turn is cut."""
    from forests import PUBLISHED, random_forest
    from rows import every_position, flat_rows, sequence_ends

    for row in flat_rows(random_forest(1, PUBLISHED.scaled(SCALE), VOCAB), MAX_TOKENS):
        full = every_position(row)
        ends = sequence_ends(row.subtree_end)
        positions = full.predictor.tolist()
        assert positions == [t for t in range(row.num_tokens) if t + 1 not in ends]
        assert torch.equal(full.targets, row.input_ids[full.predictor + 1])
        assert bool((full.weight_pos + full.weight_neg > 0).all())
        torch.testing.assert_close(full.weight_neg.sum(), row.weight_neg.sum())
        first = row.predictor[row.turn_offsets[:-1].long()].tolist()
        turns = [positions[lo] for lo in full.turn_offsets[:-1].tolist()]
        own = set(row.predictor.tolist())
        length = dict(zip(turns, full.turn_offsets.diff().tolist(), strict=True))
        assert [length[start] for start in first] == row.turn_offsets.diff().tolist()
        assert not (set(turns) - set(first)) & own
        assert full.turn_offsets[-1] == len(positions) and int(full.turn_offsets.diff().min()) > 0


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_all_layouts_have_one_loss_and_gradient(checkpointing: str) -> None:
    """Fails if what is compared computes another loss or gradient than ours: other rows, weights or attention."""
    peers = ("tree_repeated", "tree_sdpa", "flat", "flat_full_head", "flat_padded", "flat_xformers")
    chosen = case(overlap=0.8, scale=80, max_tokens=256, peers=peers, checkpointing=checkpointing)
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
    from model_runs import Setting

    chosen = case(max_tokens=4096, clipped=0.5, checkpointing="layer", peers=("none_clipped",))
    setting = Setting.of(chosen, "cpu")
    (row,) = setting.layouts.trees
    from rows import OBJECTIVE

    coef = setting.model.policy(row, OBJECTIVE).coef
    turns = coef.split(row.turn_offsets.diff().tolist())
    assert sum(bool((turn == 0).all()) for turn in turns) == round(row.num_turns / 2)
    rows = row.predictor[coef != 0]  # that carry gradient
    needed = tree_mask(row.subtree_end)[rows].any(0)  # seen by one of them
    record = chosen.measure("cpu", 0.0)
    kept = record["bounds"]["kept"]
    assert kept == pytest.approx(float(needed.float().mean())) and 0 < kept < 1
    assert record["bounds"]["clipped"] == pytest.approx(4 / (1 + 3 * kept))
    assert record["implementations"]["none_clipped"]["dropped_tokens"] == 0


def test_attention_and_layer_records() -> None:
    """Fails if an implementation attends over other keys, or a record lacks what the report reads."""
    from attention_cases import AttentionCase
    from report_results import report
    from tree_report import case_table

    for mode in ("forward", "gradient"):
        small = AttentionCase(row_tokens=300, heads=(4, 2, 16), dtype="float32", mode=mode, peers=("sdpa", "causal"))
        record = small.measure("cpu", 0.0)
        assert record["tokens"]["unique"] <= 300
        for entry in record["implementations"].values():
            assert all(value < 1e-5 for error in entry["errors"].values() for value in error.values())
            assert entry["tflops"] > 0 and entry["host_ms"] > 0
        assert len(case_table(small.fields() | record | {"bench": "tree_attention", "commit": "x"})) > 5
    layer = case(scope="decoder_layer", max_tokens=4096, peers=("flat", "tree_sdpa")).measure("cpu", 0.0)
    assert all("ms" in entry for entry in layer["implementations"].values()) and "full_head" not in layer["bounds"]
    assert report([], Path()).count("not measured") > 20


def update_record(**changes: Any) -> dict[str, Any]:
    """A made-up record of an update on a GPU."""
    from model_cases import ModelCase

    times = {"ours": 100.0, "flat": 200.0, "flat_varlen": 180.0, "flat_full_head": 220.0, "none_clipped": 130.0}
    entries = {name: {"ms": {"p50": ms}, "same_work": True} for name, ms in times.items()}
    entries["ours"]["mfu"] = {"unique": 0.5}
    fields = {"model": "qwen3-1.7b", "max_tokens": 65536, "checkpointing": "layer", "overlap": 0.36}
    found = ModelCase(**fields | changes)
    tokens = {"unique": 10_000, "flat": 20_000}
    bounds = {"tokens": 2.0, "full_head": 2.5, "clipped": 1.3, "kept": 0.7}
    return {"bench": found.bench, **found.fields(), "implementations": entries, "tokens": tokens, "bounds": bounds}


def test_goals_of_updates_are_judged() -> None:
    """Fails if a goal passes when missed, or takes another case or a slower baseline than the best."""
    from tree_goals import CPU, GPU
    from verdicts import judge

    def verdicts(goals: Any, *records: dict[str, Any]) -> list[bool | None]:
        return [None if verdict is None else verdict.passed for verdict in judge(goals, list(records)).values()]

    none = [None] * 3
    assert verdicts(GPU, update_record()) == [*none, True, *[None] * 7]
    assert "1.80× (flat_varlen; bound 2.00×)" in str(list(judge(GPU, [update_record()]).values())[3])
    assert verdicts(GPU, update_record(overlap=0.8)) == [*none, None, False, *[None] * 6]
    published = [update_record(overlap=None, model=f"qwen3-{size}") for size in ("4b", "0.6b", "1.7b")]
    host = {"bench": "host_preparation", "tokens": {"unique": 200_000}}
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


def test_goals_of_attention_are_judged() -> None:
    """Fails if one of the lengths may miss a goal, or the slower FlexAttention counts."""
    from attention_cases import HEADS, ROWS, AttentionCase
    from tree_goals import GPU
    from verdicts import judge

    base = AttentionCase(row_tokens=ROWS[0], heads=HEADS["qwen3-4b"])

    def record(tokens: int, flex_static: float = 25.0, rate: float = 400.0, later: float = 20.0) -> dict[str, Any]:
        times = {"ours": 20.0, "flex": 30.0, "flex_static": flex_static, "causal": 90.0}
        entries: dict[str, Any] = {name: {"ms": {"p50": ms}, "tflops": 450.0} for name, ms in times.items()}
        entries["ours"] |= {"tflops": rate, "other_length_ms": later}
        fields = replace(base, row_tokens=tokens).fields() | {"heads": list(base.heads)}
        return {"bench": "tree_attention", **fields, "implementations": entries}

    def verdicts(**last: float) -> list[bool | None]:
        records = [*map(record, ROWS[:2]), record(ROWS[2], **last)]
        return [None if v is None else v.passed for v in judge(GPU, records).values()][:3]

    assert verdicts() == [True, True, True]
    assert verdicts(flex_static=22.0, rate=380.0, later=2000.0) == [False, False, False]
    assert all(verdict is None for verdict in judge(GPU, [record(ROWS[0])]).values())


def test_credit_of_a_scaled_tree() -> None:
    """Fails if a tree made for a row of attention does not fit it, or has fewer leaves."""
    from forests import tree_of_tokens

    tree = tree_of_tokens(2048, VOCAB)
    assert 0.97 * 2048 < tree.unique_tokens <= 2048 and len(tree.leaves) == 22
    before = np.array(tree.advantages)
    assign_credit([tree])
    np.testing.assert_array_equal(tree.advantages, before)
