"""The paged engine against a plain loop that forwards everything again for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atpo_fast.engines.base import Completion, Request, SamplingParams
from atpo_fast.engines.paged import batching, kv_cache, prefill
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.engines.sampling import uniforms
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.engine_requests import VOCABULARY, check_logprobs, grow, request, roots
from tests.helpers.small_tokenizers import numbered

EOS, STOP = 0, 1
SIZES = dict(
    vocab_size=VOCABULARY + 2,  # padded, as real embeddings are
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.3,
)
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
}


def make_model(family: str = "qwen3", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return FAMILIES[family]().to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return numbered(VOCABULARY)


def make_engine(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel | None = None, **options: Any
) -> PagedEngine:
    return PagedEngine(model or make_model(), tokenizer, **{"cache_tokens": 100_000, **options})


def plain_loop(
    model: PreTrainedModel, ask: Request, answer: Sequence[int]
) -> tuple[list[int], list[float], list[float]]:
    """Tokens, log-probs of the distribution drawn from, and log-probs of the policy; everything is forwarded again.

    One forward over the prompt and the engine's answer has the logits of every token as long as the answer is right;
    at the first token that is not, the loop ends, and so it does one token after an answer that ended too early.
    """
    params, prompt = ask.sampling, list(ask.prompt_ids)
    with torch.no_grad():
        every = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 :]
    tokens: list[int] = []
    drawn, policy = [], []
    for index, logits in enumerate(every.double().numpy()[: params.max_new_tokens]):
        logp = np.log(np.exp(x := logits / (params.temperature or 1.0) - logits.max()) / np.exp(x).sum())
        order = np.argsort(-logp, kind="stable")
        order = order[order < VOCABULARY]  # rows beyond the tokenizer are never drawn
        kept = order[: params.top_k or None]
        probs = np.exp(logp[kept]) / np.exp(logp[kept]).sum()
        kept = kept[np.concatenate([[0.0], probs.cumsum()[:-1]]) < params.top_p]
        if params.temperature == 0:
            token, logprob = int(order[0]), logp[order[0]] - np.log(np.exp(logp[order]).sum())
        else:
            if params.top_k == 0 and params.top_p == 1.0:
                kept = np.sort(kept)  # untruncated draws go through the vocabulary in order of the ids
            cdf = np.exp(logp[kept]).cumsum()
            number = uniforms(np.array([ask.seed], dtype=np.uint64), np.array([index]))[0]
            token = int(kept[np.searchsorted(cdf, number * cdf[-1], side="right")])
            logprob = logp[token] - np.log(cdf[-1])
        tokens.append(token)
        drawn.append(logprob)
        policy.append(logp[token])
        if token == EOS or (token == STOP and "</search>" in params.stop) or [token] != list(answer[index : index + 1]):
            break
    return tokens, drawn, policy


def snapshot(trees: Sequence[TurnTree]) -> list[tuple[int, list[int], list[int]]]:
    return [(t.parent, t.action_ids.tolist(), t.observation_ids.tolist()) for tree in trees for t in tree.turns]


# Wrong slots, positions, masks, head grouping, sampling order or stop handling all change tokens or log-probs.
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=8, temperature=0.0),
        SamplingParams(max_new_tokens=12, temperature=0.8, stop=("</search>",)),
        SamplingParams(max_new_tokens=8, temperature=1.3, top_k=12, top_p=0.8),
    ],
    ids=["greedy", "sampled", "truncated"],
)
def test_equals_full_recomputation(family: str, params: SamplingParams, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer, make_model(family))
    plain = make_model(family)
    asks = [request(t, f"t{i}", 0, s, params, 9 * i + s) for i, t in enumerate(roots(4)) for s in (1, 2, 3)]
    for ask, answer in zip(asks, engine.generate(asks), strict=True):
        tokens, drawn, policy = plain_loop(plain, ask, answer.token_ids)
        assert answer.token_ids == tokens
        np.testing.assert_allclose(answer.logprobs, drawn, atol=1e-10)
        np.testing.assert_allclose(answer.policy_logprobs, policy, atol=1e-10)
        ends = {EOS: "eos", STOP: "stop" if params.stop else "length"}
        assert answer.finish_reason == ends.get(tokens[-1], "length")
        assert answer.stop == ("</search>" if answer.finish_reason == "stop" else None)


# float32 is what training uses: log-probs must come from float32 logits.
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_float32_logprobs_equal_a_separate_forward(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer, make_model(family, torch.float32))
    plain = make_model(family, torch.float32)
    trees = roots(5)
    grow(engine, trees)
    check_logprobs(plain, trees, 1e-5)


# An entry made twice (sibling, next turn, expansion round), or a token forwarded twice, breaks these counts.
def test_every_tree_token_is_prefilled_once(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer)
    trees = roots(6)
    asked = grow(engine, trees, rounds=3)
    turns = [turn for tree in trees for turn in tree.turns]
    unique = sum(tree.unique_tokens for tree in trees)
    assert max(len(tree.path(leaf)) for tree in trees for leaf in tree.leaves) >= 4
    counters = engine.counters
    assert counters.prefilled_tokens == unique
    assert counters.decoded_tokens == sum(len(turn.action_ids) for turn in turns)
    assert counters.forwarded_tokens == unique - sum(not turn.children for turn in turns)
    prompts = sum(len(ask.prompt_ids) for ask in asked)
    assert counters.cache_hit_tokens == prompts - (unique - counters.decoded_tokens)
    assert counters.evicted_tokens == 0
    ended = {(f"t{i}", n) for i, tree in enumerate(trees) for n, t in enumerate(tree.turns) if t.finish_reason == "eos"}
    assert ended and not ended & set(engine.cache.nodes)  # nobody continues them: their slots are free at once
    check_logprobs(make_model(), trees, 1e-10)
    for index in range(len(trees)):
        engine.release(f"t{index}")
    assert engine.cache.available == engine.cache.pool.limit and not engine.cache.nodes


@cache
def uncut() -> list[TurnTree]:
    """The trees that an engine writes which has room for all of them; their log-probs are those of whole paths."""
    trees = roots(6)
    grow(make_engine(numbered(VOCABULARY)), trees)
    check_logprobs(make_model(), trees, 1e-10)
    return trees


# Every variant must write the same trees: batching, admission in waves, order, eviction, chunked prefill, and
# attention in many groups change nothing but the work done.
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 5},
        {"shuffle": 1},
        {"cache_tokens": 400},  # some trees must be evicted between turns
        {"cache_tokens": 75},  # running requests must be sent back as well
        {"small_pieces": 1},
    ],
    ids=lambda options: "-".join(f"{key}{value}" for key, value in options.items()),
)
def test_results_do_not_depend_on_how_the_work_is_cut(
    options: dict[str, int], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uncut()
    if options.pop("small_pieces", 0):
        monkeypatch.setattr(kv_cache, "_SMALLEST_POOL", 16)  # grows many times, and must keep what it holds
        monkeypatch.setattr(prefill, "_TOKENS_PER_FORWARD", 7)
        monkeypatch.setattr(prefill, "_SCORES_PER_GROUP", 64)
        monkeypatch.setitem(batching._KEYS_PER_GROUP, "cpu", 50)
    shuffle = bool(options.pop("shuffle", 0))
    engine = make_engine(tokenizer, **options)
    trees = roots(6)
    grow(engine, trees, shuffle=shuffle)
    assert snapshot(trees) == snapshot(expected)
    for tree, other in zip(trees, expected, strict=True):
        for turn, same in zip(tree.turns[1:], other.turns[1:], strict=True):
            np.testing.assert_allclose(turn.logprobs, same.logprobs, atol=1e-10)
    unique = sum(tree.unique_tokens for tree in trees)
    assert unique > 400  # so that the small caches are too small
    if "cache_tokens" in options:
        assert engine.counters.evicted_tokens > 0
        assert engine.counters.prefilled_tokens > unique
        assert max(len(layer) for layer in engine.cache.pool.layers.values()) <= options["cache_tokens"]
    else:
        assert engine.counters.prefilled_tokens == unique
    for index in range(len(trees)):
        engine.release(f"t{index}")
    assert engine.cache.available == engine.cache.pool.limit  # no slot is lost or freed twice


def drain(engine: PagedEngine) -> dict[Any, Completion]:
    """Poll until nothing is in flight."""
    done: dict[Any, Completion] = {}
    while engine.in_flight:
        done.update(engine.poll())
    return done


# Requests that join while others decode must sample what they sample alone, and reuse the rows of the table: fails if
# an index is handed out twice or kept for ever, a row keeps the counts of the one before it, or stops get mixed up.
@pytest.mark.parametrize("batch_size", [3, 100])
def test_requests_join_while_others_decode(batch_size: int, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    asks = [
        request(tree, f"t{i}", 0, n, SamplingParams(max_new_tokens=int(rng.integers(1, 12)), stop=stop), 7 * i + n)
        for i, tree in enumerate(roots(12))
        for n, stop in enumerate([("</search>",), (), ("w3", "</search>")], start=1)
    ]
    plain = make_model()
    engine = make_engine(tokenizer, batch_size=batch_size)
    done: dict[Any, Completion] = {}
    sizes: list[int] = []
    for begin in range(0, len(asks), 2):
        engine.submit(asks[begin : begin + 2])
        for _ in range(3):
            done.update(engine.poll())
            if engine._batch is not None:
                sizes.append(len(engine._batch.table.requests))
    done.update(drain(engine))
    assert engine.poll() == [] and engine._batch is None
    for ask in asks:
        answer = done.pop(ask.turn_key)
        if ask.sampling.stop != ("w3", "</search>"):
            tokens, drawn, _ = plain_loop(plain, ask, answer.token_ids)
            assert answer.token_ids == tokens
            np.testing.assert_allclose(answer.logprobs, drawn, atol=1e-10)
        else:
            assert answer.token_ids == make_engine(tokenizer).generate([ask])[0].token_ids
    assert not done and max(sizes) <= min(batch_size, 20) < len(asks)
    unique = sum(len(tree.turns[0].observation_ids) for tree in roots(12)) + engine.counters.decoded_tokens
    assert engine.counters.prefilled_tokens == unique
    for index in range(12):
        engine.release(f"t{index}")
    assert engine.cache.available == engine.cache.pool.limit


# A tree released in mid-flight takes its requests along, waiting or decoding, and nothing of the others: fails if a
# slot is lost, a path stays pinned, or a neighbour's sample changes.
def test_release_drops_requests_in_flight(tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(max_new_tokens=15)
    asks = [request(t, f"t{i}", 0, s, params, 9 * i + s) for i, t in enumerate(roots(4)) for s in (1, 2, 3)]
    engine = make_engine(tokenizer, batch_size=8)
    engine.submit(asks)
    early = dict(engine.poll())
    engine.release("t0")  # decoding
    engine.release("t3")  # waiting
    done = early | drain(engine)
    whole = {ask.turn_key: answer for ask, answer in zip(asks, make_engine(tokenizer).generate(asks), strict=True)}
    for key, answer in done.items():
        assert answer.token_ids == whole[key].token_ids
    assert {key for key in whole if key[0] in ("t1", "t2")} == {key for key in done if key[0] in ("t1", "t2")}
    assert not {key for key in done if key[0] == "t3"}
    engine.submit(asks[:1])
    engine.release("t0")
    assert engine._batch is None and engine.poll() == []
    for index in range(4):
        engine.release(f"t{index}")
    assert engine.cache.available == engine.cache.pool.limit and not engine.cache.nodes


# Weights or memory must not change under requests in flight, and a failure must leave none behind.
def test_requests_in_flight_are_protected(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer, cache_tokens=32)
    fits = request(TurnTree([3, 4]), "a", 0, 1, SamplingParams(max_new_tokens=3, temperature=0.0))
    engine.submit([fits])
    for change in (engine.sleep, engine.reset_prefix_cache, lambda: engine.update_weights([])):
        with pytest.raises(RuntimeError, match="1 requests are in flight"):
            change()
    with pytest.raises(ValueError, match="requested already"):
        engine.submit([request(TurnTree([3, 4]), "b", 0, 1, fits.sampling), fits])
    engine.submit([request(TurnTree(np.full(40, 5)), "c", 0, 1, fits.sampling)])
    with pytest.raises(ValueError, match="cache_tokens=32"):
        drain(engine)
    assert engine.poll() == [] and engine.cache.available == engine.cache.pool.limit
    (answer,) = engine.generate([fits])
    assert answer.token_ids == plain_loop(make_model(), fits, answer.token_ids)[0]


# After a shortage of room the batch grows back: fails if it stays at the size that once fitted.
def test_the_batch_grows_again_after_a_shortage(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, params = make_engine(tokenizer, cache_tokens=60), SamplingParams(max_new_tokens=12)
    asks = [request(tree, f"t{i}", 0, 1, params, i) for i, tree in enumerate(roots(40, lengths=(3, 6)))]
    plain = make_model()
    engine.submit(asks)
    limits: list[int] = []
    done: dict[Any, Completion] = {}
    while engine.in_flight:
        assert engine._batch is not None
        limits.append(engine._batch.limit)
        done.update(engine.poll())
    assert engine.counters.evicted_tokens > 0 and min(limits) < 10
    assert any(later == now + 1 for now, later in pairwise(limits))
    for ask in asks:
        answer = done[ask.turn_key].token_ids
        assert answer == plain_loop(plain, ask, answer)[0]


# A request larger than the whole cache must say so instead of looping for ever; the engine stays usable.
@pytest.mark.parametrize(("prompt", "tokens"), [(40, 5), (25, 30)], ids=["prompt", "decoding"])
def test_request_that_cannot_fit_names_the_budget(prompt: int, tokens: int, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer, cache_tokens=32)
    tree = TurnTree(np.full(prompt, 5))
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0)
    with pytest.raises(ValueError, match=r"needs at least \d+ cache entries.*cache_tokens=32"):
        engine.generate([request(tree, "t", 0, 1, params)])
    small = request(TurnTree([3, 4]), "t", 0, 1, SamplingParams(max_new_tokens=3))
    (answer,) = engine.generate([small])
    assert answer.token_ids == plain_loop(make_model(), small, answer.token_ids)[0]


# Stale entries, a forgotten tied head, or weights copied into the wrong place fail here.
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("with_head", [True, False])
def test_update_weights(family: str, with_head: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    engine, new = make_engine(tokenizer, make_model(family)), make_model(family, seed=1)
    ask = request(roots(1)[0], "t", 0, 1, SamplingParams(max_new_tokens=10))
    before = engine.generate([ask])[0]
    weights = dict(new.named_parameters(remove_duplicate=False))
    if not with_head:
        weights.pop("lm_head.weight")
    if not with_head and family == "llama":  # not tied: it has to come
        with pytest.raises(ValueError, match=r"lack 1 parameters: lm_head\.weight"):
            engine.update_weights(weights.items())
        return
    engine.update_weights((name, tensor.clone()) for name, tensor in weights.items())
    assert not engine.cache.nodes
    after = engine.generate([ask])[0]
    assert after.logprobs != before.logprobs
    assert after.token_ids == plain_loop(new, ask, after.token_ids)[0]
    wrong: list[tuple[str, Tensor]] = [("model.norm.weight", torch.zeros(3))]
    with pytest.raises(ValueError, match=r"model\.norm\.weight: new weights have shape \(3,\), not \(32,\)"):
        engine.update_weights(wrong)
    with pytest.raises(KeyError, match=r"nearest: 'model\.norm\.weight'"):
        engine.update_weights([("model.norm.weigth", torch.zeros(32))])


# The engine must neither touch the configuration of another model nor lose its own weights in its sleep.
def test_sleep_wake_and_the_other_model(tokenizer: PreTrainedTokenizerFast) -> None:
    config = Qwen3Config(**SIZES)
    trainer, own = Qwen3ForCausalLM(config).double(), Qwen3ForCausalLM(config).double()
    engine = make_engine(tokenizer, own)
    engine.update_weights(trainer.named_parameters())
    assert trainer.config._attn_implementation != own.config._attn_implementation
    ask = request(roots(1)[0], "t", 0, 1, SamplingParams(max_new_tokens=10))
    first = engine.generate([ask])[0]
    engine.sleep()
    assert not engine.cache.pool.layers
    with pytest.raises(RuntimeError, match="wake"):
        engine.generate([ask])
    engine.wake()
    assert engine.generate([ask])[0] == first
    assert first.token_ids == plain_loop(trainer.eval(), ask, first.token_ids)[0]


# bfloat16 weights: logits must still be float32, or log-probs come in coarse steps.
def test_low_precision_head_gives_float32_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer, FAMILIES["qwen3"](), dtype=torch.bfloat16)
    own = engine.model.model
    assert own.dtype == torch.bfloat16
    assert own.model.rotary_emb.inv_freq.dtype == torch.float32  # or positions beyond 256 become inexact
    hidden = torch.randn(4, 32, dtype=torch.bfloat16)
    logits = engine.model.logits(hidden)
    torch.testing.assert_close(logits, hidden.float() @ own.lm_head.weight.float().T)
    answer = engine.generate([request(roots(1)[0], "t", 0, 1, SamplingParams(max_new_tokens=4))])[0]
    assert np.isfinite(answer.logprobs).all()


# Requests that would corrupt the cache are refused before anything is written.
def test_contradicting_requests_are_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make_engine(tokenizer)
    params = SamplingParams(max_new_tokens=3, temperature=0.0)
    tree = TurnTree([5, 6, 7])
    good = request(tree, "t", 0, 1, params)
    with pytest.raises(ValueError, match="requested already"):
        engine.generate([good, good])
    with pytest.raises(ValueError, match="do not fit its 2 prompt"):
        engine.generate([Request(prompt_ids=[5, 6], sampling=params, seed=0, path=good.path, turn_key=("t", 1))])
    with pytest.raises(ValueError, match="token ids must be in"):
        engine.generate([request(TurnTree([5, 99]), "u", 0, 1, params)])
    engine.generate([good])
    with pytest.raises(ValueError, match="token 2 of the path is 8, but was 7"):
        engine.generate([request(TurnTree([5, 6, 8]), "t", 0, 2, params)])
    assert engine.generate([]) == []
