"""Turn-level policy loss straight from hidden states: LM head and loss in one.

See docs/design.md#gradient-in-the-forward.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from atpo_kernels.arguments import Averaging, LossArguments, LossInputs, Structure, loss_config
from atpo_kernels.checks import check_arguments, check_linear
from atpo_kernels.choices import Reduction
from atpo_kernels.devices import eager, kernel_context
from atpo_kernels.dispatch import choose
from atpo_kernels.linear_turn_policy_loss.reference import linear_turn_policy_loss_reference
from atpo_kernels.linear_turn_policy_loss.torch_impl import linear_turn_policy_loss_torch
from atpo_kernels.records import HeadOptions, LeafPaths, LinearTurnLoss, LossConfig, TokenWeights

__all__ = ["linear_turn_policy_loss"]


@eager
def linear_turn_policy_loss(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64 or int32
    old_logprob: Tensor | None,  # (A,)
    advantages: Tensor | None = None,  # (N,) or (A,)
    *,
    turn_offsets: Tensor,  # (N+1,) int32, on the device or on the CPU
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    weights: TokenWeights | None = None,  # (A,) each
    paths: LeafPaths | None = None,
    ref_logprob: Tensor | None = None,  # (A,)
    rollout_logprob: Tensor | None = None,  # (A,)
    reduction: Reduction | None = None,
    denominator: float | Tensor | None = None,
    clip_low: float | Tensor | None = None,  # () or (N,)
    clip_high: float | Tensor | None = None,  # () or (N,)
    config: LossConfig | None = None,
    impl: str = "auto",
    **overrides: Any,
) -> LinearTurnLoss:
    """Compute `turn_policy_loss` of `linear_logprob` on packed turns, with the gradient in the forward.

        logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
        return turn_policy_loss(logprob, old_logprob, advantages, turn_offsets=turn_offsets, entropy=entropy, ...)

    Arguments as in those two operators; `reduction` may be anything that packed turns allow but "none". Logits of a
    chunk of whole turns exist at a time; as a turn's ratio is known once its chunk's logits are, the gradients of
    hidden, weight and bias are formed from them at once and the backward only scales them. Tokens whose coefficient is
    zero (clipped, of zero weight) are skipped: they are left out of those products. Only a turn that is longer than a
    chunk, and level "sequence" when there are more rows than a chunk has, compute the logits a second time.

    Without gradients (torch.no_grad, or no input that requires one) none are computed. `old_logprob=None` takes the
    current log-probs (the first pass over freshly sampled data: every ratio is 1). The chunks are planned on the host:
    give `turn_offsets` on the CPU, or there is one wait for the device, and an error while a CUDA graph is captured.
    Memory beside inputs and outputs: a scratch buffer of at most 0.95 GB on a GPU whatever A is, and the weight's
    gradient is summed in float32 (V, D), then cast.

    Returns LinearTurnLoss: the fields of TurnLoss, and `logprob` and `entropy` (A,), detached.
    Raises ValueError as `linear_logprob` and `turn_policy_loss` do.
    """
    options = HeadOptions(temperature, softcap)
    check_linear("linear_turn_policy_loss", hidden, weight, targets, bias, options)
    config, turn_clip = loss_config(config, clip_low, clip_high, overrides)
    reduction = reduction or "sum"
    if reduction not in get_args(Reduction) or reduction == "none":
        raise ValueError(
            f"linear_turn_policy_loss: reduction={reduction!r}: must be 'sum', 'token-mean' or 'turn-mean'. For the "
            "loss by token call linear_logprob and turn_policy_loss(reduction='none')"
        )
    # in the place of what the head is about to compute
    unknown = torch.zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    inputs = LossInputs(unknown, old_logprob, ref_logprob, rollout_logprob, unknown)
    structure = Structure(turn_offsets.to(hidden.device, non_blocking=True), paths=paths)
    averaging = Averaging(reduction, denominator=denominator)
    arguments = LossArguments(inputs, advantages, weights, structure, averaging, config, turn_clip)
    check_arguments(arguments)
    known_paths = {"torch": linear_turn_policy_loss_torch, "reference": linear_turn_policy_loss_reference}
    impl = "torch" if impl == "auto" and softcap is not None else impl  # no kernel has it
    run = choose("linear_turn_policy_loss", impl, hidden.device, known_paths, hidden.dtype)
    with kernel_context(hidden):
        return run(hidden, weight, targets.long(), bias, options, arguments, turn_offsets)
