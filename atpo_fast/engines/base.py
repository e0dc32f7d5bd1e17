"""What the turn loop asks of an inference engine (design, section 7): token ids in, token ids and log-probs out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

FinishReason = Literal["stop", "eos", "length"]
TurnKey = tuple[Hashable, int]  # name of the tree, number of the turn in it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch truncation off. A completion ends after the token that
    completes one of the `stop` strings (the token stays), after `eos_token_id`, or at `max_new_tokens`.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"illegal sampling parameters: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathNode:
    """One turn on the way to a request: a name that is unique among live turns, and where its tokens end.

    `key[0]` names the tree, so that a finished tree's entries can be released together. `key[1]` counts the tree's
    requests in the order in which they were made (0: the root): it need not be the turn's index in the finished tree.
    """

    key: TurnKey
    end: int  # number of prompt tokens up to and including this turn's observation


@dataclass(slots=True, kw_only=True)
class Request:
    """Continue `prompt_ids` by one turn.

    `path` tells which turns of the search tree the prompt consists of, root first (the last `end` equals
    `len(prompt_ids)`), and `turn_key` names the turn about to be written, so that an engine can keep one cache entry
    per tree token. Engines that find prefixes by themselves ignore both. `seed` makes the sample independent of
    what else is in the batch.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    seed: int
    path: tuple[PathNode, ...]
    turn_key: TurnKey


@dataclass(slots=True, kw_only=True)
class Completion:
    """One sampled turn.

    `logprobs`: log-prob of each token under the distribution it was really drawn from (temperature, top-p and top-k
    included). `policy_logprobs`: under the policy at this temperature without truncation, which is what the trainer
    recomputes. The two are equal when truncation is off. Greedy decoding reports both at temperature 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    policy_logprobs: list[float]
    finish_reason: FinishReason
    stop: str | None = None  # the stop string found


@dataclass(slots=True)
class EngineCounters:
    """Cumulative counts of one engine.

    `prefilled_tokens`: tokens that entered the cache, each counted when it gets its entry; a forest rolled out
    without eviction has exactly as many as it has unique tokens. `decoded_tokens`: the part of them that was
    sampled. `cache_hit_tokens`: prompt tokens of requests that were found in the cache. `forwarded_tokens`: tokens
    really fed through the model, counted at the forward (the last token of a leaf never is). `evicted_tokens`:
    entries given up for lack of room while their tree was alive.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    cache_hit_tokens: int = 0
    forwarded_tokens: int = 0
    evicted_tokens: int = 0


class Engine(Protocol):
    """An inference engine with any number of requests in flight (continuous batching).

    A request is in flight from `submit` until `poll` has given its completion. When `submit` or `poll` raises, or
    `release` names its tree, it is dropped instead. One thread calls all methods. A class that implements an engine
    inherits from this one, for `generate`.
    """

    counters: EngineCounters

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests beside those in flight. Returns at once: `poll` does the work.

        Raises:
            ValueError: a request that contradicts itself or another; then none of `requests` is begun.
            RuntimeError: the engine is asleep.
        """
        ...

    @abstractmethod
    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Advance all requests in flight by a little (one decode step, say). Callers loop over it: an engine that works
        in another process waits a moment for news.

        Returns those that have finished since the last call, by `Request.turn_key`, in any order; often none. Returns
        an empty list at once when nothing is in flight. When it raises, nothing is in flight any more.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete every request, in order. Nothing else may be in flight. Raises what `submit` and `poll` raise."""
        self.submit(requests)
        done: dict[TurnKey, Completion] = {}
        missing = {request.turn_key for request in requests}
        while missing:
            for key, completion in self.poll():
                missing.remove(key)
                done[key] = completion
        return [done[request.turn_key] for request in requests]

    @abstractmethod
    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights, one tensor at a time; forgets the cache. Nothing may be in flight."""
        ...

    @abstractmethod
    def release(self, tree: Hashable) -> None:
        """Forget a tree (`PathNode.key[0]`): its requests in flight, and its cache entries."""
        ...

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every cache entry. Nothing may be in flight."""
        ...

    @abstractmethod
    def sleep(self) -> None:
        """Give back memory until `wake`. Nothing may be in flight."""
        ...

    @abstractmethod
    def wake(self) -> None:
        """Undo `sleep`."""
        ...
