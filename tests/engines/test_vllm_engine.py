"""The vllm engine on CPU against Hugging Face and the stop automaton (`make test-vllm`; skipped without vLLM)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from atpo_fast.config import VLLMConfig
from atpo_fast.engines.base import Completion, EngineCounters, SamplingParams
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.engines.sampling import SamplingTable, truncate
from atpo_fast.engines.vllm.engine import VLLMEngine
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.engine_requests import check_logprobs, grow, request, roots
from tests.helpers.small_tokenizers import byte_level, first_stop

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (`make test-vllm` does)")

TOKENIZER = byte_level()
SIZES: dict[str, Any] = dict(
    vocab_size=-(-len(TOKENIZER) // 8) * 8,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # what vLLM's attention on CPU takes
    max_position_embeddings=512,
    initializer_range=0.2,
)
FREE = SamplingParams(max_new_tokens=40)


def make_model(tied: bool = True, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if tied:
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


def make_engine(folder: Path, model: PreTrainedModel, **options: object) -> VLLMEngine:
    model.save_pretrained(folder)
    settings = {"cache_tokens": 20_000, "max_positions": 512} | options
    return VLLMEngine(folder, TOKENIZER, VLLMConfig(), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> VLLMEngine:
    return make_engine(tmp_path_factory.mktemp("tied"), make_model(), truncates=True)


@pytest.fixture
def engine(shared: VLLMEngine) -> Iterator[VLLMEngine]:
    """The engine with an empty cache and its first weights."""
    shared.counters = EngineCounters()
    shared.update_weights(make_model().named_parameters())
    yield shared
    assert not shared._writings and not shared._llm.llm_engine.has_unfinished_requests()


def samples(engine: VLLMEngine, params: SamplingParams, count: int, name: str, seed: int = 0) -> list[Completion]:
    tree = roots(1, seed=seed)[0]
    return engine.generate([request(tree, name, 0, i + 1, params, seed=seed + i) for i in range(count)])


# ---- tokens and log-probs


# Fails for log-probs of another distribution or position, a wrong prefix in the cache, or half-precision logits.
def test_logprobs_are_those_of_a_separate_forward(engine: VLLMEngine) -> None:
    trees = roots(6, lengths=(40, 120))
    grow(engine, trees)
    assert max(len(tree.path(leaf)) for tree in trees for leaf in tree.leaves) >= 4
    check_logprobs(make_model(), trees, 1e-4)


def test_more_prompts_than_one_forward_takes(engine: VLLMEngine) -> None:
    """Fails if a prompt of a request with a seed is prefilled in pieces, after which vLLM on a CPU cannot go on."""
    trees = roots(30, lengths=(240, 260))
    asks = [request(tree, f"t{i}", 0, 1, SamplingParams(max_new_tokens=2), i) for i, tree in enumerate(trees)]
    assert sum(len(ask.prompt_ids) for ask in asks) > 4096
    assert all(1 <= len(answer.token_ids) <= 2 for answer in engine.generate(asks))


def test_greedy_decoding_is_that_of_the_paged_engine(engine: VLLMEngine) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.0, stop=("é",))
    other = PagedEngine(make_model(), TOKENIZER, cache_tokens=10_000)
    asks = [request(tree, f"t{i}", 0, 1, params) for i, tree in enumerate(roots(5))]
    for ours, theirs in zip(engine.generate(asks), other.generate(asks), strict=True):
        assert (ours.token_ids, ours.finish_reason, ours.stop) == (
            theirs.token_ids,
            theirs.finish_reason,
            theirs.stop,
        )
        np.testing.assert_allclose(ours.policy_logprobs, theirs.policy_logprobs, atol=1e-4)


def test_rows_without_a_token_are_never_sampled(tmp_path: Path) -> None:
    """Fails if a fifth of the tokens has no text, or a turn that goes on after one has other log-probs."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": 5 * len(TOKENIZER) // 4, "initializer_range": 0.02}))
    engine = make_engine(tmp_path, model.eval(), truncates=True)
    trees = roots(4, lengths=(40, 60))
    grow(engine, trees)
    assert max(int(turn.action_ids.max()) for tree in trees for turn in tree.turns[1:]) < len(TOKENIZER)
    check_logprobs(model, trees, 1e-4)
    for params in (SamplingParams(max_new_tokens=20, temperature=0.0), SamplingParams(max_new_tokens=20, top_p=0.9)):
        for done in samples(engine, params, 8, str(params)):
            assert max(done.token_ids) < len(TOKENIZER) and len(done.policy_logprobs) == len(done.token_ids)
    engine.close()


# Fails if another position's or another temperature's candidates come, or the drawn token is left out.
def test_candidates_are_those_of_the_paged_engine(engine: VLLMEngine) -> None:
    other = PagedEngine(make_model(), TOKENIZER, cache_tokens=10_000)
    params = SamplingParams(max_new_tokens=12, temperature=0.0, top_logprobs=10)
    asks = [request(tree, f"t{i}", 0, 1, params) for i, tree in enumerate(roots(3))]
    for ours, theirs in zip(engine.generate(asks), other.generate(asks), strict=True):
        assert ours.top_logprobs is not None and theirs.top_logprobs is not None
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(np.sort(ours.top_logprobs), np.sort(theirs.top_logprobs), atol=1e-4)
    (plain,) = engine.generate([request(roots(1)[0], "u", 0, 1, SamplingParams(max_new_tokens=3))])
    assert plain.top_logprobs is None
    drawn = SamplingParams(max_new_tokens=40, temperature=1.5, top_logprobs=10)
    (answer,) = engine.generate([request(roots(1)[0], "v", 0, 1, drawn)])
    for logprob, candidates in zip(answer.policy_logprobs, answer.top_logprobs or (), strict=True):
        assert len(candidates) in (10, 11) and logprob in candidates


# Both log-probs of a truncated sample against their definitions: fails if another token's or request's kept probability
# is added, or truncation comes before temperature. Untruncated and greedy requests in the same batch keep theirs.
def test_truncated_sampling_reports_both_logprobs(engine: VLLMEngine) -> None:
    model, tree = make_model(), roots(1)[0]
    kinds = [
        SamplingParams(max_new_tokens=20, temperature=0.7, top_k=9, top_p=0.8),
        SamplingParams(max_new_tokens=15, temperature=1.4, top_k=5),
        SamplingParams(max_new_tokens=10, temperature=1.1),
        SamplingParams(max_new_tokens=10, temperature=0.0, top_k=3),
        SamplingParams(max_new_tokens=25, temperature=1.3, top_p=0.5),
    ]
    asks = [request(tree, "t", 0, i + 1, kinds[i % len(kinds)], seed=i) for i in range(15)]
    for ask, answer in zip(asks, engine.generate(asks), strict=True):
        params, ids = ask.sampling, torch.tensor([*ask.prompt_ids, *answer.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, len(ask.prompt_ids) - 1 : -1]
        logp = torch.log_softmax(logits / (params.temperature or 1.0), -1)
        chosen = torch.tensor(answer.token_ids)[:, None]
        policy = logp.gather(1, chosen)[:, 0]
        np.testing.assert_allclose(answer.policy_logprobs, policy, atol=1e-4)
        if params.temperature == 0:
            np.testing.assert_allclose(answer.logprobs, policy, atol=1e-4)
            continue
        rows = len(chosen)
        table = SamplingTable(np.ones(rows), np.full(rows, params.top_k), np.full(rows, params.top_p))
        weights, tokens = truncate(logp, table)
        drawn = (weights * (tokens == chosen)).sum(-1) / weights.sum(-1)
        assert (drawn > 0).all()
        np.testing.assert_allclose(answer.logprobs, drawn.log(), atol=1e-4)


def test_samples_depend_on_their_seed_alone(engine: VLLMEngine) -> None:
    # Fails if seeds are dropped, or mixed up between the requests of a batch. (PyTorch uses 32 bits of them on CPU.)
    tree = roots(1)[0]
    seeds = [5, 6, (1 << 62) + 7, 1 << 31]
    batch = engine.generate([request(tree, "a", 0, i, FREE, seed=seed) for i, seed in enumerate(seeds, 1)])
    assert len({tuple(answer.token_ids) for answer in batch}) == 4
    for i, seed in list(enumerate(seeds))[::-1]:
        (alone,) = engine.generate([request(tree, f"b{i}", 0, 1, FREE, seed=seed)])
        assert alone.token_ids == batch[i].token_ids


def test_samples_follow_the_distribution(engine: VLLMEngine) -> None:
    # Fails if the seeds of requests give dependent draws.
    model, tree = make_model(), roots(1, seed=3)[0]
    with torch.no_grad():
        probs = model(input_ids=torch.from_numpy(tree.path_ids(0))[None]).logits[0, -1].softmax(-1).numpy()
    params = SamplingParams(max_new_tokens=1)
    rng = np.random.default_rng(0)
    asks = [request(tree, "t", 0, i + 1, params, seed=int(rng.integers(2**62))) for i in range(3000)]
    counts = np.bincount([a.token_ids[0] for a in engine.generate(asks)], minlength=len(probs))
    likely = np.argsort(-probs)[:8]
    error = np.sqrt(3000 * probs[likely] * (1 - probs[likely]))
    assert (np.abs(counts[likely] - 3000 * probs[likely]) < 5 * error).all()


# ---- stops


# The semantics of `stops.py` on vLLM: a completion ends with the token that completes the first stop string, whether it
# is spread over tokens, sits inside one, or is a fragment of a character; nothing is lost, added or taken from what
# would have been written without stops.
@pytest.mark.parametrize("stops", [("ch", " a"), ("se", "é", "aw"), ("</", ">"), "spread"])
def test_completions_end_with_the_first_stop(engine: VLLMEngine, stops: tuple[str, ...] | str) -> None:
    free = samples(engine, FREE, 60, "free")
    if isinstance(stops, str):
        stops = spread_stops([answer.token_ids for answer in free[:5]])
        assert len(stops) >= 3
    cut = samples(engine, SamplingParams(max_new_tokens=40, stop=stops), 60, "cut")
    for whole, part in zip(free, cut, strict=True):
        assert part.token_ids == whole.token_ids[: len(part.token_ids)]
        assert len(part.logprobs) == len(part.policy_logprobs) == len(part.token_ids)
        found = first_stop(TOKENIZER, whole.token_ids, stops)
        if part.finish_reason == "stop":
            assert found == (len(part.token_ids) - 1, part.stop)
        else:
            assert found is None or TOKENIZER.eos_token_id in whole.token_ids
            assert part.token_ids == whole.token_ids and part.finish_reason == whole.finish_reason
    assert sum(part.finish_reason == "stop" for part in cut) >= 3


def spread_stops(completions: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Strings that begin in one token of a completion and end in the next."""
    found = []
    for ids in completions:
        texts = [TOKENIZER.decode([token]) for token in ids]
        pairs = pairwise(texts[5:])
        found += [one[-1] + two[0] for one, two in pairs if one and two and (one + two).isascii()][:1]
    return tuple(dict.fromkeys(found))


def test_end_of_sequence_and_length(engine: VLLMEngine) -> None:
    # Fails if the end-of-sequence token is dropped, or taken from the model's configuration instead of the tokenizer.
    tree = roots(1)[0]
    likely = make_model()
    with torch.no_grad():
        likely.get_output_embeddings().weight[TOKENIZER.eos_token_id] = 0
    engine.update_weights(likely.named_parameters())
    answers = engine.generate([request(tree, "t", 0, i, FREE, seed=i) for i in range(1, 80)])
    ended = [answer for answer in answers if answer.finish_reason == "eos"]
    assert ended and all(answer.token_ids[-1] == TOKENIZER.eos_token_id and answer.stop is None for answer in ended)
    for answer in answers:
        assert answer.token_ids.count(TOKENIZER.eos_token_id) == (answer.finish_reason == "eos")
        assert (len(answer.token_ids) == 40) or answer.finish_reason == "eos"


# ---- the cache


# What the issue promises: siblings, later turns and expansion rounds prefill no shared full block again.
def test_no_full_block_is_prefilled_twice(engine: VLLMEngine) -> None:
    trees = roots(6, lengths=(40, 120))
    asked = grow(engine, trees, rounds=3)
    counters, block = engine.counters, engine.block_size
    unique = sum(tree.unique_tokens for tree in trees)
    assert counters.decoded_tokens == sum(len(turn.action_ids) for tree in trees for turn in tree.turns)
    assert counters.evicted_tokens == 0  # no known full block was missed
    assert unique < counters.prefilled_tokens <= unique + block * len(asked)
    prompts = sum(len(ask.prompt_ids) for ask in asked)
    assert counters.cache_hit_tokens + counters.prefilled_tokens == prompts + counters.decoded_tokens
    assert counters.forwarded_tokens == counters.prefilled_tokens - len(asked)


def test_siblings_of_one_call_share_the_prompt(engine: VLLMEngine) -> None:
    tree = TurnTree(np.arange(100) % 200 + 5)
    engine.generate([request(tree, "t", 0, i, SamplingParams(max_new_tokens=2)) for i in range(1, 9)])
    assert engine.counters.cache_hit_tokens == 7 * 96  # three of its blocks are full


def test_a_small_cache_costs_prefill_and_is_counted(tmp_path: Path) -> None:
    small = make_engine(tmp_path, make_model(), cache_tokens=600)
    trees = roots(6, lengths=(40, 120))
    grow(small, trees)
    assert small.counters.evicted_tokens > 0
    check_logprobs(make_model(), trees, 1e-4)


def test_vllm_is_told_to_stop(engine: VLLMEngine) -> None:
    # Fails if a request is decoded on to its length after its stop has been found.
    (answer,) = samples(engine, SamplingParams(max_new_tokens=400, stop=("a", "e", "s", "c")), 1, "t")
    assert answer.finish_reason == "stop" and len(answer.token_ids) < 100
    assert not engine._llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("merged", [True, False])
def test_tokens_after_a_stop_are_dropped(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, merged: bool) -> None:
    # With asynchronous scheduling, on GPU, vLLM is a token ahead when it is told to stop: here every poll takes two
    # steps, whose outputs come one by one or as one.
    params = [
        SamplingParams(max_new_tokens=40, stop=("ch", " a", "se")),
        SamplingParams(max_new_tokens=40, temperature=0.9, top_k=20, stop=(" a",)),
    ]
    expected = [samples(engine, one, 30, f"a{one.top_k}") for one in params]
    inner = engine._llm.llm_engine
    step = inner.step

    def two_steps() -> list[Any]:
        first = step()
        then = {output.request_id: output for output in step()}
        for output in first if merged else []:
            if later := then.pop(output.request_id, None):
                (news,), (more,) = output.outputs, later.outputs
                news.token_ids = [*news.token_ids, *more.token_ids]
                news.logprobs = [*news.logprobs, *more.logprobs]
                output.finished, news.finish_reason = later.finished, more.finish_reason
        return [*first, *then.values()]

    with monkeypatch.context() as patch:
        patch.setattr(inner, "step", two_steps)
        ahead = [samples(engine, one, 30, f"b{one.top_k}") for one in params]
    for one, other in zip(chain(*expected), chain(*ahead), strict=True):
        assert (one.token_ids, one.finish_reason, one.stop) == (other.token_ids, other.finish_reason, other.stop)
        np.testing.assert_allclose(one.policy_logprobs, other.policy_logprobs, atol=1e-4)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


# ---- in flight


def test_a_released_tree_is_no_longer_in_flight(engine: VLLMEngine) -> None:
    one, two = roots(2)
    engine.submit([request(one, "one", 0, 1, FREE), request(two, "two", 0, 1, FREE)])
    assert engine.poll() == []
    engine.release("one")
    keys = []
    while engine._writings:
        keys += [key for key, _ in engine.poll()]
    assert keys == [("two", 1)] and engine.poll() == []
    engine.generate([request(one, "one", 0, 1, FREE)])


def test_refused_requests_leave_nothing_behind(engine: VLLMEngine) -> None:
    tree = roots(1)[0]
    good = request(tree, "t", 0, 1, FREE)
    with pytest.raises(ValueError, match="requested already"):
        engine.submit([good, good])
    with pytest.raises(ValueError, match="token ids must be in"):
        engine.submit([good, request(TurnTree([5, SIZES["vocab_size"]]), "u", 0, 1, FREE)])
    with pytest.raises(ValueError, match="leaves no room for a turn"):
        engine.submit([good, request(TurnTree(np.full(512, 5)), "u", 0, 1, FREE)])
    assert not engine._writings
    (answer,) = engine.generate([good])
    node = tree.add_turn(0, answer.token_ids, answer.logprobs, [7, 8], finish_reason="stop")
    wrong = request(tree, "t", node, 2, FREE)
    at = len(tree.path_ids(0)) + 3
    wrong.prompt_ids = [*wrong.prompt_ids[:at], 300, *wrong.prompt_ids[at + 1 :]]
    with pytest.raises(ValueError, match=rf"token {at} of the path is 300, but was {answer.token_ids[3]} \(token 3"):
        engine.generate([wrong])
    engine.generate([request(tree, "t", node, 2, FREE)])


def test_a_failing_step_leaves_nothing_in_flight(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = roots(1)[0]
    inner = engine._llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(inner, "step", lambda: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.generate([request(tree, "t", 0, 1, FREE)])
    assert not engine._writings
    engine.generate([request(tree, "t", 0, 1, FREE)])


def test_sleeping_engines_refuse_work(engine: VLLMEngine) -> None:
    (first,) = samples(engine, FREE, 1, "a")
    engine.sleep()
    with pytest.raises(RuntimeError, match="wake"):
        samples(engine, FREE, 1, "b")
    engine.wake()
    assert samples(engine, FREE, 1, "b")[0].token_ids == first.token_ids


# ---- weights


def gap(engine: VLLMEngine, model: PreTrainedModel, name: str) -> float:
    """Largest difference of log-probs between the engine and a model."""
    tree = TurnTree(np.arange(70) % 150 + 5)
    engine.generate([request(tree, name, 0, 1, FREE)])  # with what is in the cache
    (answer,) = engine.generate([request(tree, name, 0, 2, FREE, seed=1)])
    ids = torch.tensor([*tree.path_ids(0), *answer.token_ids])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
    rows = torch.arange(69, len(ids) - 1)
    return float(np.abs(logp[rows, ids[rows + 1]].numpy() - answer.logprobs).max())


def reused_memory(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As from ZeRO-3: a tensor is valid until the next one is asked for."""
    for name, parameter in model.named_parameters():
        given = parameter.detach().clone()
        yield name, given
        given.zero_()


# vLLM multiplies with packed copies on CPU: fails if one of them, above all a tied head's, keeps the old weights; or if
# the prefix cache does, or a fused matrix is built of parts that are no longer valid.
@pytest.mark.parametrize("tied", [True, False])
def test_update_weights(engine: VLLMEngine, tmp_path: Path, tied: bool) -> None:
    if not tied:
        engine = make_engine(tmp_path, make_model(tied))
    assert gap(engine, make_model(tied), "a") < 1e-4
    for seed in (1, 2):
        new = make_model(tied, seed=seed)
        hits = engine.counters.cache_hit_tokens
        engine.update_weights(reused_memory(new))
        assert gap(engine, make_model(tied), f"b{seed}") > 0.1
        assert engine.counters.cache_hit_tokens - hits == 64  # the second request's, not the first's
        assert gap(engine, new, f"c{seed}") < 1e-4
    with pytest.raises(ValueError, match=r"lack \d+ parameters: .*model\.embed_tokens\.weight"):
        engine.update_weights([("model.norm.weight", torch.zeros(64))])
    with pytest.raises(ValueError, match="new weights have shape"):
        engine.update_weights([("model.norm.weight", torch.zeros(3))])
    with pytest.raises(KeyError, match="no parameter"):
        engine.update_weights([("model.norm.weigth", torch.zeros(64))])
    engine.update_weights(reused_memory(make_model(tied)))
    assert gap(engine, make_model(tied), "d") < 1e-4


def test_the_environment_of_others_is_left_alone(engine: VLLMEngine) -> None:
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert asdict(engine.counters)["evicted_tokens"] == 0
