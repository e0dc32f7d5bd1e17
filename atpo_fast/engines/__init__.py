"""Inference engines: token ids in, token ids and log-probs out. Only this module knows which engines there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from typing_extensions import assert_never

from atpo_fast.adapters import AdapterSettings, add_adapters
from atpo_fast.config import Config, PagedConfig, ServerConfig, VLLMConfig
from atpo_fast.engines.base import Completion, Engine, EngineCounters, PathNode, Request, SamplingParams

__all__ = [
    "Completion",
    "Engine",
    "EngineCounters",
    "PathNode",
    "Request",
    "SamplingParams",
    "check_engine",
    "make_engine",
]

Weights = Iterable[tuple[str, Tensor]]


def check_engine(config: Config) -> None:
    """Raise ValueError when training could not use the configured engine, before anything expensive begins."""
    if isinstance(config.engine, VLLMConfig):
        from atpo_fast.engines.vllm.start import check_vllm

        check_vllm()
    if isinstance(config.engine, ServerConfig) and config.engine.weights_dir is None:
        raise ValueError("training with engine.name=server needs engine.weights_dir")


def make_engine(
    config: Config,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    max_positions: int,
    adapters: AdapterSettings | None = None,
    current_weights: Callable[[], Weights | None] = lambda: None,
) -> Engine:
    """Build the configured engine; only its own libraries are imported.

    Args:
        config: chooses the engine and its options.
        folder: Hugging Face folder of the model with the starting weights.
        tokenizer: the model's tokenizer.
        device: where an engine of this process runs.
        max_positions: longest path that the model can hold, prompt included.
        adapters: what the policy has beside the model's weights; an engine that holds them takes their weights alone.
        current_weights: gives the weights again to an engine that has dropped them in its sleep; where it gives None,
            `folder` has them.

    Raises:
        ValueError: an engine that is not installed, or options that fit neither each other nor the ranks.
        EngineError: servers that are not there, or that cannot do what is needed.
    """
    engine, rollout = config.engine, config.rollout
    if isinstance(engine, ServerConfig):
        from atpo_fast.engines.server.engine import ServerEngine

        return ServerEngine(folder, tokenizer, engine, temperature=rollout.temperature)
    if isinstance(engine, PagedConfig):
        from atpo_fast.engines.paged import PagedEngine

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(config, engine))
        if adapters is not None and _holds_adapters(config, engine):
            model = add_adapters(model, adapters, config.seed)
        tokens, states = engine.cache_tokens, engine.cache_states
        return PagedEngine(model, tokenizer, cache_tokens=tokens, cache_states=states, device=device)
    if isinstance(engine, VLLMConfig):
        from atpo_fast.engines.vllm.engine import VLLMEngine

        part = VLLMEngine(
            folder,
            tokenizer,
            engine,
            cache_tokens=engine.cache_tokens,
            max_positions=min(max_positions, config.data.max_prompt_tokens + rollout.max_response_tokens),
            dtype=_dtype(config, engine),
            device=device,
            truncates=rollout.top_k > 0 or rollout.top_p < 1,
            seed=config.seed,
            adapters=adapters if _holds_adapters(config, engine) else None,
            current_weights=current_weights,
        )
        return _shared(part, engine.tensor_parallel) if engine.placement == "colocated" else part
    assert_never(engine)


def _dtype(config: Config, engine: PagedConfig | VLLMConfig) -> torch.dtype:
    """Return the dtype of an engine's weights and cache."""
    dtype: torch.dtype = torch.float32 if engine.cache_dtype == "float32" else getattr(torch, config.model.dtype)
    return dtype


def _holds_adapters(config: Config, engine: PagedConfig | VLLMConfig) -> bool:
    """Tell whether the engine is to hold adapters, if there are any, or gets merged weights."""
    wanted = config.model.lora.in_engine
    return wanted == "adapters" or (wanted == "auto" and _dtype(config, engine) == torch.bfloat16)


def _shared(part: Engine, ranks: int) -> Engine:
    """Join the parts of an engine that each `ranks` neighbouring ranks share; a collective."""
    if ranks == 1:
        return part
    from atpo_fast.engines.tensor_parallel import SharedEngine

    groups = [list(range(first, first + ranks)) for first in range(0, dist.get_world_size(), ranks)]
    mine: dist.ProcessGroup = dist.new_subgroups_by_enumeration(groups, backend="gloo")[0]
    return SharedEngine(part, mine)
