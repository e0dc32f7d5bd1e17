"""Prompts that begin alike in the paged engine: one entry for what they share, and the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from atpo_fast.engines.paged import PagedEngine, prefill, shared_prompts
from atpo_fast.engines.paged.shared_prompts import LEAST, SharedPrompts
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.engine_requests import VOCABULARY, check_logprobs, grow
from tests.helpers.hybrid_models import hybrid_config, in_float64
from tests.helpers.small_tokenizers import numbered

SIZES = dict(
    vocab_size=VOCABULARY + 2,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
SYSTEM = LEAST + 30


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with in_float64():
        yield


def make_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES) if family == "qwen3" else hybrid_config(family)
    return AutoModelForCausalLM.from_config(config).double().eval()


def make_engine(family: str = "qwen3", **options: Any) -> PagedEngine:
    return PagedEngine(make_model(family), numbered(VOCABULARY), **{"cache_tokens": 100_000, **options})


def questions(count: int) -> list[TurnTree]:
    """Trees that are only prompts: one system prompt for all of them, and tokens of their own behind it."""
    rng = np.random.default_rng(0)
    system = rng.integers(2, VOCABULARY, SYSTEM)
    return [TurnTree([*system, 2 + t, *rng.integers(2, VOCABULARY, rng.integers(3, 20))]) for t in range(count)]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_shared_beginning_is_prefilled_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a question's tree prefills the system prompt again, continues it from another position or state, or
    keeps it when no tree is left."""
    engine, trees = make_engine(family), questions(5)
    grow(engine, trees)
    counters = engine.counters
    unique, repeated = sum(tree.unique_tokens for tree in trees), 4 * SYSTEM
    assert (counters.prefilled_tokens, counters.shared_tokens) == (unique - repeated, repeated)
    leaves = sum(not turn.children for tree in trees for turn in tree.turns)
    assert counters.forwarded_tokens == unique - repeated - leaves
    check_logprobs(make_model(family), trees, 1e-9)
    for index in range(5):
        assert engine.cache.nodes
        engine.release(f"t{index}")
    assert not engine.cache.nodes and engine.cache.available == engine.cache.pool.limit

    monkeypatch.setattr(shared_prompts, "LEAST", 10**6)
    alone, again = make_engine(family), questions(5)
    grow(alone, again)
    assert (alone.counters.prefilled_tokens, alone.counters.shared_tokens) == (unique, 0)
    for one, other in zip(trees, again, strict=True):
        assert all(np.array_equal(a.action_ids, b.action_ids) for a, b in zip(one.turns, other.turns, strict=True))


@pytest.mark.parametrize("options", [{"cache_tokens": 420}, {"batch_size": 2}, {"pieces": 7}], ids=str)
def test_eviction_and_small_pieces(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an entry goes before those that continue it, is freed twice, or continues before it is filled."""
    if pieces := options.pop("pieces", 0):
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", pieces)
    engine, trees = make_engine(**options), questions(5)
    grow(engine, trees)
    check_logprobs(make_model("qwen3"), trees, 1e-9)
    assert bool(engine.counters.evicted_tokens) == ("cache_tokens" in options)
    for index in range(5):
        engine.release(f"t{index}")
    assert not engine.cache.nodes and engine.cache.available == engine.cache.pool.limit


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=12
    )
)
def test_what_is_shared_is_a_proper_beginning_of_several_prompts(prompts: list[tuple[int, int, int]]) -> None:
    """Fails if a beginning is short, is the whole of a prompt, or belongs to one tree alone."""
    systems = [np.full(LEAST + 20 * n, n) for n in range(3)]
    made = [np.array([*systems[system], *[3 + extra] * 10, *[9] * tail, 10]) for system, extra, tail in prompts]
    found = SharedPrompts()
    for number, prompt in enumerate(made):
        found.add((number, 0), prompt)
        found.add((number, 0), prompt)  # as of another chain of the same tree
    for prompt in made:
        beginning = found.beginning(prompt)
        if beginning is not None:
            assert LEAST <= len(beginning) < len(prompt)
            assert sum(np.array_equal(other[: len(beginning)], beginning) for other in made) > 1
    for system in {system for system, _, _ in prompts}:
        mine = [prompt for prompt, (s, _, _) in zip(made, prompts, strict=True) if s == system]
        assert len(mine) < 2 or all(found.beginning(prompt) is not None for prompt in mine)


def test_a_chance_likeness_does_not_shorten_a_system_prompt() -> None:
    """Fails if one prompt that begins as others do, and goes on in another way, makes all of them share little."""
    found, system = SharedPrompts(), np.arange(4 * LEAST)
    for number in range(3):
        found.add((number, 0), np.append(system, number))
    found.add((3, 0), np.append(system[:LEAST], np.full(99, -1)))
    beginning = found.beginning(np.append(system, 7))
    assert beginning is not None and np.array_equal(beginning, system)
