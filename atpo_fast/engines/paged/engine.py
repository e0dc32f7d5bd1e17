"""Batched generation with any Hugging Face causal LM and one cache entry per tree token (design, section 7)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atpo_fast.engines.base import Completion, Engine, EngineCounters, Request, TurnKey
from atpo_fast.engines.paged.batching import Generation
from atpo_fast.engines.paged.kv_cache import PrefixCache, SlotPool
from atpo_fast.engines.paged.model import PagedModel
from atpo_fast.engines.stops import StopTables, end_of_sequence_ids


class TransformersEngine(Engine):
    """An `Engine` on one device; see `Engine` for the methods.

    A turn's tokens are forwarded once, whatever number of chains, siblings and expansion rounds continue it. The
    last token of a turn is forwarded together with its observation, when the turn is continued. When the cache is
    full, the least recently used turns that no running request needs are evicted, and filled again when needed;
    if that is not enough, fewer requests are decoded at once. The cache is forgotten when `poll` raises.

    Args:
        model: the causal LM; from now on it belongs to the engine (its attention is replaced).
        tokenizer: its tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        cache_tokens: budget of the cache in tree tokens.
        batch_size: most requests decoded at once.
        device: where to run; default: where the model is.
        dtype: dtype of the weights and the cache; default: the model's.

    Raises:
        ValueError: an architecture that the engine cannot run, or `cache_tokens` or `batch_size` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_tokens: int,
        batch_size: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if cache_tokens < 1 or batch_size < 1:
            raise ValueError(f"cache_tokens={cache_tokens} and batch_size={batch_size} must be at least 1")
        self.counters = EngineCounters()
        self.batch_size = batch_size
        self.model = PagedModel(model, torch.device(device or model.device), dtype)
        self.cache = PrefixCache(SlotPool(cache_tokens), self.counters)
        self._eos_ids = end_of_sequence_ids(tokenizer)
        self._stops = StopTables(tokenizer, self.model.vocab_size)
        self._awake = True
        self._generation: Generation | None = None  # while anything is in flight

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests beside those in flight.

        Raises:
            ValueError: a request that contradicts itself, the cache or another request.
            RuntimeError: the engine is asleep.
        """
        if not self._awake:
            raise RuntimeError("the engine is asleep; call wake() before requests are submitted")
        prompts = [np.asarray(request.prompt_ids, dtype=np.int64) for request in requests]
        self._check(requests, prompts)
        for request, prompt in zip(requests, prompts, strict=True):
            if self._generation is None:
                self._generation = Generation(self.model, self.cache, self._eos_ids, self.batch_size)
            self._generation.add(request, prompt, self._stops.table(request.sampling.stop))

    @torch.inference_mode()
    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Decode one token of every request in flight that has a place in the batch; those finished.

        Raises:
            ValueError: a request that contradicts the cache, or that cannot fit into `cache_tokens`.
        """
        if self._generation is None:
            return []
        try:
            finished = self._generation.step()
        except BaseException:
            self._generation = None
            self.cache.clear()  # entries may be half written
            raise
        self._end_when_idle()
        return finished

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights anew, by Hugging Face name, one tensor at a time; forgets the cache.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: a tensor of another shape, or parameters that never came.
            RuntimeError: requests are in flight.
        """
        self.reset_prefix_cache()
        self.model.load(named_parameters)

    def release(self, tree: Hashable) -> None:
        """Forget a tree (`PathNode.key[0]`): its requests in flight, and its cache entries."""
        if self._generation is not None:
            self._generation.drop(tree)
            self._end_when_idle()
        self.cache.release_tree(tree)

    def reset_prefix_cache(self) -> None:
        """Forget every cache entry. Raises RuntimeError when requests are in flight."""
        self._require_idle()
        self.cache.clear()

    def sleep(self) -> None:
        """Drop the cache, and keep the weights in host memory until `wake`. Raises RuntimeError as above."""
        self._require_idle()
        self._awake = False
        self.cache.clear()
        if self.model.device.type != "cpu":
            self.model.move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undo `sleep`; the cache starts empty."""
        self.model.move(self.model.device)
        self._awake = True

    def _require_idle(self) -> None:
        if self._generation is not None:
            raise RuntimeError(
                f"{len(self._generation.keys)} requests are in flight; poll until they are done, or release their trees"
            )

    def _end_when_idle(self) -> None:
        if self._generation is not None and not self._generation.keys:
            self._generation = None

    def _check(self, requests: Sequence[Request], prompts: Sequence[NDArray[np.int64]]) -> None:
        seen = set(self._generation.keys) if self._generation is not None else set()
        for request, prompt in zip(requests, prompts, strict=True):
            ends = [part.end for part in request.path]
            if not len(prompt) or not ends or ends[-1] != len(prompt) or sorted(ends) != ends:
                raise ValueError(
                    f"turn {request.turn_key}: path ends {ends} do not fit its {len(prompt)} prompt tokens"
                )
            if prompt.min() < 0 or prompt.max() >= self.model.vocab_size:
                raise ValueError(f"turn {request.turn_key}: token ids must be in [0, {self.model.vocab_size})")
            if request.turn_key in seen or request.turn_key in self.cache.nodes:
                raise ValueError(f"turn {request.turn_key} has been requested already; every turn needs its own key")
            seen.add(request.turn_key)
