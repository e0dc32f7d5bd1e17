"""vLLM as an engine: token ids in and out, its own prefix cache, weights pushed into it (design, section 7).

Stop strings are found on token ids by the same automaton as in the transformers engine: vLLM decodes no text, and a
request is aborted as soon as the automaton has found one. Where vLLM runs ahead of us (asynchronous scheduling), tokens
after the stop are dropped.

Only this module and its neighbours call vLLM: `vllm_start.py` makes the `LLM`, `vllm_worker.py` is what vLLM's workers
load, and `vllm_transfer.py` sends weights to workers in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from atpo_fast.config import VLLMConfig
from atpo_fast.engines.base import Completion, Engine, EngineCounters, FinishReason, Request, TurnKey
from atpo_fast.engines.prefix_check import LiveTurns
from atpo_fast.engines.stops import StopTable, StopTables, end_of_sequence_ids
from atpo_fast.engines.vllm.start import check_vllm, llm_options, start_llm
from atpo_fast.engines.weight_stream import checked, parameter_shapes

Weights = Iterable[tuple[str, Tensor]]


class VLLMEngine(Engine):
    """An `Engine` on vLLM; see `Engine` for the methods.

    Args:
        folder: Hugging Face model folder with the starting weights.
        tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        config: options.
        cache_tokens: room of the cache in tokens.
        max_positions: longest path, prompt included.
        dtype: dtype of weights and cache.
        device: where to run.
        truncates: whether requests will use top-p or top-k.
        seed: of vLLM's own random numbers; requests bring theirs.
        current_weights: gives the weights again when `sleep` has dropped them; none: they are read from `folder`.

    Raises:
        ValueError: vLLM is missing or of an unknown version, or options that do not fit the ranks.
    """

    def __init__(
        self,
        folder: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        config: VLLMConfig,
        *,
        cache_tokens: int,
        max_positions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        truncates: bool = False,
        seed: int = 0,
        current_weights: Callable[[], Weights | None] = lambda: None,
    ):
        self.counters = EngineCounters()
        self.config, self.device, self.truncates = config, torch.device(device), truncates
        self.max_positions = max_positions
        self._version = check_vllm()
        self._model_config = AutoConfig.from_pretrained(folder)
        self._shapes = parameter_shapes(self._model_config)
        self._current_weights = current_weights
        self._eos_ids = end_of_sequence_ids(tokenizer)
        self._stops = StopTables(tokenizer, self._model_config.vocab_size)
        self._live = LiveTurns()
        self._writings: dict[str, _Writing] = {}  # what is in flight, by vLLM's name for it
        self._begun = 0
        self._awake = True
        self._weights_here = True  # on the device, and not given up
        options = llm_options(self._model_config, config, self.device, cache_tokens, max_positions, dtype, truncates)
        self._vllm, self._llm = start_llm(str(folder), options | {"seed": seed}, config, self.device, truncates)
        self.block_size: int = self._llm.llm_engine.vllm_config.cache_config.block_size
        self._transfer = None
        if config.placement == "own_gpus":
            from atpo_fast.engines.vllm.transfer import NCCLTransfer

            self._transfer = NCCLTransfer(self._llm, self._version, config.tensor_parallel, config.bucket_mb << 20)

    # Generation

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests; see `Engine`.

        Raises:
            ValueError: a request that contradicts itself, another or what was generated before, or is too long.
            RuntimeError: the engine is asleep.
        """
        if not self._awake:
            raise RuntimeError("the engine is asleep; call wake() before submit()")
        for request in requests:
            self._check(request)
        known = self._live.admit(requests)
        try:
            for request, entered in zip(requests, known, strict=True):
                self._begin(request, entered)
        except BaseException:
            self._drop(list(self._writings))
            raise

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """One step of vLLM's scheduler; see `Engine`. Raises RuntimeError when vLLM gave up on a request."""
        if not self._writings:
            return []
        try:
            finished = self._step()
        except BaseException:
            self._drop(list(self._writings))
            raise
        completions = []
        for writing in finished.values():
            self._live.written(writing.request, writing.token_ids)
            self._count(writing)
            completions.append((writing.request.turn_key, writing.completion()))
        return completions

    def _check(self, request: Request) -> None:
        ids, vocabulary = request.prompt_ids, self._model_config.vocab_size
        if len(ids) and not (min(ids) >= 0 and max(ids) < vocabulary):
            raise ValueError(f"turn {request.turn_key}: token ids must be in [0, {vocabulary})")
        if len(ids) >= self.max_positions:
            raise ValueError(
                f"turn {request.turn_key}: a prompt of {len(ids)} tokens leaves no room for a turn "
                f"(max_positions={self.max_positions})"
            )
        if _truncated(request) and not self.truncates:
            raise ValueError("top_p or top_k in a request, but the engine was made with truncates=False")

    def _begin(self, request: Request, entered: int) -> None:
        self._begun += 1
        name = str(self._begun)
        self._writings[name] = _Writing(request, entered, self._stops.table(request.sampling.stop))
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self._llm.llm_engine.add_request(name, prompt, self._sampling(name, request))

    def _step(self) -> dict[str, _Writing]:
        """The requests that a step has finished; they are no longer in flight."""
        engine = self._llm.llm_engine
        finished, stopped = {}, []
        for output in engine.step():
            writing = self._writings.get(output.request_id)
            if writing is None:  # it has been stopped, and vLLM had gone on
                continue
            writing.extend(output, self._eos_ids)
            if writing.finish_reason is not None:
                finished[output.request_id] = self._writings.pop(output.request_id)
                if not output.finished:
                    stopped.append(output.request_id)
        if stopped:
            engine.abort_request(stopped)
        cut = [name for name, writing in finished.items() if _truncated(writing.request)]
        if cut:
            for name, masses in zip(cut, self._log_kept_mass(cut), strict=True):
                finished[name].log_kept_mass = masses[: len(finished[name].token_ids)]
        return finished

    def _drop(self, names: Sequence[str]) -> None:
        """Give up requests in flight."""
        for name in names:
            self._live.dropped(self._writings.pop(name).request)
        if names:
            self._llm.llm_engine.abort_request(list(names))
        if names and self.truncates:
            self._log_kept_mass(names)

    def _sampling(self, name: str, request: Request) -> Any:
        wanted = request.sampling
        truncation = {"truncation": {"name": name, "top_k": wanted.top_k, "top_p": wanted.top_p}}
        return self._vllm.SamplingParams(
            temperature=wanted.temperature,
            max_tokens=wanted.max_new_tokens,
            seed=request.seed & (2**63 - 1),
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self._eos_ids,
            ignore_eos=True,  # they are the model configuration's, which may be others
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
            extra_args=truncation if _truncated(request) else None,
        )

    def _log_kept_mass(self, names: Sequence[str]) -> list[list[float]]:
        """For each truncated request the log of the mass that each token's truncation kept."""
        return self._llm.collective_rpc("take_log_kept_mass", args=(list(names),))[0]

    def _count(self, writing: _Writing) -> None:
        prompt, decoded, counters = len(writing.request.prompt_ids), len(writing.token_ids), self.counters
        counters.cache_hit_tokens += writing.cached
        counters.prefilled_tokens += prompt - writing.cached + decoded
        counters.decoded_tokens += decoded
        counters.forwarded_tokens += prompt - writing.cached + decoded - 1
        expected = min(writing.entered, prompt - 1) // self.block_size * self.block_size
        counters.evicted_tokens += max(0, expected - writing.cached)

    # Weights and memory

    def update_weights(self, named_parameters: Weights) -> None:
        """Take all weights anew, by Hugging Face name, one tensor at a time; forgets the cache.

        Where the engine is asleep, the weights' memory is taken back first, and the cache's with `wake`.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: a tensor of another shape, or parameters that never came. After an error the engine is of no use
                until all weights have come.
        """
        if self._sleeps and not self._awake and not self._weights_here:
            self._wake("weights")
        self._weights_here = False
        weights = checked(named_parameters, self._shapes)
        if self._transfer is not None:
            self._transfer.send(weights)
        else:  # vLLM keeps the parts of a fused matrix until it has all of them
            copies = ((name, tensor.detach().clone()) for name, tensor in weights)
            self._llm.collective_rpc("load", kwargs={"weights": copies})
        self._weights_here = True
        self.reset_prefix_cache()

    def release(self, tree: Hashable) -> None:
        """Forget a tree (`PathNode.key[0]`); its cache entries go when the room is needed."""
        self._drop([name for name, writing in self._writings.items() if writing.request.turn_key[0] == tree])
        self._live.release(tree)

    def reset_prefix_cache(self) -> None:
        """Forget every cache entry."""
        self._live.cache_lost()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget its cache: requests are still running")

    def sleep(self) -> None:
        """Give back GPU memory until `wake`: the cache, and the weights as `config.sleep` says. Nothing on CPU."""
        self._awake = False
        if self._sleeps:
            self._live.cache_lost()
            self._llm.sleep(level=1 if self.config.sleep == "host" else 2)
            self._weights_here = False

    def wake(self) -> None:
        """Undo `sleep`; weights that were dropped and not updated since are taken anew."""
        if self._awake:
            return
        if self._sleeps:
            torch.cuda.empty_cache()
            if not self._weights_here:
                self._wake("weights")
                if self.config.sleep == "drop":
                    self._take_again()
                self._weights_here = True
            self._wake("kv_cache")
        self._awake = True

    @property
    def _sleeps(self) -> bool:
        return self.device.type == "cuda" and self.config.placement == "colocated" and self.config.sleep != "off"

    def _wake(self, part: str) -> None:
        self._llm.wake_up(tags=[part])

    def _take_again(self) -> None:
        weights = self._current_weights()
        if weights is not None:
            self._weights_here = True  # awake already
            self.update_weights(weights)
        else:
            self._llm.collective_rpc("reload_weights")


@dataclass(slots=True)
class _Writing:
    """A completion being written."""

    request: Request
    entered: int  # tokens of the prompt that had been forwarded before it was submitted
    stops: StopTable
    state: int = 0  # of the stop automaton
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_kept_mass: list[float] | None = None  # where the distribution is truncated
    cached: int = -1  # prompt tokens found in the cache
    finish_reason: FinishReason | None = None
    stop: str | None = None

    def extend(self, output: Any, eos_ids: Sequence[int]) -> None:
        """Take new tokens up to the end of the turn."""
        if self.cached < 0:
            self.cached = output.num_cached_tokens or 0
        (news,) = output.outputs
        for token, entry in zip(news.token_ids, news.logprobs or (), strict=True):
            self.token_ids.append(int(token))
            self.logprobs.append(float(entry[token].logprob))
            self.state = int(self.stops.next_state[self.state, token])
            found = int(self.stops.found[self.state])
            if token in eos_ids:
                self.finish_reason = "eos"
                return
            if found >= 0:
                self.finish_reason, self.stop = "stop", self.stops.stops[found]
                return
        if output.finished:
            if news.finish_reason != "length":
                raise RuntimeError(f"vLLM gave up on turn {self.request.turn_key}: {news.finish_reason}")
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """What was written."""
        assert self.finish_reason is not None
        policy = self.logprobs
        if self.log_kept_mass is not None:
            policy = np.add(self.logprobs, self.log_kept_mass).tolist()
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            policy_logprobs=policy,
            finish_reason=self.finish_reason,
            stop=self.stop,
        )


def _truncated(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
