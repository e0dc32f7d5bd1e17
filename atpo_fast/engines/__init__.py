"""Inference engines: token ids in, token ids and log-probs out. Only this module knows which engines there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from atpo_fast.config.schema import Config
from atpo_fast.engines.base import (
    Completion,
    Engine,
    EngineCounters,
    EngineError,
    PathNode,
    Request,
    SamplingParams,
    find_engine_error,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineCounters",
    "EngineError",
    "PathNode",
    "Request",
    "SamplingParams",
    "check_engine",
    "find_engine_error",
    "make_engine",
]

Weights = Iterable[tuple[str, Tensor]]


def check_engine(config: Config) -> None:
    """Raise ValueError when training could not use the configured engine, before anything expensive begins."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        from atpo_fast.engines.vllm.start import check_vllm

        check_vllm()
    if rollout.engine == "server" and rollout.server.weights_dir is None:
        raise ValueError("training with rollout.engine=server needs rollout.server.weights_dir")


def make_engine(
    config: Config,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    max_positions: int,
    current_weights: Callable[[], Weights | None] = lambda: None,
) -> Engine:
    """Build the configured engine; only its own libraries are imported.

    Args:
        config: chooses the engine and its options.
        folder: Hugging Face folder of the model with the starting weights.
        tokenizer: the model's tokenizer.
        device: where an engine of this process runs.
        max_positions: longest path that the model can hold, prompt included.
        current_weights: gives the weights again to an engine that has dropped them in its sleep; None: `folder` has
            them.

    Raises:
        ValueError: an engine that is not installed, or options that fit neither each other nor the ranks.
        EngineError: servers that are not there, or that cannot do what is needed.
    """
    rollout = config.rollout
    dtype = torch.float32 if rollout.cache_dtype == "float32" else getattr(torch, config.model.dtype)
    if rollout.engine == "server":
        from atpo_fast.engines.server.engine import ServerEngine

        return ServerEngine(folder, tokenizer, rollout.server, temperature=rollout.temperature)
    if rollout.engine == "vllm":
        from atpo_fast.engines.vllm.engine import VLLMEngine

        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        engine = VLLMEngine(
            folder,
            tokenizer,
            rollout.vllm,
            cache_tokens=rollout.cache_tokens,
            max_positions=min(max_positions, longest),
            dtype=dtype,
            device=device,
            truncates=rollout.top_k > 0 or rollout.top_p < 1,
            seed=config.seed,
            current_weights=current_weights,
        )
        colocated = rollout.vllm.placement == "colocated"
        return _shared(engine, rollout.vllm.tensor_parallel) if colocated else engine
    from atpo_fast.engines.paged import PagedEngine

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PagedEngine(model, tokenizer, cache_tokens=rollout.cache_tokens, device=device)


def _shared(part: Engine, ranks: int) -> Engine:
    """Join the parts of an engine that each `ranks` neighbouring ranks share; a collective."""
    if ranks == 1:
        return part
    from atpo_fast.engines.tensor_parallel import SharedEngine

    groups = [list(range(first, first + ranks)) for first in range(0, dist.get_world_size(), ranks)]
    mine: dist.ProcessGroup = dist.new_subgroups_by_enumeration(groups, backend="gloo")[0]
    return SharedEngine(part, mine)
