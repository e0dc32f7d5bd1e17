"""Batched generation with any Hugging Face causal LM and one cache entry per tree token (docs/design.md#engines)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atpo_fast.adapters import has_adapters
from atpo_fast.engines.base import CheckedEngine, Completion, Request, TurnKey
from atpo_fast.engines.paged.batching import ContinuousBatch
from atpo_fast.engines.paged.kv_cache import PrefixCache, SlotPool
from atpo_fast.engines.paged.model import PagedModel
from atpo_fast.engines.paged.states import StatePool
from atpo_fast.engines.weight_stream import adapter_shapes, parameter_shapes


class PagedEngine(CheckedEngine):
    """The engine that runs a Hugging Face model in this process, on one device; see `Engine` for the methods.

    A turn's tokens are forwarded once, whatever number of chains, siblings and expansion rounds continue it. The
    last token of a turn is forwarded together with its observation, when the turn is continued. When the cache is
    full, the least recently used turns that no running request needs are evicted, and filled again when needed;
    if that is not enough, fewer requests are decoded at once. The cache is forgotten when `poll` raises.
    Asleep, the engine keeps its weights in host memory.

    Args:
        model: the causal LM; from now on it belongs to the engine (its attention is replaced). Where it has adapters,
            they are what `update_weights` takes.
        tokenizer: its tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        cache_tokens: budget of the cache in tree tokens.
        cache_states: budget of the states of layers that have one: of turns in the cache and requests that are decoded.
        batch_size: number of requests decoded at once, at most.
        device: where to run; default: where the model is.
        dtype: dtype of the weights and the cache; default: the model's.

    Raises:
        ValueError: an architecture that the engine cannot run, or a budget or `batch_size` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_tokens: int,
        cache_states: int = 4096,
        batch_size: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if min(cache_tokens, cache_states, batch_size) < 1:
            sizes = f"cache_tokens={cache_tokens}, cache_states={cache_states} and batch_size={batch_size}"
            raise ValueError(f"{sizes} must be at least 1")
        self.batch_size = batch_size
        self.model = PagedModel(model, torch.device(device or model.device), dtype)
        self.holds_adapters = has_adapters(model)
        shapes = adapter_shapes(model) if self.holds_adapters else parameter_shapes(model)
        super().__init__(tokenizer, self.model.vocab_size, shapes, model.generation_config)
        self._missing = torch.from_numpy(self.missing_ids).to(self.model.device)
        states = StatePool(cache_states) if self.model.has_states else None
        self.cache = PrefixCache(SlotPool(cache_tokens), self.counters, states)
        self._batch: ContinuousBatch | None = None  # batch while requests are in flight

    def _begin(self, request: Request, forwarded: int) -> None:
        if self._batch is None:
            self._batch = ContinuousBatch(self.model, self.cache, self.eos_ids, self._missing, self.batch_size)
        prompt = np.asarray(request.prompt_ids, dtype=np.int64)
        self._batch.add(request, prompt, self.stops.table(request.sampling.stop))

    @torch.inference_mode()
    def _advance(self) -> list[tuple[TurnKey, Completion]]:
        """Decode one token of every request that has a place in the batch.

        Raises:
            ValueError: a request that cannot fit into `cache_tokens`.
        """
        assert self._batch is not None
        try:
            finished = self._batch.step()
        except BaseException:
            self._batch = None
            self.cache.clear()  # entries may be half written
            raise
        self._end_when_idle()
        return finished

    def _cancel(self, keys: Sequence[TurnKey]) -> None:
        if self._batch is not None:
            self._batch.drop(set(keys))
            self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self._batch is not None and self._batch.idle:
            self._batch = None

    def _release(self, tree: Hashable) -> None:
        self.cache.release_tree(tree)

    def _load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.cache.clear()
        self.model.load(self.checked(named_parameters))

    def _forget_cache(self) -> None:
        self.cache.clear()

    def _sleep(self) -> None:
        self.cache.clear()
        if self.model.device.type != "cpu":
            self.model.move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def _wake(self) -> None:
        self.model.move(self.model.device)
