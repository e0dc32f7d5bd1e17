"""vLLM as an engine: token ids in and out, its own prefix cache, weights pushed into it (docs/design.md#engines).

Stop strings are found on token ids by the same automaton as in the paged engine: vLLM decodes no text, and a
request is aborted as soon as the automaton has found one. Where vLLM runs ahead of us (asynchronous scheduling), tokens
after the stop are dropped.

vLLM samples from all rows of the embedding. A token that the tokenizer does not have is rejected, and the rest of the
turn is asked for again with another seed: what is kept has the distribution without such tokens, and the log-probs that
the trainer recomputes. Greedy turns are asked for again with a bias against them.

Only this package calls vLLM: `start.py` builds the `LLM`, vLLM's workers load `worker.py`, and `transfer.py` sends
weights to workers in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from atpo_fast.adapters import ADAPTER, AdapterSettings
from atpo_fast.common.errors import EngineError
from atpo_fast.config import VLLMConfig
from atpo_fast.engines.base import CheckedEngine, Completion, FinishReason, Request, TurnKey
from atpo_fast.engines.stops import StopTable, folder_generation
from atpo_fast.engines.vllm.adapters import LoadedAdapters, adapted_model, adapter_options
from atpo_fast.engines.vllm.start import check_vllm, llm_options, start_llm
from atpo_fast.engines.weight_stream import adapter_shapes, parameter_shapes

Weights = Iterable[tuple[str, Tensor]]

_MOST_REJECTED = 50  # tokens in a row that the tokenizer does not have, before the model is given up
_NEXT_SEED = 0x9E3779B97F4A7C15


class VLLMEngine(CheckedEngine):
    """The engine that runs vLLM in this process or on GPUs of its own; see `Engine` for the methods.

    Asleep, a colocated engine on a GPU frees the cache, and the weights as `config.sleep` says; on a CPU nothing.
    Weights that come while it sleeps get their memory back first, and the cache gets its with `wake`.

    Args:
        folder: Hugging Face model folder with the starting weights.
        tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        config: options.
        cache_tokens: room of the cache in tokens.
        max_positions: longest path, prompt included.
        dtype: dtype of weights and cache.
        device: where to run.
        truncates: whether requests will use top-p or top-k.
        adapters: what the policy has beside the model's weights; `update_weights` then takes their weights alone.
        seed: seed of vLLM's own random numbers; requests bring theirs.
        current_weights: gives the weights again when `sleep` has dropped them; where it gives None, they are read from
            `folder`.

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
        adapters: AdapterSettings | None = None,
        seed: int = 0,
        current_weights: Callable[[], Weights | None] = lambda: None,
    ):
        if adapters is not None and config.sleep == "drop":
            raise ValueError(
                "engine.sleep=drop frees the weights below the adapters: set sleep=host, or in_engine=merged"
            )
        self._version = check_vllm()
        self._model_config = AutoConfig.from_pretrained(folder)
        self.holds_adapters = adapters is not None
        adapted = None if adapters is None else adapted_model(self._model_config, adapters)
        shapes = parameter_shapes(self._model_config) if adapted is None else adapter_shapes(adapted)
        super().__init__(tokenizer, self._model_config.vocab_size, shapes, folder_generation(folder))
        self._missing = frozenset(self.missing_ids.tolist())
        self.config, self.device, self.truncates = config, torch.device(device), truncates
        self.max_positions, self.bucket_bytes = max_positions, config.bucket_mb << 20
        self._current_weights = current_weights
        self._writings: dict[str, _Writing] = {}  # requests in flight by vLLM's name for them
        self._begun = 0
        self._weights_here = True  # whether the weights are in the device's memory
        options = llm_options(self._model_config, config, self.device, cache_tokens, max_positions, dtype, truncates)
        if adapters is not None:
            options |= adapter_options(adapters)
        self._vllm, self._llm = start_llm(str(folder), options | {"seed": seed}, config, self.device, truncates)
        self.block_size: int = self._llm.llm_engine.vllm_config.cache_config.block_size
        self._adapters = None if adapted is None else LoadedAdapters(self._llm, adapted.peft_config[ADAPTER])
        self._transfer = None
        if config.placement == "own_gpus" and adapters is None:
            from atpo_fast.engines.vllm.transfer import NCCLTransfer

            self._transfer = NCCLTransfer(self._llm, self._version, config.tensor_parallel, self.bucket_bytes)

    # Generation

    def _check(self, request: Request) -> None:
        ids = request.prompt_ids
        if self.max_positions is not None and len(ids) >= self.max_positions:
            raise ValueError(
                f"turn {request.turn_key}: a prompt of {len(ids)} tokens leaves no room for a turn "
                f"(max_positions={self.max_positions})"
            )
        if _truncated(request) and not self.truncates:
            raise ValueError("top_p or top_k in a request, but the engine was built with truncates=False")
        if _truncated(request) and request.sampling.top_logprobs:
            raise ValueError("top_logprobs with top_p or top_k: vLLM tells those of the truncated distribution only")

    def _begin(self, request: Request, forwarded: int) -> None:
        self._ask(_Writing(request, forwarded, self.stops.table(request.sampling.stop)))

    def _ask(self, writing: _Writing) -> None:
        """Ask vLLM for the rest of a turn."""
        self._begun += 1
        name = str(self._begun)
        self._writings[name] = writing
        prompt = {"prompt_token_ids": [*writing.request.prompt_ids, *writing.token_ids]}
        adapters = None if self._adapters is None else self._adapters.request
        self._llm.llm_engine.add_request(name, prompt, self._sampling(name, writing), lora_request=adapters)

    def _advance(self) -> list[tuple[TurnKey, Completion]]:
        """Take one step of vLLM's scheduler. Raise RuntimeError when vLLM aborted a request."""
        finished = self._step()
        for writing in finished:
            self._count(writing)
        return [(writing.request.turn_key, writing.completion()) for writing in finished]

    def _step(self) -> list[_Writing]:
        """Take a step and return the completions that it has finished."""
        engine = self._llm.llm_engine
        finished, rejected, stopped = {}, [], []
        for output in engine.step():
            writing = self._writings.get(output.request_id)
            if writing is None:  # it has been stopped, and vLLM had gone on
                continue
            complete = writing.extend(output, self.eos_ids, self._missing)
            if not complete:
                rejected.append(output.request_id)
            if writing.finish_reason is not None:
                finished[output.request_id] = self._writings.pop(output.request_id)
            if not output.finished and (writing.finish_reason is not None or not complete):
                stopped.append(output.request_id)
        if stopped:
            engine.abort_request(stopped)
        again = {name: self._writings.pop(name) for name in rejected}
        cut = {name: writing for name, writing in (finished | again).items() if _truncated(writing.request)}
        if cut:
            for writing, masses in zip(cut.values(), self._log_kept_probability(list(cut)), strict=True):
                writing.log_kept_probability += masses[: len(writing.token_ids) - len(writing.log_kept_probability)]
        for writing in again.values():
            self._ask(writing)
        return list(finished.values())

    def _cancel(self, keys: Sequence[TurnKey]) -> None:
        cancelled = set(keys)
        names = [name for name, writing in self._writings.items() if writing.request.turn_key in cancelled]
        for name in names:
            del self._writings[name]
        if names:
            self._llm.llm_engine.abort_request(names)
        if names and self.truncates:
            self._log_kept_probability(names)

    def _sampling(self, name: str, writing: _Writing) -> Any:
        request, wanted = writing.request, writing.request.sampling
        greedy_again = writing.rejected and not wanted.temperature
        truncation = {"truncation": {"name": name, "top_k": wanted.top_k, "top_p": wanted.top_p}}
        return self._vllm.SamplingParams(
            temperature=wanted.temperature,
            max_tokens=wanted.max_new_tokens - len(writing.token_ids),
            seed=(request.seed + writing.rejected * _NEXT_SEED) & (2**63 - 1),
            logit_bias=dict.fromkeys(self._missing, -100.0) if greedy_again else None,
            logprobs=wanted.top_logprobs,  # 0: that of the sampled token only
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # they are the model configuration's, which may be others
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
            extra_args=truncation if _truncated(request) else None,
        )

    def _log_kept_probability(self, names: Sequence[str]) -> list[list[float]]:
        """Fetch, for each truncated request, the log of the probability that each token's truncation kept."""
        return self._llm.collective_rpc("take_log_kept_probability", args=(list(names),))[0]

    def _count(self, writing: _Writing) -> None:
        prompt = len(writing.request.prompt_ids)
        self.counters.count_completion(prompt, writing.cached, len(writing.token_ids))
        expected = min(writing.forwarded, prompt - 1) // self.block_size * self.block_size
        self.counters.evicted_tokens += max(0, expected - writing.cached)

    # Weights and memory

    def _load(self, named_parameters: Weights) -> None:
        if self._sleeps and not self.awake and not self._weights_here:
            self._wake_part("weights")
        self._weights_here = False
        weights = self.checked(named_parameters)
        if self._adapters is not None:
            self._adapters.load(weights)
        elif self._transfer is not None:
            self._transfer.send(weights)
        else:  # vLLM keeps the parts of a fused matrix until it has all of them
            copies = ((name, tensor.detach().clone()) for name, tensor in weights)
            self._llm.collective_rpc("load", kwargs={"weights": copies})
        self._weights_here = True
        self._forget_cache()

    def _release(self, tree: Hashable) -> None:
        """Leave the tree's cache entries to vLLM, which drops them when it needs the room."""

    def _forget_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget its cache: requests are still running")

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1 if self.config.sleep == "host" else 2)
            self._weights_here = False

    def _wake(self) -> None:
        if self._sleeps:
            torch.cuda.empty_cache()
            if not self._weights_here:
                self._wake_part("weights")
                if self.config.sleep == "drop":
                    self._restore_weights()
                self._weights_here = True
            self._wake_part("kv_cache")

    @property
    def _sleeps(self) -> bool:
        return self.device.type == "cuda" and self.config.placement == "colocated" and self.config.sleep != "off"

    def _wake_part(self, part: str) -> None:
        self._llm.wake_up(tags=[part])

    def _restore_weights(self) -> None:
        """Take the weights that were dropped and not updated since."""
        weights = self._current_weights()
        if weights is not None:
            self._weights_here = True  # their memory is awake
            self.update_weights(weights)
        else:
            self._llm.collective_rpc("reload_weights")


@dataclass(slots=True)
class _Writing:
    """A completion in progress: the request, its stop state and the tokens so far."""

    request: Request
    forwarded: int  # number of prompt tokens that had been forwarded before the request was submitted
    stops: StopTable
    state: int = 0  # state of the stop automaton
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)  # candidates' by token, where they are asked for
    log_kept_probability: list[float] = field(
        default_factory=list  # log of the kept probability by token, where the distribution is truncated
    )
    rejected: int = 0  # tokens so far that the tokenizer does not have
    rejected_here: int = 0  # of them, those since the last token
    cached: int = -1  # number of prompt tokens found in the cache; -1 until vLLM reports it
    finish_reason: FinishReason | None = None
    stop: str | None = None

    def extend(self, output: Any, eos_ids: Sequence[int], missing: Set[int]) -> bool:
        """Take new tokens up to the end of the turn, or to one that is `missing`; return whether there is none."""
        if self.cached < 0:
            self.cached = output.num_cached_tokens or 0
        (news,) = output.outputs
        for token, entry in zip(news.token_ids, news.logprobs or (), strict=True):
            if token in missing:
                self._reject(token)
                return False
            self.rejected_here = 0
            self.token_ids.append(int(token))
            self.logprobs.append(float(entry[token].logprob))
            if self.request.sampling.top_logprobs:  # the sampled token is among them
                self.top_logprobs.append([float(candidate.logprob) for candidate in entry.values()])
            self.state = int(self.stops.next_state[self.state, token])
            found = int(self.stops.found[self.state])
            if token in eos_ids:
                self.finish_reason = "eos"
                return True
            if found >= 0:
                self.finish_reason, self.stop = "stop", self.stops.stops[found]
                return True
        if output.finished:
            if news.finish_reason != "length":
                raise RuntimeError(f"vLLM aborted turn {self.request.turn_key}: {news.finish_reason}")
            self.finish_reason = "length"
        return True

    def _reject(self, token: int) -> None:
        """Count a token that the tokenizer does not have. Raise EngineError where one follows the other."""
        self.rejected += 1
        self.rejected_here += 1
        if self.rejected_here > _MOST_REJECTED:
            raise EngineError(
                f"turn {self.request.turn_key}: the model went on with token {token} or others that the tokenizer does "
                f"not have, {self.rejected_here} times: do model and tokenizer belong together?"
            )

    def completion(self) -> Completion:
        """Return the completion of the finished turn."""
        assert self.finish_reason is not None
        policy = self.logprobs
        if self.log_kept_probability:
            policy = np.add(self.logprobs, self.log_kept_probability).tolist()
        return Completion(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            policy_logprobs=policy,
            finish_reason=self.finish_reason,
            stop=self.stop,
            top_logprobs=self.top_logprobs if self.request.sampling.top_logprobs else None,
        )


def _truncated(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
