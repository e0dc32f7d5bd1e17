"""What `CheckedEngine` promises, checked on every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from atpo_fast.common.errors import EngineError, is_engine_error
from atpo_fast.config import ServerConfig, VLLMConfig
from atpo_fast.engines.base import CheckedEngine, Completion, PathNode, Request, SamplingParams
from atpo_fast.engines.paged import PagedEngine
from atpo_fast.engines.server.engine import ServerEngine
from atpo_fast.engines.vllm import engine as vllm_engine
from atpo_fast.engines.vllm.engine import VLLMEngine
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer
from atpo_kernels import linear_logprob
from tests.helpers.completions_server import CompletionsServer

TOKENIZER = word_level_tokenizer(split_words(" one two three?\n:Page Tool"))
PROMPT = TOKENIZER.encode(" one two?\n", add_special_tokens=False)
VOCABULARY = len(TOKENIZER)


def make_model(seed: int = 0, padding: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY + padding, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
    ends: dict[str, Any] = dict(eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None, pad_token_id=None)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **ends)).eval()


class StandIn:
    """What the vllm engine uses of `vllm.LLM`: a token for each request and step, with the log-prob -1.

    `draw` says which token, from the parameters of the request and the number of tokens that are left.
    """

    def __init__(self, draw: Callable[[Any, int], int] = lambda sampling, left: PROMPT[0]) -> None:
        self.draw, self.sampling = draw, dict[str, Any]()
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))
        self.left: dict[str, int] = {}

    def add_request(self, name: str, prompt: Any, sampling: Any, lora_request: None = None) -> None:
        self.left[name], self.sampling[name] = sampling.max_tokens, sampling

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.left.pop(name, None)

    def step(self) -> list[Any]:
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            done, token = not self.left[name], self.draw(self.sampling[name], self.left[name])
            if done:
                del self.left[name]
            news = SimpleNamespace(
                token_ids=[token],
                logprobs=[{token: SimpleNamespace(logprob=-1.0)}],
                finish_reason="length" if done else None,
            )
            outputs.append(SimpleNamespace(request_id=name, num_cached_tokens=0, outputs=[news], finished=done))
        return outputs

    def collective_rpc(self, method: str, kwargs: dict[str, Iterable[Any]]) -> None:
        list(kwargs["weights"])

    def reset_prefix_cache(self) -> bool:
        return not self.left


STAND_IN_MODULE = SimpleNamespace(
    SamplingParams=lambda **options: SimpleNamespace(**options),
    sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=None)),
)


def paged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckedEngine]:
    yield PagedEngine(AutoModelForCausalLM.from_pretrained(folder / "model"), TOKENIZER, cache_tokens=1000)


def vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckedEngine]:
    monkeypatch.setattr(vllm_engine, "check_vllm", lambda: Version("0.32.0"))
    monkeypatch.setattr(vllm_engine, "start_llm", lambda *_: (STAND_IN_MODULE, StandIn()))
    yield VLLMEngine(folder / "model", TOKENIZER, VLLMConfig(), cache_tokens=1000, max_positions=128)


def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckedEngine]:
    with CompletionsServer(make_model, TOKENIZER) as replica:
        engine = ServerEngine(
            folder / "model", TOKENIZER, ServerConfig(urls=[replica.url], weights_dir=str(folder / "weights"))
        )
        yield engine
        engine.close()


MAKERS = [paged, vllm, server]
ENGINES = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckedEngine]:
    make_model().save_pretrained(tmp_path / "model")
    made: Callable[..., Iterator[CheckedEngine]] = request.param
    yield from made(tmp_path, monkeypatch)


def ask(
    number: int,
    *parts: list[int],
    tree: str = "t",
    numbers: tuple[int, ...] = (),
    tokens: int = 4,
    temperature: float = 1.0,
) -> Request:
    """A request for turn `number`; its prompt is made of the parts, those of the turns `numbers` (0, 1, ...)."""
    parts = parts or (PROMPT,)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    names = numbers or range(len(parts))
    return Request(
        prompt_ids=[token for part in parts for token in part],
        sampling=SamplingParams(max_new_tokens=tokens, temperature=temperature),
        seed=number,
        path=tuple(PathNode(key=(tree, name), end=end) for name, end in zip(names, ends, strict=True)),
        turn_key=(tree, number),
    )


def drain(engine: CheckedEngine) -> dict[Any, Completion]:
    done: dict[Any, Completion] = {}
    while engine.in_flight:
        done.update(engine.poll())
    return done


def test_a_sleeping_engine_refuses_work_until_it_is_woken(engine: CheckedEngine) -> None:
    # Fails if an engine samples from weights that are not there, or sleeping or waking twice does harm.
    (first,) = engine.generate([ask(1)])
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match=r"asleep; call wake\(\)"):
        engine.submit([ask(2)])
    assert not engine.in_flight and engine.poll() == []
    engine.wake()
    engine.wake()
    (again,) = engine.generate([ask(1)])  # sleep has forgotten the tree
    assert again.token_ids == first.token_ids


def test_nothing_changes_under_requests_in_flight(engine: CheckedEngine) -> None:
    # Fails if weights, cache or memory change under a request, or the message does not say what to do.
    engine.submit([ask(1), ask(2, tree="u")])
    weights = list(make_model(1).named_parameters())
    for change in (engine.sleep, engine.reset_prefix_cache, lambda: engine.update_weights(weights)):
        with pytest.raises(RuntimeError, match="2 requests are in flight; poll until they are done, or release"):
            change()
    engine.release("t")
    assert list(engine.in_flight) == [("u", 2)]
    assert list(drain(engine)) == [("u", 2)]
    assert engine.awake
    engine.update_weights(weights)
    engine.reset_prefix_cache()
    assert len(engine.generate([ask(1)])) == 1


def test_a_refused_call_begins_nothing(engine: CheckedEngine) -> None:
    # Fails if a contradiction is found out only after other requests of the call have begun, or leaves a trace.
    good = ask(1)
    refused = [
        ([good, good], "requested already"),
        ([good, Request(**{**fields(ask(2)), "prompt_ids": PROMPT[:-1]})], "do not fit its"),
        ([good, ask(2, [*PROMPT, VOCABULARY])], rf"token ids must be in \[0, {VOCABULARY}\)"),
        ([good, ask(2, [*PROMPT, -1])], "token ids must be in"),
    ]
    for requests, words in refused:
        with pytest.raises(ValueError, match=words):
            engine.submit(requests)
        assert not engine.in_flight and engine.poll() == []
    engine.submit([good])
    with pytest.raises(ValueError, match="requested already"):
        engine.submit([ask(3), ask(1)])
    assert list(drain(engine)) == [("t", 1)]
    with pytest.raises(ValueError, match="requested already"):
        engine.submit([ask(1)])


def fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("prompt_ids", "sampling", "seed", "path", "turn_key")}


def test_a_turn_is_continued_as_it_was_written(engine: CheckedEngine) -> None:
    # Fails if an engine goes on from tokens that the policy never wrote, or from another turn's place.
    (written,) = engine.generate([ask(1)])
    turn = [*written.token_ids, PROMPT[1]]
    changed = [turn[0] ^ 1, *turn[1:]]
    with pytest.raises(ValueError, match=f"token {len(PROMPT)} of the path is {changed[0]}, but was {turn[0]}"):
        engine.submit([ask(2, PROMPT, changed)])
    with pytest.raises(ValueError, match=r"turn \('t', 1\) has continued turn \('t', 0\) and is now said to continue"):
        engine.submit([ask(2, PROMPT, turn, numbers=(7, 1))])
    with pytest.raises(ValueError, match="the name of a finished tree is free only after its release"):
        engine.submit([ask(2, [PROMPT[0] ^ 1, *PROMPT[1:]])])
    assert len(engine.generate([ask(2, PROMPT, turn)])) == 1
    engine.release("t")
    assert len(engine.generate([ask(1, [PROMPT[0] ^ 1, *PROMPT[1:]])])) == 1  # the name again, for another tree


def test_new_weights_are_checked_against_the_model(engine: CheckedEngine) -> None:
    # Fails if a misspelt, misshapen or missing parameter leaves old weights in place.
    weights = dict(make_model(1).named_parameters())
    with pytest.raises(KeyError, match=r"no parameter 'model\.norm\.weigth'; nearest: 'model\.norm\.weight'"):
        engine.update_weights([("model.norm.weigth", torch.zeros(32))])
    with pytest.raises(ValueError, match=r"model\.norm\.weight: new weights have shape \(3,\), not \(32,\)"):
        engine.update_weights([("model.norm.weight", torch.zeros(3))])
    with pytest.raises(ValueError, match=rf"lack {len(weights) - 1} parameters: "):
        engine.update_weights([("model.norm.weight", torch.zeros(32))])
    engine.update_weights(weights.items())
    assert len(engine.generate([ask(1)])) == 1


def test_a_failing_poll_leaves_nothing_in_flight(engine: CheckedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if requests stay in flight for ever, or their names are blocked.
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", lambda: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.generate([ask(1), ask(2)])
    assert not engine.in_flight and engine.poll() == []
    engine.reset_prefix_cache()
    assert len(engine.generate([ask(1), ask(2)])) == 2


def test_a_request_that_cannot_begin_leaves_nothing_in_flight(
    engine: CheckedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fails if the requests before it in the call, which the caller cannot know of, are completed or stay for ever.
    begin = engine._begin
    begun: list[Request] = []

    def fail(request: Request, forwarded: int) -> None:
        if begun:
            raise OSError("no such server")
        begun.append(request)
        begin(request, forwarded)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_begin", fail)
        with pytest.raises(OSError, match="no such server"):
            engine.submit([ask(1), ask(2)])
    assert not engine.in_flight and engine.poll() == []
    assert [completion.finish_reason in ("length", "eos") for completion in engine.generate([ask(1)])] == [True]


def test_what_an_engine_counts_adds_up(engine: CheckedEngine) -> None:
    # Fails if tokens are counted twice or not at all: every prompt token was cached or prefilled, and all but the last
    # token of a completion go through the model.
    asked = [ask(number, tree=f"t{number}") for number in range(1, 4)]
    decoded = sum(len(completion.token_ids) for completion in engine.generate(asked))
    counters = engine.counters
    assert counters.decoded_tokens == decoded and counters.evicted_tokens == 0
    assert counters.cache_hit_tokens + counters.prefilled_tokens == 3 * len(PROMPT) + decoded
    assert counters.forwarded_tokens == counters.prefilled_tokens - 3


@ENGINES
def test_each_of_several_end_tokens_ends_a_turn(
    make: Callable[..., Iterator[CheckedEngine]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fails if only the tokenizer's end of sequence is known, and a turn runs to its limit on another one.
    model = make_model()
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    model.save_pretrained(tmp_path / "model")
    for engine in make(tmp_path, monkeypatch):
        for completion in engine.generate([ask(number, tree=f"t{number}") for number in range(1, 5)]):
            assert completion.finish_reason == "eos" and len(completion.token_ids) == 1


def asked_of_a_padded_model() -> list[Request]:
    return [ask(number, tree=f"t{number}", tokens=8) for number in range(1, 31)]


def test_the_paged_engine_never_samples_a_row_without_a_token(tmp_path: Path) -> None:
    # Fails if a tenth of the tokens has no text, or if engine and trainer disagree about the log-probs of the others.
    model, engine = make_model(padding=4), PagedEngine(make_model(padding=4), TOKENIZER, cache_tokens=1000)
    for request, completion in zip(asked_of_a_padded_model(), engine.generate(asked_of_a_padded_model()), strict=True):
        ids = torch.tensor([*request.prompt_ids, *completion.token_ids])
        assert int(ids.max()) < VOCABULARY
        hidden = model.base_model(ids[None]).last_hidden_state[0, len(PROMPT) - 1 : -1]
        logprob, _ = linear_logprob(hidden, model.lm_head.weight, ids[len(PROMPT) :])  # as the policy's head has it
        np.testing.assert_allclose(completion.policy_logprobs, logprob.tolist(), atol=1e-5)
        drawn = torch.log_softmax(model.lm_head(hidden)[:, :VOCABULARY], -1).gather(1, ids[len(PROMPT) :, None])
        np.testing.assert_allclose(completion.logprobs, drawn[:, 0].tolist(), atol=1e-5)


def test_a_server_s_turn_with_a_row_without_a_token_is_asked_for_again(tmp_path: Path) -> None:
    # Fails if such a turn is taken as it is, or asked for again with the seed that gave it.
    make_model(padding=4).save_pretrained(tmp_path / "model")
    with CompletionsServer(partial(make_model, padding=4), TOKENIZER) as replica:
        for retries in (50, 0):
            config = ServerConfig(urls=[replica.url], retries=retries, backoff_seconds=0.001)
            engine = ServerEngine(tmp_path / "model", TOKENIZER, config)
            try:
                if retries:
                    done = engine.generate(asked_of_a_padded_model())
                    assert max(token for completion in done for token in completion.token_ids) < VOCABULARY
                else:
                    with pytest.raises(EngineError, match=r"token \d+, which this run's tokenizer does not have"):
                        engine.generate(asked_of_a_padded_model())
            finally:
                engine.close()


def test_vllm_goes_on_after_a_row_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if such a token is kept, tokens before it are lost, or the same seed or a greedy turn meets it for ever.
    def draw(sampling: Any, left: int) -> int:
        lost = not sampling.logit_bias if not sampling.temperature else (sampling.seed >> 7) % 3 == 0
        return VOCABULARY if lost and left % 2 else PROMPT[left % 2]

    monkeypatch.setattr(vllm_engine, "check_vllm", lambda: Version("0.32.0"))
    monkeypatch.setattr(vllm_engine, "start_llm", lambda *_: (STAND_IN_MODULE, StandIn(draw)))
    make_model(padding=4).save_pretrained(tmp_path / "model")
    engine = VLLMEngine(tmp_path / "model", TOKENIZER, VLLMConfig(), cache_tokens=1000, max_positions=128)
    asked = asked_of_a_padded_model()
    greedy = ask(99, tree="greedy", tokens=8, temperature=0.0)
    for completion in engine.generate([*asked, greedy]):
        assert completion.token_ids == [PROMPT[left % 2] for left in range(7, -1, -1)]
        assert len(completion.logprobs) == 8 and completion.finish_reason == "length"
    assert engine.counters.decoded_tokens == 8 * 31
    monkeypatch.setattr(engine._llm, "draw", lambda sampling, left: VOCABULARY)
    with pytest.raises(EngineError, match="do model and tokenizer belong together"):
        engine.generate([ask(100, tree="lost")])
    assert not engine._writings


def test_errors_of_engines_are_found_behind_others() -> None:
    error = RuntimeError("the engine failed")
    error.__cause__ = EngineError("no server is up")
    assert is_engine_error(error) and not is_engine_error(ValueError("ours")) and not is_engine_error(None)
