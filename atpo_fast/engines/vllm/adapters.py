"""LoRA adapters in vLLM: written as PEFT's files, which vLLM reads from a folder, and named by every request.

The weights below them stay those of the engine's folder. The workers are on this machine, and read the same folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from atpo_fast.adapters import AdapterSettings, add_adapters, save_adapters

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def adapter_options(settings: AdapterSettings) -> dict[str, Any]:
    """Compute the arguments of `vllm.LLM` that make room for one set of adapters.

    Raises ValueError for a rank that vLLM has no room for.
    """
    room = next((rank for rank in _RANKS if rank >= settings.rank), None)
    if room is None:
        raise ValueError(f"model.lora.rank={settings.rank}: vLLM has room for {_RANKS[-1]}; set in_engine=merged")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def adapted_model(model: PretrainedConfig, settings: AdapterSettings) -> Any:
    """Make a model with adapters but without memory, for names, shapes and PEFT's configuration."""
    with torch.device("meta"):
        return add_adapters(AutoModelForCausalLM.from_config(model), settings, seed=0)


class LoadedAdapters:
    """The policy's adapters in an engine of vLLM: none before the first `load`.

    Args:
        llm: the `vllm.LLM`, built with `adapter_options`.
        config: PEFT's configuration of the adapters.
    """

    def __init__(self, llm: Any, config: Any):
        self._llm, self._config = llm, config
        self._folder: TemporaryDirectory[str] | None = None
        self._number = 0
        self.request: Any = None
        """vLLM's `LoRARequest` that requests are to name; None before the first `load`."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put new weights, by the names of `adapter_weights`, in the place of the former."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        engine, former = self._llm.llm_engine, self.request
        folder = TemporaryDirectory(prefix="adapters-")
        save_adapters(self._config, copies, Path(folder.name))
        self._number += 1  # vLLM takes two requests of one name for one
        name = f"policy-{self._number}"
        self.request = import_module("vllm.lora.request").LoRARequest(name, self._number, folder.name)
        if former is not None:
            engine.remove_lora(former.lora_int_id)
        engine.add_lora(self.request)
        self._folder = folder  # the former one is deleted
