"""An engine whose policy is a function, and what else tests of the tree search need."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Completion, Engine, EngineCounters, FinishReason, Request, TurnKey
from atpo_fast.environment import CALL_LIMIT_NOTICE, ToolBox
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.tree import TurnTree
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer

WORDS = "one two three four five six seven eight nine ten"
TOKENIZER = word_level_tokenizer(
    split_words(
        f"{WORDS} Ask: question one? \n {CALL_LIMIT_NOTICE} \nTool(x) was not called: opening missing, nothing between."
    )
)
EOS = TOKENIZER.eos_token_id
ANSWER = "<answer> nine</answer><eos>"

Script = Callable[[str, Request], str]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class ScriptedEngine(Engine):
    """An engine whose policy is a function of the prompt's text and the request; it checks what engines rely on.

    `polls` tells how many polls a request takes, and `tops` the log-probs of a token's candidates (none: its own).
    """

    def __init__(
        self,
        script: Script,
        polls: Callable[[Request], int] = lambda request: 1,
        tops: Callable[[int], list[float]] | None = None,
        tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    ) -> None:
        self.script, self.polls, self.tops, self.tokenizer = script, polls, tops, tokenizer
        self.counters = EngineCounters()
        self._tags: dict[str, list[int]] = {}  # ids of the stop strings
        self.batches: list[list[Request]] = []  # as submitted
        self.in_flight: dict[TurnKey, tuple[Request, int]] = {}  # and how many polls are left
        self.live: dict[TurnKey, int] = {}  # turn -> tokens up to its end, observation not included
        self.released: list[Any] = []

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def submit(self, requests: Sequence[Request]) -> None:
        self.batches.append(list(requests))
        for request in requests:
            assert request.turn_key not in self.in_flight
            self.in_flight[request.turn_key] = request, self.polls(request)

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        self.in_flight = {key: (request, left - 1) for key, (request, left) in self.in_flight.items()}
        done = [request for request, left in self.in_flight.values() if left <= 0]
        try:
            finished = [(request.turn_key, self._complete(request)) for request in done]
        except BaseException:
            self.in_flight.clear()
            raise
        for request in done:
            del self.in_flight[request.turn_key]
        return finished

    def _complete(self, request: Request) -> Completion:
        keys, ends = [node.key for node in request.path], [node.end for node in request.path]
        assert ends[-1] == len(request.prompt_ids) and ends == sorted(ends)
        assert request.turn_key not in self.live and len({key[0] for key in (*keys, request.turn_key)}) == 1
        for key, end in zip(keys[1:], ends[1:], strict=True):
            assert self.live[key] < end  # a continued turn exists, and has an observation
        ids = self.encode(self.script(str(self.tokenizer.decode(request.prompt_ids)), request))
        cut = ids[: request.sampling.max_new_tokens]
        self.live[request.turn_key] = ends[-1] + len(cut)
        for tag in set(request.sampling.stop) - self._tags.keys():
            self._tags[tag] = self.encode(tag)
        stop = next((tag for tag in request.sampling.stop if cut[-1:] == self._tags[tag]), None)
        reason: FinishReason = "eos" if cut[-1] == self.tokenizer.eos_token_id else "stop" if stop else "length"
        logprobs = [-0.1 * (1 + i % 3) for i in cut]
        tops = [self.tops(i) for i in cut] if self.tops else [[logprob] for logprob in logprobs]
        return Completion(
            token_ids=cut,
            logprobs=[0.0] * len(cut),
            policy_logprobs=logprobs,
            finish_reason=reason,
            stop=stop,
            top_logprobs=tops if request.sampling.top_logprobs else None,
        )

    def release(self, tree: Hashable) -> None:
        self.released.append(tree)
        self.in_flight = {key: value for key, value in self.in_flight.items() if key[0] != tree}
        self.live = {key: end for key, end in self.live.items() if key[0] != tree}

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Search:
    """A search tool that echoes; counts its calls."""

    name = "search"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, argument: str) -> str:
        self.calls.append(argument)
        return f"found {argument}"


def questions(count: int) -> list[Question]:
    return [Question(id=f"q{i}", text=f"{WORDS.split()[i]}?", answers=("nine",)) for i in range(count)]


def prompts(asked: Sequence[Question]) -> list[list[int]]:
    return [encode(f"Ask: {question.text}") for question in asked]


def make_search(
    engine: Any,
    tool: Callable[[str], str] | None = None,
    *,
    limit: int = 6,
    result_tokens: int = 64,
    cache_tokens: int = 262144,
    **rollout: Any,
) -> TreeSearch:
    config = RolloutConfig(**({"initial_chains": 3, "expansion_rounds": 2, "expansions_per_round": 2} | rollout))
    toolbox = ToolBox([tool or Search()], retries=0, timeout_seconds=240.0)
    tools = ToolsConfig(call_limit=limit, max_result_tokens=result_tokens)
    return TreeSearch(engine, TOKENIZER, toolbox, config, tools, cache_tokens=cache_tokens)


def roll_out(search: TreeSearch, asked: Sequence[Question], seed: int = 0, **options: Any) -> list[TurnTree]:
    """The trees of a roll-out, in the order of the questions."""
    return in_order(search.roll_out(asked, prompts(asked), seed=seed, **options))


def search_then_answer(prompt: str, request: Request) -> str:
    """One search, then the answer."""
    return ANSWER if "</result>" in prompt else "<search> two</search>"


def by_seed(prompt: str, request: Request) -> str:
    """One to ten words, then a search (3 of 4) or the end: everything decided by the seed."""
    rng = np.random.default_rng(request.seed)
    words = " ".join(rng.choice(WORDS.split(), size=rng.integers(1, 11)))
    return f" {words}<search> {words}</search>" if rng.random() < 0.75 else f" {words}{ANSWER}"


def as_data(tree: TurnTree) -> list[Any]:
    """Everything that a turn holds, in the order of the turns; log-probs without what a batch's size can change."""
    return [
        (
            t.parent,
            t.action_ids.tolist(),
            np.nan_to_num(t.logprobs.round(9), nan=1.0).tolist(),  # 1: appended, not sampled
            t.observation_ids.tolist(),
            t.finish_reason,
            t.tool,
            t.multiplicity,
        )
        for t in tree.turns
    ]
