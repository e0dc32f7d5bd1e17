"""The paged engine on every family of models: the log-probs of transformers, and every token prefilled once."""

from __future__ import annotations

import pytest

from atpo_fast.engines.paged import batching, prefill
from atpo_fast.engines.paged.engine import PagedEngine
from tests.helpers.engine_requests import VOCABULARY, check_logprobs, grow, roots
from tests.helpers.families import FAMILIES, VOCAB, make
from tests.helpers.hybrid_models import in_float64
from tests.helpers.small_tokenizers import numbered

WITHOUT_STATE = [name for name, family in FAMILIES.items() if "mlp" in family.checkpointing]


@pytest.mark.parametrize("pieces", ["whole", "small"])
@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_logprobs_are_those_of_transformers(name: str, pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a window is of another length or counts from the row's end, keys out of its reach are missing from a
    prefill in pieces, a sink or a cap is left out, logits are made otherwise, or layers of unequal heads mix up.

    One round of expansions is enough: every further one only continues paths as the first does.
    """
    if pieces == "small":
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 7)
        monkeypatch.setattr(prefill, "_SCORES_PER_GROUP", 64)
        monkeypatch.setitem(batching._KEYS_PER_GROUP, "cpu", 50)
    with in_float64():
        engine = PagedEngine(make(name).eval(), numbered(VOCABULARY), cache_tokens=10_000)
        trees = roots(2)
        grow(engine, trees, rounds=1)
        check_logprobs(make(name).eval(), trees, 1e-10)
    assert engine.counters.prefilled_tokens == sum(tree.unique_tokens for tree in trees)
    assert VOCAB > VOCABULARY
