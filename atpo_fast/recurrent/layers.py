"""Which layers with a state are known, and how they come to run over segments.

The forward of a transformers layer stays what it is. It only gets other functions under the names by which its file
calls the convolution and the recurrence (`functions.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from atpo_fast.recurrent import functions

CONVOLUTION = "causal_conv1d_fn"  # what every layer with a state calls
FUNCTIONS: dict[str, Callable[..., Any]] = {
    CONVOLUTION: functions.convolve,
    "torch_chunk_gated_delta_rule": functions.gated_delta_rule,
    "mamba2_chunk_scan": functions.state_space,
    "mamba2_split_conv1d_scan_combined": functions.no_fused_layer,
}
NEEDED: dict[str, frozenset[str]] = {
    "qwen3_next": frozenset({CONVOLUTION, "torch_chunk_gated_delta_rule"}),
    "qwen3_5_text": frozenset({CONVOLUTION, "torch_chunk_gated_delta_rule"}),
    "nemotron_h": frozenset({CONVOLUTION, "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"}),
    "granitemoehybrid": frozenset({CONVOLUTION, "mamba2_chunk_scan", "mamba2_split_conv1d_scan_combined"}),
    "lfm2": frozenset({CONVOLUTION}),
}
"""Model types whose layers with a state are known, and the functions that those layers have to call."""
STATE_TYPES = ("linear_attention", "conv")  # what transformers calls such layers in `layer_types`
TOKEN_TYPES = ("mlp", "moe")  # layers of Nemotron-H that see one token at a time


def known_types(config: PretrainedConfig) -> set[str]:
    """List the types of layers beside attention that packed rows can have in a model of this type."""
    return {*STATE_TYPES, *TOKEN_TYPES} if config.model_type in NEEDED else set()


def recurrent_layers(config: PretrainedConfig) -> list[int]:
    """List the layers of a model that have a state, if this package runs them; none for other model types."""
    types = getattr(config, "layer_types", None) or []
    return [i for i, kind in enumerate(types) if kind in STATE_TYPES] if config.model_type in NEEDED else []


def carry_states(model: PreTrainedModel) -> bool:
    """Let the layers with a state of a model run over the segments of packed rows; return whether it has any.

    They then need `seq_idx=` with the `CarriedStates` of the row. A second call for the same model does nothing new.

    Raises ValueError where a layer does not call the functions that it should: with another version of transformers.
    """
    wanted = recurrent_layers(model.config)
    if not wanted:
        return False
    needed, found = NEEDED[model.config.model_type], []
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if isinstance(forward, FunctionType) and needed <= set(forward.__code__.co_names):
            found.append(_carry(module, forward))
    if found != wanted:
        raise ValueError(
            f"{model.config.model_type}: layers {wanted} have a state, but only {found} call "
            f"{', '.join(sorted(needed))} in this version of transformers; install one that atpo-fast allows"
        )
    return True


def _carry(module: nn.Module, forward: FunctionType) -> int:
    """Give a layer's forward the functions over segments; return the layer's number."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    names = forward.__globals__
    own = {name: partial(run, layer, names[name]) for name, run in FUNCTIONS.items() if name in names}
    new = FunctionType(forward.__code__, names | own, forward.__name__, forward.__defaults__, forward.__closure__)
    new.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(new, module)
    return layer
