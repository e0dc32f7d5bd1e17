"""States of recurrent layers in the paged engine, one for each turn (docs/design.md#recurrent-layers)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from atpo_fast import Objective, assign_credit, pack_trees
from atpo_fast.engines.base import SamplingParams
from atpo_fast.engines.paged import batching, kv_cache, prefill, states
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.policy import Policy
from atpo_fast.tree.turn_tree import TurnTree
from tests.engines.test_paged_engine import snapshot, tokenizer
from tests.helpers.engine_requests import VOCABULARY, check_logprobs, grow, request, roots
from tests.helpers.hybrid_models import HYBRIDS, in_float64, make_hybrid
from tests.helpers.small_tokenizers import numbered

__all__ = ["tokenizer"]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with in_float64():
        yield


def make_engine(tokenizer: PreTrainedTokenizerFast, name: str, **options: Any) -> PagedEngine:
    return PagedEngine(make_hybrid(name).eval(), tokenizer, **{"cache_tokens": 100_000, **options})


def free_states(engine: PagedEngine) -> tuple[int, int]:
    """Slots of states that can be allocated, and all of them."""
    pool = engine.cache.states
    assert pool is not None
    return pool.available, pool.limit


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_turn_starts_from_the_state_of_the_turn_above(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fails if a sibling starts from a state that another branch has moved, an observation is missing from a state, a
    token is forwarded twice, or a slot is lost."""
    engine, trees = make_engine(tokenizer, name), roots(4)
    grow(engine, trees)
    unique = sum(tree.unique_tokens for tree in trees)
    assert engine.counters.prefilled_tokens == unique and engine.counters.evicted_tokens == 0
    turns = [turn for tree in trees for turn in tree.turns]
    assert engine.counters.forwarded_tokens == unique - sum(not turn.children for turn in turns)
    check_logprobs(make_hybrid(name).eval(), trees, 1e-10)
    for index in range(len(trees)):
        engine.release(f"t{index}")
    assert len(set(free_states(engine))) == 1


@cache
def uncut() -> list[tuple[int, list[int], list[int]]]:
    """The trees that an engine writes which has room for all of them."""
    trees = roots(4)
    grow(make_engine(numbered(VOCABULARY), "qwen3_5"), trees)
    return snapshot(trees)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2}, {"cache_tokens": 150}, {"cache_states": 24}, {"small_pieces": 1}],
    ids=lambda options: "-".join(f"{key}{value}" for key, value in options.items()),
)
def test_results_do_not_depend_on_how_the_work_is_cut(
    options: dict[str, int], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a state is evicted without its tokens, kept by a request that was sent back, or lost when pools grow."""
    expected, trees = uncut(), roots(4)
    if options.pop("small_pieces", 0):
        monkeypatch.setattr(states, "_SMALLEST_POOL", 2)
        monkeypatch.setattr(kv_cache, "_SMALLEST_POOL", 16)
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 7)
        monkeypatch.setitem(batching._KEYS_PER_GROUP, "cpu", 50)
    engine = make_engine(tokenizer, "qwen3_5", **options)
    grow(engine, trees)
    assert snapshot(trees) == expected
    assert (engine.counters.evicted_tokens > 0) == bool({"cache_tokens", "cache_states"} & set(options))
    for index in range(len(trees)):
        engine.release(f"t{index}")
    assert len(set(free_states(engine))) == 1 and engine.cache.available == engine.cache.pool.limit


def test_log_probs_are_the_policy_s(tokenizer: PreTrainedTokenizerFast) -> None:
    """Fails if engine and trainer run a hybrid model differently; Granite's also divides its logits."""
    for name in ("qwen3_5", "granitemoehybrid"):
        trees = roots(3)
        grow(make_engine(tokenizer, name), trees)
        for tree in trees:
            for number, leaf in enumerate(tree.leaves):
                tree.set_reward(leaf, float(number))
        assign_credit(trees)
        (row,) = pack_trees(trees, Objective.preset("at2po"), 10_000, dtype=torch.float64, prune=False)
        with torch.no_grad():
            logprob, _ = Policy(make_hybrid(name))(row)
        np.testing.assert_allclose(logprob, row.rollout_logprob, atol=1e-10)


def test_too_few_states_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    """Fails if a path with more turns than there are states is waited for without end."""
    engine, tree = make_engine(tokenizer, "lfm2", cache_states=2), TurnTree([5, 6])
    tree.add_turn(0, [7, 8], [-1.0, -1.0], [9])
    params = SamplingParams(max_new_tokens=3)
    with pytest.raises(ValueError, match=r"turn \('t', 2\) needs 3 states .* cache_states=2: raise it"):
        engine.generate([request(tree, "t", 1, 2, params)])
    assert engine.generate([request(tree, "t", 0, 1, params)])


def test_requests_that_only_continue_what_is_there(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if slots are handed out beyond the tensors, which grow when they are written: here nothing is prefilled."""
    monkeypatch.setattr(states, "_SMALLEST_POOL", 2)
    engine, (tree,) = make_engine(tokenizer, "qwen3_5"), roots(1)
    params = SamplingParams(max_new_tokens=4)
    engine.generate([request(tree, "t", 0, 1, params, 1)])
    asks = [request(tree, "t", 0, turn, params, turn) for turn in range(2, 9)]
    alone = [make_engine(tokenizer, "qwen3_5").generate([ask])[0] for ask in asks]
    assert [answer.token_ids for answer in engine.generate(asks)] == [answer.token_ids for answer in alone]
