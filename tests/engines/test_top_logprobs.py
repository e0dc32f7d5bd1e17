"""Log-probs of the likeliest candidates: the paged engine against a plain forward, and nothing where nobody asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atpo_fast.engines.base import PathNode, Request, SamplingParams
from atpo_fast.engines.paged import PagedEngine, batching
from tests.rollout.test_tree_search import SMALL, real_model


def request(number: int, top_logprobs: int, **sampling: Any) -> Request:
    ids = SMALL.encode(" one two?\n" * (number + 1), add_special_tokens=False)
    tree = f"tree {number}"
    return Request(
        prompt_ids=ids,
        sampling=SamplingParams(max_new_tokens=24, top_logprobs=top_logprobs, **sampling),
        seed=number,
        path=(PathNode(key=(tree, 0), end=len(ids)),),
        turn_key=(tree, 1),
    )


def test_candidates_are_those_of_a_plain_forward() -> None:
    # Requests that ask for different numbers, and for none, at different temperatures, decoded together. Fails if rows
    # are mixed up, if the temperature is left out, if truncation enters, or if the drawn token is missing or doubled.
    asked = [
        request(0, 10),
        request(1, 0),
        request(2, 3, temperature=0.7),
        request(3, 10, temperature=1.5, top_k=2),
        request(4, 5, temperature=0.0),
        request(5, 1),
    ]
    completions = PagedEngine(real_model(), SMALL, cache_tokens=4096).generate(asked)
    outside = 0
    for wanted, answer in zip(asked, completions, strict=True):
        count, temperature = wanted.sampling.top_logprobs, wanted.sampling.temperature or 1.0
        if not count:
            assert answer.top_logprobs is None
            continue
        ids = torch.tensor([*wanted.prompt_ids, *answer.token_ids])
        with torch.no_grad():
            logp = torch.log_softmax(real_model()(ids[None]).logits[0] / temperature, dim=-1)
        assert answer.top_logprobs is not None and len(answer.top_logprobs) == len(answer.token_ids)
        for place, (token, found) in enumerate(zip(answer.token_ids, answer.top_logprobs, strict=True)):
            row = logp[len(wanted.prompt_ids) - 1 + place]
            best = row.topk(count)
            expected = best.values.tolist()
            if token not in best.indices.tolist():
                expected.append(float(row[token]))
                outside += 1
            assert found == pytest.approx(expected, abs=1e-9)  # float64
            assert answer.policy_logprobs[place] in found or token in best.indices.tolist()
    assert outside > 5


def test_nothing_is_looked_up_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if a roll-out without candidates pays for them: with a look-up, or with room for their log-probs.
    looked: list[int] = []
    monkeypatch.setattr(batching, "candidate_logprobs", lambda *given: looked.append(1))
    engine = PagedEngine(real_model(), SMALL, cache_tokens=4096)
    engine.submit([request(0, 0), request(1, 0)])
    finished = engine.poll()
    assert engine._batch is not None and engine._batch.table.top_logprobs.nbytes == 0
    while engine.in_flight:
        finished += engine.poll()
    assert len(finished) == 2 and not looked and all(answer.top_logprobs is None for _, answer in finished)


def test_rows_that_others_had_keep_nothing_of_them() -> None:
    # One request after another in the same row, and a cache in which some begin again. Fails if candidates of the
    # request before, which asked for more of them, stay in the table.
    asked = [request(number, count) for number, count in enumerate((10, 3, 6, 1))]
    roomy = PagedEngine(real_model(), SMALL, cache_tokens=4096).generate(asked)
    lone = PagedEngine(real_model(), SMALL, cache_tokens=4096, batch_size=1)
    tight = PagedEngine(real_model(), SMALL, cache_tokens=sum(len(one.prompt_ids) for one in asked) + 30)
    for engine in (lone, tight):
        for one, other in zip(roomy, engine.generate(asked), strict=True):
            assert one.token_ids == other.token_ids and one.top_logprobs is not None and other.top_logprobs is not None
            for ours, theirs in zip(one.top_logprobs, other.top_logprobs, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert tight.counters.evicted_tokens > 0
