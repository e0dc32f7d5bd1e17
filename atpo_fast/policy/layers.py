"""Liger's Triton kernels for the RMSNorm, SwiGLU and RoPE of the policy's layers.

They are bound to the modules of one model. Liger's own patches also replace names in transformers' modules, and with
them the layers of every other model of the process, such as the rollout's. Parameters and their names stay.

Liger works in place: RoPE overwrites the queries and keys it is given, and the backward of each of the three overwrites
the gradient it is given or, for SwiGLU, the activations it kept. Hence one backward per forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

MODEL_TYPES = ("llama", "qwen2", "qwen3")
ROPE = "apply_rotary_pos_emb"  # what transformers' attention modules call RoPE


def use_liger(model: PreTrainedModel, device_type: str = "cuda") -> bool:
    """Let a model's layers run on Liger's kernels for tensors on such a device; the others run as before.

    Returns whether they do: False, with the model as it was, for an architecture not in `MODEL_TYPES` and without
    liger-kernel. A second call for the same model does nothing.
    """
    if model.config.model_type not in MODEL_TYPES or find_spec("liger_kernel") is None:
        return False
    backbone: Any = model.model
    if "forward" in vars(backbone.norm):
        return True
    _bind(backbone.norm, _rms_norm, device_type)
    for layer in backbone.layers:
        attention = layer.self_attn
        head_norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, *head_norms):
            _bind(norm, _rms_norm, device_type)
        if model.config.hidden_act in ("silu", "swish"):
            _bind(layer.mlp, _swiglu, device_type)
        _bind_rope(attention, device_type)
    return True


def _bind(module: Any, forward: Callable[..., Tensor], device_type: str) -> None:
    # Not a closure: of a partial, a deep copy of the model gets one over its own modules.
    module.forward = partial(_choose, device_type, partial(forward, module), module.forward)


def _bind_rope(attention: Any, device_type: str) -> None:
    """Give an attention module's forward another function under the name by which its file calls RoPE."""
    forward = type(attention).forward
    if not isinstance(forward, FunctionType) or ROPE not in forward.__code__.co_names:
        return  # another version of transformers
    names = forward.__globals__ | {ROPE: partial(_choose, device_type, _rope, forward.__globals__[ROPE])}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = MethodType(own, attention)


def _choose(device_type: str, liger: Callable[..., Any], plain: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """Call Liger's function for tensors on its device, the plain one for others and for float64, which Liger lacks."""
    return (liger if x.device.type == device_type and x.dtype != torch.float64 else plain)(x, *args)


def _rms_norm(norm: Any, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden, norm.weight, norm.variance_epsilon)


def _swiglu(mlp: Any, hidden: Tensor) -> Tensor:  # (1, T, D) -> (1, T, D)
    from liger_kernel.ops import LigerSiLUMulFunction

    return mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


def _rope(
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    cos: Tensor,  # (1, T, d)
    sin: Tensor,  # (1, T, d)
) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)
