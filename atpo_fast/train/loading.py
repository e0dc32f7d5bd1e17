"""Load the model that is trained; under ZeRO-3 so that no rank ever holds it whole (docs/several_machines.md#loading).

DeepSpeed partitions a model that is there. Here each weight is partitioned as soon as transformers has read it and put
it into its module, so names, joined experts, dtypes, tied weights and buffers are those that transformers makes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from atpo_fast.config import Config
from atpo_fast.policy import load_model
from atpo_fast.train.zero import deepspeed_config

_LOG = logging.getLogger(__name__)
_LOADED = "_is_hf_initialized"  # what transformers marks a weight with that comes from a file
_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"  # keeps transformers from reading ahead


def load_for_training(config: Config, folder: Path | str) -> PreTrainedModel:
    """Load the model in a Hugging Face folder as DeepSpeed is going to train it; under ZeRO-3 a collective.

    Under ZeRO-3 a rank then holds its share of each weight, and while loading one weight more. The model is the one
    that `load_model` would load, on the device of the rank.

    Raises FileNotFoundError when the path is not a model folder.
    """
    dtype = getattr(torch, config.model.dtype)
    settings = deepspeed_config(config.deepspeed, config.model, config.optim)
    if settings.get("zero_optimization", {}).get("stage") != 3:
        return load_model(folder, dtype)
    partition = _Partition(settings, dtype)
    with partition.of_what_is_loaded(), _one_at_a_time():
        model = load_model(folder, dtype)
    partition.untie_different(model)
    if not partition.places:
        _warn(f"{folder}: every rank has loaded all weights, because transformers does not tell which it has read")
    for module in model.modules():  # DeepSpeed takes a model with partitioned weights to be on its device
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(partition.device))
    return model


class _Partition:
    """What partitions weights as DeepSpeed's engine would, and knows in which modules they were put."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype):
        intra_node: Any = groups._get_zero_param_intra_parallel_group()  # of ZeRO++; made once in a process
        self._init = deepspeed.zero.Init(
            module=nn.Module(), config_dict_or_path=settings, dtype=dtype, zero_param_parallel_group=intra_node
        )
        self._dtype = dtype
        self.device: torch.device = self._init.local_device
        self.places: list[tuple[nn.Module, str, Parameter]] = []

    @contextmanager
    def of_what_is_loaded(self) -> Iterator[None]:
        """Partition each weight that comes from a file when it is put into a module; all ranks in the same order."""
        hook = register_module_parameter_registration_hook(self._take)
        try:
            yield
        finally:
            hook.remove()

    def _take(self, module: nn.Module, name: str, parameter: Parameter | None) -> None:
        if parameter is None or parameter.is_meta or hasattr(parameter, "ds_id") or not hasattr(parameter, _LOADED):
            return
        # A copy, because DeepSpeed writes into it, and a page of a mapped file that is written to is kept.
        wanted = self._dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(self.device, wanted, copy=True)
        self._init._convert_to_zero_parameters([parameter])
        self.places.append((module, name, parameter))

    def untie_different(self, model: PreTrainedModel) -> None:
        """Put back the weights that transformers has tied to others without seeing that they differ.

        It ties two weights of a file where they are equal, and partitioned ones look so.
        """
        for module, name, loaded in self.places:
            kept = getattr(module, name)
            if kept is loaded:
                continue
            with deepspeed.zero.GatheredParameters([kept, loaded]):
                same = torch.equal(kept, loaded)
            if not same:
                setattr(module, name, loaded)
                path = next(path for path, found in model.named_modules() if found is module)
                model.all_tied_weights_keys.pop(f"{path}.{name}")
                _warn(f"{path}.{name} is not tied, because the files hold another weight than where it would be")


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SEQUENTIAL)
        if before is not None:
            os.environ[_SEQUENTIAL] = before


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        _LOG.warning(message)
