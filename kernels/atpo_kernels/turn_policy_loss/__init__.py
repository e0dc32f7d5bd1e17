"""Turn-level policy loss on log-probs, for packed trees and for padded batches (docs/design.md#objective)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atpo_kernels.arguments import Averaging, LossArguments, LossInputs, Structure, loss_config
from atpo_kernels.autograd import attach_gradients
from atpo_kernels.checks import check_arguments
from atpo_kernels.choices import Reduction, check_choice
from atpo_kernels.devices import eager, kernel_context
from atpo_kernels.dispatch import choose
from atpo_kernels.records import LeafPaths, LossConfig, TokenWeights, TurnLoss
from atpo_kernels.turn_policy_loss.reference import turn_policy_loss_reference
from atpo_kernels.turn_policy_loss.torch_impl import turn_policy_loss_torch

__all__ = ["turn_policy_loss"]


@eager
def turn_policy_loss(
    logprob: Tensor,  # (A,) or (B, T)
    old_logprob: Tensor | None,  # same shape
    advantages: Tensor | None = None,  # packed: (N,) or (A,); padded: (B,), (B, 1) or (B, T)
    *,
    turn_offsets: Tensor | None = None,  # (N+1,) int32, on the device or on the CPU
    mask: Tensor | None = None,  # same shape as logprob
    turn_ids: Tensor | None = None,  # (B, T) int
    weights: TokenWeights | None = None,  # same shape as logprob
    paths: LeafPaths | None = None,
    ref_logprob: Tensor | None = None,  # same shape as logprob
    rollout_logprob: Tensor | None = None,  # same shape as logprob
    entropy: Tensor | None = None,  # same shape as logprob
    reduction: Reduction | None = None,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
    clip_low: float | Tensor | None = None,  # () or, packed, (N,)
    clip_high: float | Tensor | None = None,  # () or, packed, (N,)
    config: LossConfig | None = None,
    impl: str = "auto",
    **overrides: Any,
) -> TurnLoss:
    """Compute the clipped policy loss with one importance ratio per token, turn or sequence.

        ratio = (logprob - old_logprob)[turn].mean().exp()    # one turn, straight-through; then, with its share w,
        loss = -w * torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)    # added up over tokens

    Layouts. *Packed*: with `turn_offsets` (CSR over the A axis), tensors are (A,). *Padded*: without, tensors are
    (B, T), a row is a sequence, and turns are the maximal runs of ones of `mask` in a row (all ones if not given), or
    the tokens of a row with equal `turn_ids` in [0, T): these may have masked tokens between them, but none of another
    turn. A 1-D tensor without `turn_offsets` is one padded row.

    Weights. Either `advantages`, aggregated by `reduction`, or `weights` = (W+, W-, W0) that already hold advantages
    and aggregation (docs/design.md#aggregation). `reduction` is, with |y| the action tokens of a row, K its turns, a a
    turn:

        seq-mean-token-mean      1/B sum 1/|y| sum      the default of padded batches, and the published one
        token-mean               1/sum|y|
        seq-mean-token-sum       1/B
        seq-mean-token-sum-norm  1/(B max_length)       TRL's dr_grpo; verl divides by max_length only, which is
                                                        denominator=1; max_length defaults to T
        turn-mean                1/(B K |a|)
        sum                      the default with `weights` and on packed turns
        none                     loss by token in the shape of logprob, 0 where masked

    B counts every row: one without action tokens adds 0 to the sum and 1 to B. `denominator` replaces B (the number
    of tokens for token-mean) for callers that know the count over all ranks and micro-batches. Packed turns do not
    say which of them form a sequence, so seq-* needs `weights` there, and turn-mean takes them for one sequence.

    Level "sequence" on packed turns needs `weights` and `paths`; its policy term uses the weights in `paths`.
    `old_logprob=None` takes the current log-probs: every ratio is 1.
    `config` (default LossConfig()) holds the loss; `overrides` are fields of it, as in `dual_cap=3.0`. So are
    `clip_low` and `clip_high`, which on packed turns may also be tensors: one clip range for each turn.
    Inputs outside the mask may be anything, inf and nan included. bfloat16 and float16 are computed in float32,
    float64 in float64. Nothing waits for the device. `impl`: "auto" (Triton on CUDA, but for float64; else "torch"),
    "torch", "reference" (autograd), "triton": two kernel launches.

    Returns TurnLoss: `loss`, differentiable in logprob and entropy; `coef` = d loss / d logprob, exact, without the
    way through the entropy; `metrics`, detached 0-dim tensors. All but ratio_max, turns and tokens are means over the
    action tokens with W0 > 0: average over rows or ranks with `tokens` as weight. clipped_low (clipped_high): share of
    these tokens for which the lower (upper) bound takes the place of the ratio: W- > 0 and ratio < 1 - clip_low (W+ > 0
    and ratio > 1 + clip_high, or ratio > dual_cap with W- > 0); any sign for cispo; sapo has the cap only. approx_kl:
    k3 of old against new. ratio_mean, ratio_max, and entropy and ref_kl where given and used. At level "sequence" on
    packed turns, ratio and clipping of a token are means over the trajectories through it.

    Raises ValueError for shapes, names or combinations that do not fit, such as clip ranges of turns with level
    "sequence"; on the CPU also for turn_offsets that do not end at A and turn_ids that are out of range or interrupted.
    """
    config, turn_clip = loss_config(config, clip_low, clip_high, overrides)
    if reduction is None:
        reduction = "sum" if weights is not None or turn_offsets is not None else "seq-mean-token-mean"
    check_choice("turn_policy_loss: reduction", reduction, Reduction)
    if advantages is not None and turn_offsets is None and advantages.shape == (*logprob.shape[:1], 1):
        advantages = advantages[:, 0]
    tensors = LossInputs(logprob, old_logprob, ref_logprob, rollout_logprob, entropy)
    if turn_offsets is not None:
        turn_offsets = turn_offsets.to(logprob.device, non_blocking=True)
    structure = Structure(turn_offsets, mask, turn_ids, paths)
    averaging = Averaging(reduction, max_length, denominator)
    arguments = LossArguments(tensors, advantages, weights, structure, averaging, config, turn_clip)
    check_arguments(arguments)
    implementations = {"torch": turn_policy_loss_torch, "reference": turn_policy_loss_reference}
    run = choose("turn_policy_loss", impl, logprob.device, implementations, logprob.dtype)
    with kernel_context(logprob):
        result = run(arguments)
    coef = result.grad_logprob.view(logprob.shape)
    grad_entropy = None if result.grad_entropy is None else result.grad_entropy.view(logprob.shape)
    value = result.loss.view(logprob.shape) if reduction == "none" else result.loss
    if torch.is_grad_enabled():
        value = attach_gradients(value, (logprob, entropy), (coef, grad_entropy))
    return TurnLoss(value, result.metrics, coef)
