"""Convolution and recurrences over the segments of a row, by transformers' own functions or the kernels behind them.

Each function here takes the place of one that a layer of transformers calls, with the same arguments but for the first
two. What it runs in the end is that one (`plain`): a kernel of flash-linear-attention, mamba-ssm or causal-conv1d where
the package is installed and the tensors are on a GPU, else plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from atpo_fast.recurrent.carried import CarriedStates

Scan = Callable[[Sequence[Tensor], Tensor | None], tuple[Tensor, Tensor]]
"""From padded inputs (n, S, ...) and initial states (n, ...) or none to outputs (n, S, ...) and end states (n, ...)."""

_CHUNK_ON_CPU = 32  # tokens: PyTorch's versions fill up to whole chunks, and turns are short


def convolve(
    layer: int,
    plain: Callable[..., Tensor],
    inputs: Tensor,  # (1, C, T)
    weight: Tensor,  # (C, W+1)
    bias: Tensor | None = None,  # (C,)
    activation: str | None = None,
    *,
    seq_idx: CarriedStates,
    **_: Any,
) -> Tensor:
    """Convolve each token with the W before it on its path, in one call; return (1, C, T)."""
    width = weight.shape[-1] - 1
    windows = seq_idx.segments.windows(width)
    known = seq_idx.continue_inputs(layer, inputs[0].transpose(0, 1), width)
    extended = known.index_select(0, windows.extended).transpose(0, 1)
    out = plain(extended[None].contiguous(), weight, bias, activation=activation)
    return out.index_select(2, windows.own)


def gated_delta_rule(
    layer: int,
    plain: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,  # (1, T, H, dk)
    key: Tensor,  # (1, T, H, dk)
    value: Tensor,  # (1, T, H, dv)
    *,
    g: Tensor,  # (1, T, H) log of the decay
    beta: Tensor,  # (1, T, H)
    use_qk_l2norm_in_kernel: bool,
    seq_idx: CarriedStates,
    **_: Any,
) -> tuple[Tensor, None]:
    """Run Gated DeltaNet's recurrence over the row; return (1, T, H, dv). Padding has no key and does not decay."""

    def scan(inputs: Sequence[Tensor], initial: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, decay, step = inputs
        chunk = {} if q.is_cuda else {"chunk_size": min(_CHUNK_ON_CPU, q.shape[1])}
        states = {"initial_state": initial, "output_final_state": True}
        return plain(q, k, v, g=decay, beta=step, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **states, **chunk)

    return _run(scan, [query[0], key[0], value[0], g[0], beta[0]], layer, seq_idx)[None], None


def state_space(
    layer: int,
    plain: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,  # (1, T, H, p)
    dt: Tensor,  # (1, T, H)
    decay: Tensor,  # (H,) log of the decay for a step of 1
    into: Tensor,  # (1, T, G, n)
    out_of: Tensor,  # (1, T, G, n)
    *,
    chunk_size: int,
    D: Tensor,  # (H,) factor of the input that goes straight to the output
    dt_bias: Tensor,  # (H,)
    dt_limit: tuple[float, float],
    seq_idx: CarriedStates,
    **_: Any,
) -> Tensor:
    """Run Mamba2's recurrence over the row; return (1, T, H, p). Padding takes steps of length 0.

    The steps are computed here, because the limits of their length hold for tokens only.
    """
    steps = softplus(dt[0] + dt_bias.to(dt.dtype)).clamp(*dt_limit)

    def scan(inputs: Sequence[Tensor], initial: Tensor | None) -> tuple[Tensor, Tensor]:
        x, step, b, c = inputs
        chunk = chunk_size if x.is_cuda else min(chunk_size, _CHUNK_ON_CPU, x.shape[1])
        return plain(x, step, decay, b, c, chunk_size=chunk, D=D, initial_states=initial, return_final_states=True)

    return _run(scan, [hidden[0], steps, into[0], out_of[0]], layer, seq_idx)[None]


def no_fused_layer(*_: Any, **__: Any) -> None:
    """Stand in for the kernel that runs a whole Mamba2 layer and knows no initial states: there is none."""
    return


def _run(scan: Scan, inputs: Sequence[Tensor], layer: int, carried: CarriedStates) -> Tensor:
    """Run a recurrence level by level, all segments of a level in one call; inputs and output are (T, ...)."""
    segments = carried.segments
    sizes = [level.count * level.width for level in segments.levels]
    batches = [_pad(x, segments.padded).split(sizes) for x in inputs]
    states = carried.initial(layer, inputs[0])
    outputs = []
    for number, level in enumerate(segments.levels):
        shape = (level.count, level.width)
        batch = [parts[number].view(*shape, *parts[number].shape[1:]) for parts in batches]
        out, states = scan(batch, None if states is None else states.index_select(0, level.source))
        outputs.append(out.reshape(sizes[number], *out.shape[2:]))
    assert states is not None
    return carried.final(layer, torch.cat(outputs).index_select(0, segments.unpadded), states)


def _pad(values: Tensor, places: Tensor) -> Tensor:  # (T, ...), (P,) -> (P, ...)
    """Gather tokens into padded batches; the place of no token is T, and its value 0."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])]).index_select(0, places)
