"""The engine as the tree search sees it (docs/design.md#engines), and the checks that all engines share.

`Engine` is the interface. `CheckedEngine` adds the shared checks: it checks all requests before any of them starts,
compares new weights with the model, and refuses to change weights, cache or memory while requests are in flight. A
concrete engine inherits from it and implements its hooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from atpo_fast.common.errors import EngineError
from atpo_fast.engines.prefix_check import PrefixCheck
from atpo_fast.engines.request import (
    Completion,
    EngineCounters,
    FinishReason,
    PathNode,
    Request,
    SamplingParams,
    TurnKey,
)
from atpo_fast.engines.stops import StopTables, end_of_sequence_ids, missing_ids
from atpo_fast.engines.weight_stream import checked

__all__ = [
    "CheckedEngine",
    "Completion",
    "Engine",
    "EngineCounters",
    "FinishReason",
    "LeaderFailedError",
    "PathNode",
    "Request",
    "SamplingParams",
    "TurnKey",
]

T = TypeVar("T")
R = TypeVar("R")


class LeaderFailedError(EngineError):
    """The rank that leads a shared engine has raised; its own error says why."""


class Engine(ABC):
    """An inference engine that completes any number of requests at a time, by continuous batching.

    A request is in flight from `submit` until `poll` returns its completion. `release` drops the requests of its tree;
    a `submit` that fails half-way and a `poll` that raises drop them all. One thread calls all methods.
    """

    counters: EngineCounters

    bucket_bytes: int = 256 << 20
    """Bytes of weights that the trainer gathers and sends at once."""

    holds_adapters: bool = False
    """Whether LoRA adapters lie beside the weights: `update_weights` then takes those of the adapters alone."""

    max_positions: int | None = None
    """Longest path that the engine can hold, prompt included; None where it sets no limit of its own."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests beside those in flight. Return at once: `poll` does the work.

        Raises:
            ValueError: a request contradicts itself, another one or what the engine wrote before, or this engine
                cannot take it; then none of `requests` begins.
            RuntimeError: the engine is asleep.
        """

    @abstractmethod
    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Advance all requests in flight by a little (one decode step, say). Callers loop over it: an engine that works
        in another process waits a moment for news.

        Return the completions that are new since the last call, by `Request.turn_key`, in any order; often none. Return
        an empty list at once when nothing is in flight. After an error nothing is in flight any more, and the engine
        has forgotten all unfinished trees.
        """

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete every request, in order. Nothing else may be in flight. Raise what `submit` and `poll` raise."""
        self.submit(requests)
        done: dict[TurnKey, Completion] = {}
        missing = {request.turn_key for request in requests}
        while missing:
            for key, completion in self.poll():
                missing.remove(key)
                done[key] = completion
        return [done[request.turn_key] for request in requests]

    @abstractmethod
    def release(self, tree: Hashable) -> None:
        """Forget a tree (`PathNode.key[0]`): its requests in flight, and its cache entries."""

    def for_all(
        self, items: Sequence[T], work: Callable[[Sequence[T]], Iterator[tuple[int, R]]]
    ) -> Iterator[tuple[int, R]]:
        """Run `work` with this engine on the items of all ranks that share it; yield (index, result) of this rank's.

        An item may have several results.

        Raises:
            LeaderFailedError: another rank, which leads, has raised.
        """
        return work(items)

    @abstractmethod
    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights for every parameter, by Hugging Face name, one tensor at a time; forget the cache.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: a tensor of another shape, or a missing parameter. After an error the engine cannot write until
                it gets all weights.
            RuntimeError: requests are in flight.
        """

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every cache entry. Raise RuntimeError when requests are in flight."""

    @abstractmethod
    def sleep(self) -> None:
        """Give memory back until `wake`; this may empty the cache. Raise RuntimeError when requests are in flight."""

    @abstractmethod
    def wake(self) -> None:
        """Take back the memory that `sleep` freed."""

    def close(self) -> None:
        """Stop all that the engine has started; do not use it afterwards."""
        return


class CheckedEngine(Engine):
    """The checks that all engines share, around the hooks in which a concrete engine does its work.

    Args:
        tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        vocab_size: V; token ids are in [0, V).
        shapes: the model's parameters as `parameter_shapes` lists them; `checked` compares new weights with them.
        generation: the model's generation settings, which may name further end-of-sequence ids.

    Attributes:
        eos_ids: tokens that end a completion.
        missing_ids: ids for which the tokenizer has no token, (m,); none of them is ever sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        shapes: Mapping[str, tuple[str, torch.Size]],
        generation: GenerationConfig | None,
    ) -> None:
        self.counters = EngineCounters()
        self.in_flight: dict[TurnKey, Request] = {}
        self.awake = True
        self.eos_ids = end_of_sequence_ids(tokenizer, generation)
        self.missing_ids = missing_ids(tokenizer, vocab_size)
        self.vocab_size, self.shapes = vocab_size, shapes
        self.stops = StopTables(tokenizer, vocab_size)
        self._prefixes = PrefixCheck()

    def submit(self, requests: Sequence[Request]) -> None:
        """Check all requests, then start them."""
        if not self.awake:
            raise RuntimeError("the engine is asleep; call wake() before submit()")
        for request in requests:
            self._check_ids(request)
            self._check(request)
        forwarded = self._prefixes.admit(requests)
        try:
            for request, known in zip(requests, forwarded, strict=True):
                self.in_flight[request.turn_key] = request
                self._begin(request, known)
        except BaseException:
            self._drop_all()
            raise

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Advance the requests in flight, and remember what was written to check its continuation."""
        if not self.in_flight:
            return []
        try:
            finished = self._advance()
        except BaseException:
            self._drop_all()
            raise
        for key, completion in finished:
            self._prefixes.written(self.in_flight.pop(key), completion.token_ids)
        return finished

    def release(self, tree: Hashable) -> None:
        """Drop a tree's requests in flight, then forget it."""
        dropped = [key for key in self.in_flight if key[0] == tree]
        for key in dropped:
            self._prefixes.dropped(self.in_flight.pop(key))
        if dropped:
            self._cancel(dropped)
        self._prefixes.release(tree)
        self._release(tree)

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights when nothing is in flight."""
        self._require_idle()
        self._prefixes.clear()
        self._load(named_parameters)

    def reset_prefix_cache(self) -> None:
        """Forget the cache when nothing is in flight."""
        self._require_idle()
        self._prefixes.clear()
        self._forget_cache()

    def sleep(self) -> None:
        """Give back memory when nothing is in flight; nothing to do for an engine that sleeps."""
        self._require_idle()
        if self.awake:
            self.awake = False
            self._prefixes.clear()
            self._sleep()

    def wake(self) -> None:
        """Take memory back; nothing to do for an engine that is awake."""
        if not self.awake:
            self._wake()
            self.awake = True

    def close(self) -> None:
        """Cancel all requests in flight."""
        self._drop_all()

    def checked(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass new weights on, each parameter once; raise KeyError and ValueError as `update_weights` says."""
        return checked(named_parameters, self.shapes)

    def _require_idle(self) -> None:
        if self.in_flight:
            raise RuntimeError(
                f"{len(self.in_flight)} requests are in flight; poll until they are done, or release their trees"
            )

    def _check_ids(self, request: Request) -> None:
        ids = request.prompt_ids
        if len(ids) and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise ValueError(f"turn {request.turn_key}: token ids must be in [0, {self.vocab_size})")

    def _drop_all(self) -> None:
        dropped = list(self.in_flight)
        self.in_flight.clear()
        self._prefixes.clear()
        if dropped:
            self._cancel(dropped)

    # Hooks of concrete engines

    def _check(self, request: Request) -> None:
        """Raise ValueError for a request that this engine cannot take."""
        return

    @abstractmethod
    def _begin(self, request: Request, forwarded: int) -> None:
        """Begin a checked request; an earlier request has forwarded the first `forwarded` tokens of its prompt."""

    @abstractmethod
    def _advance(self) -> list[tuple[TurnKey, Completion]]:
        """Do what `poll` says while something is in flight."""

    @abstractmethod
    def _cancel(self, keys: Sequence[TurnKey]) -> None:
        """Stop the work on requests that are no longer in flight; after a failure some may be unknown already."""

    @abstractmethod
    def _release(self, tree: Hashable) -> None:
        """Forget the cache entries of a tree, none of whose requests is in flight."""

    @abstractmethod
    def _load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights through `self.checked(named_parameters)`, which checks them, and forget the cache."""

    @abstractmethod
    def _forget_cache(self) -> None:
        """Evict every entry of the prefix cache."""

    @abstractmethod
    def _sleep(self) -> None:
        """Free the memory of weights and cache until `_wake`."""

    @abstractmethod
    def _wake(self) -> None:
        """Take back the memory that `_sleep` freed."""
