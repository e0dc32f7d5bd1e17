"""Forward, loss and backward over packed trees against the same trajectories written out, same model, same run.

    pytest bench/bench_packed_update.py            (a table: pytest-benchmark)
    python bench/bench_packed_update.py            (one record: ratios, written to bench/results/)

Prediction: the layers' matrix products fall by exactly T_flat / T_tree. The head falls by less (its rows are action
tokens, shared less than prompts), and so does attention (unique tokens lie deeper than the average flat token). The
model is small, but head and attention have about the share of its work that they have in Qwen3-4B at the published
lengths (11 % and 16 % of the layers' products), so that 0.8 of T_flat / T_tree is the bar.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import pytest
import torch
from forests import forest_of_overlap, written_out
from records import write_record
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, TurnTree, pack_trees
from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy
from atpo_fast.tree import overlap

VOCAB, MAX_TOKENS, TREES, ROUNDS = 2048, 8192, 1, 3
OVERLAPS = (0.36, 0.8)
OBJECTIVE = Objective.preset("at2po", clip_low=10.0, clip_high=10.0)


def policy() -> Policy:
    """A 3-layer model, large enough that arithmetic and not Python is measured."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return Policy(Qwen3ForCausalLM(config))


def forests(target: float) -> tuple[list[TurnTree], list[TurnTree]]:
    """(trees, the same written out) at an overlap."""
    trees = forest_of_overlap(target, TREES, turns=3, action=24, observation=48, vocab=VOCAB)
    return trees, written_out(trees)


def pack(trees: list[TurnTree]) -> list[PackedTrees]:
    """Rows of the bench's budget, nothing pruned."""
    return pack_trees(trees, OBJECTIVE, MAX_TOKENS, prune=False)


def update(model: Policy, rows: list[PackedTrees]) -> None:
    """One mini-batch's gradient."""
    model.zero_grad()
    for row in rows:
        model(row, OBJECTIVE).loss.backward()


@pytest.mark.parametrize("target", OVERLAPS)
@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_update(benchmark: Any, layout: str, target: float) -> None:
    model, (trees, flat) = policy(), forests(target)
    rows = pack(trees if layout == "packed" else flat)
    benchmark.extra_info.update(overlap=overlap(trees), tokens=sum(row.num_tokens for row in rows))
    benchmark.pedantic(update, (model, rows), rounds=3, warmup_rounds=1)


def record(target: float) -> dict[str, Any]:
    """Interleaved timings of both layouts at one overlap."""
    model, (trees, flat) = policy(), forests(target)
    rows = {"packed": pack(trees), "flat": pack(flat)}
    seconds: dict[str, list[float]] = {"packed": [], "flat": []}
    for i in range(ROUNDS + 1):
        for layout, packed in rows.items():
            begun = time.perf_counter()
            update(model, packed)
            if i:
                seconds[layout].append(time.perf_counter() - begun)
    tokens = {layout: sum(row.num_tokens for row in packed) for layout, packed in rows.items()}
    bound = tokens["flat"] / tokens["packed"]
    ratio = statistics.median(seconds["flat"]) / statistics.median(seconds["packed"])
    return {
        "overlap": overlap(trees),
        "tokens": tokens,
        "seconds": seconds,
        "time_ratio": ratio,
        "token_ratio": bound,
        "ratio_over_bound": ratio / bound,
    }


def main() -> None:
    """Write and print one record per overlap."""
    cases = [record(target) for target in OVERLAPS]
    machine = platform.processor() or platform.machine()
    write_record("packed_update_cpu", "packed_update", machine=machine, threads=torch.get_num_threads(), cases=cases)
    for case in cases:
        print(
            f"overlap {case['overlap']:.2f}: flat/packed time {case['time_ratio']:.2f}, "
            f"tokens {case['token_ratio']:.2f}, fraction of the bound {case['ratio_over_bound']:.2f}"
        )


if __name__ == "__main__":
    main()
