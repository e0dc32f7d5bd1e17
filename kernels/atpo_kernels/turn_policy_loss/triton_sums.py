"""What the kernels of both layouts share: the loss of a block of tokens, the sums over it, and their last reduction.

A program (of a turn or of a row) leaves one column of partial sums; `_finish_kernel` adds up the columns in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from atpo_kernels.turn_policy_loss.layout import LossArguments
from atpo_kernels.turn_policy_loss.torch_path import Evaluation
from atpo_kernels.turn_policy_loss.triton_launch import Launch, empty
from atpo_kernels.turn_policy_loss.triton_terms import approximate_kl, clamp_min, token_terms

# Rows of the partial sums. The first are sums over tokens, all but LOSS over the counted ones (W0 > 0).
LOSS, CLIP_LOW, CLIP_HIGH, APPROX_KL, RATIO, ENTROPY, REF_KL, TOKENS = (tl.constexpr(i) for i in range(8))
RATIO_MAX, TURNS, UNITS = (tl.constexpr(i) for i in range(8, 11))
ROWS = tl.constexpr(11)
PADDED_ROWS = tl.constexpr(16)  # the next power of 2
# columns of the partial sums at a time, and derivatives per program
GPU_BLOCKS = (1024, 2048)
_BLOCKS = {"cpu": (16, 64)}  # others: GPU_BLOCKS
_METRICS = {
    "clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "approx_kl": APPROX_KL, "ratio_mean": RATIO, "ratio_max": RATIO_MAX,
    "turns": TURNS, "tokens": TOKENS, "entropy": ENTROPY, "ref_kl": REF_KL,
}  # fmt: skip


@triton.jit
def load(pointer, base, t, valid):
    """Elements base + t in float32, 0 where not valid, whatever lies there."""
    return tl.load(pointer + base + t, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def is_valid(mask, base, t, inside):
    """Which tokens count: those inside, where the mask (None: everywhere) is not 0."""
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + base + t, mask=inside, other=0) != 0)
    return valid


@triton.jit
def log_ratios(logprob, old_logprob, base, t, valid):
    """logprob - old_logprob; 0 where old_logprob is None, which stands for the current one."""
    current = load(logprob, base, t, valid)
    old = current
    if old_logprob is not None:
        old = load(old_logprob, base, t, valid)
    return current - old


@triton.jit
def load_weights(
    advantages, weight_pos, weight_neg, weight_all, base, t, owner, valid, share, BY_TOKEN: tl.constexpr
):  # fmt: skip
    """W+, W-, W0 of a block of tokens, from weights or from the advantages of the tokens or their owner (turn, row)."""
    if advantages is None:
        pos, neg = load(weight_pos, base, t, valid), load(weight_neg, base, t, valid)
        every = load(weight_all, base, t, valid)
    else:
        every = tl.where(valid, share, 0.0)
        if BY_TOKEN:
            advantage = load(advantages, base, t, valid)
        else:
            advantage = tl.where(valid, tl.load(advantages + owner).to(tl.float32), 0.0)
        pos, neg = every * clamp_min(advantage, 0.0), every * clamp_min(-advantage, 0.0)
    return pos, neg, every


@triton.jit
def no_sums():
    """Sums over no tokens: rows LOSS to TOKENS, and RATIO_MAX."""
    zero = tl.full((), 0.0, tl.float32)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def evaluate_tokens(
    sums, base, t, inside, valid, gain, slope, ratio, cut_low, cut_high, every,
    logprob, old_logprob, ref_logprob, rollout_logprob, entropy, coef, entropy_slope, value,
    max_log_ratio, importance_cap, kl_coef, entropy_coef, CLIP: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Store derivatives (and the loss by token) of a block of tokens with this policy term; add the block to `sums`."""
    # 1. inputs; None where the loss does not read them
    current = load(logprob, base, t, valid)
    old = current
    if old_logprob is not None:
        old = load(old_logprob, base, t, valid)
    ref = None
    if ref_logprob is not None:
        ref = load(ref_logprob, base, t, valid)
    rollout = None
    if rollout_logprob is not None:
        rollout = load(rollout_logprob, base, t, valid)
    spread = tl.zeros_like(current)
    if entropy is not None:
        spread = load(entropy, base, t, valid)
    bonus = None
    if entropy_slope is not None:
        bonus = spread
    # 2. value and derivatives
    loss, up, up_entropy, kl = token_terms(
        gain, slope, current, old, ref, rollout, bonus, every, importance_cap, kl_coef, entropy_coef, CLIP, KL
    )  # fmt: skip
    loss = tl.where(valid, loss, 0.0)
    tl.store(coef + base + t, tl.where(valid, up, 0.0), mask=inside)
    if entropy_slope is not None:
        tl.store(entropy_slope + base + t, up_entropy, mask=inside)
    if value is not None:
        tl.store(value + base + t, loss, mask=inside)
    # 3. sums, in the order of the rows
    counted = every > 0
    ratio = tl.where(counted, ratio, 0.0)
    return (
        sums[0] + tl.sum(loss, 0),
        sums[1] + tl.sum(tl.where(counted, cut_low, 0.0), 0),
        sums[2] + tl.sum(tl.where(counted, cut_high, 0.0), 0),
        sums[3] + tl.sum(tl.where(counted, approximate_kl(current - old, max_log_ratio), 0.0), 0),
        sums[4] + tl.sum(ratio, 0),
        sums[5] + tl.sum(tl.where(counted, spread, 0.0), 0),
        sums[6] + tl.sum(tl.where(counted, kl, 0.0), 0),
        sums[7] + tl.sum(tl.where(counted, 1.0, 0.0), 0),
        tl.maximum(sums[8], tl.max(ratio, 0)),
    )


@triton.jit
def store_sums(sums, turns, units, partial, column, columns):
    """Write one column of the partial sums (ROWS, columns)."""
    for i in tl.static_range(TOKENS + 1):
        tl.store(partial + i * columns + column, sums[i])
    tl.store(partial + RATIO_MAX * columns + column, sums[RATIO_MAX])
    tl.store(partial + TURNS * columns + column, turns)
    tl.store(partial + UNITS * columns + column, units)


@triton.jit
def written_columns(turn_offsets, column, columns):
    """Which columns of the partial sums there are; turns without tokens may have left theirs unwritten."""
    inside = column < columns
    if turn_offsets is not None:
        end = tl.load(turn_offsets + column + 1, mask=inside, other=0)
        inside = inside & (tl.load(turn_offsets + column, mask=inside, other=0) < end)
    return inside


@triton.jit(do_not_specialize=["columns", "tokens"])
def _finish_kernel(
    partial, turn_offsets, result, coef, entropy_slope, columns, tokens,
    PER_UNIT: tl.constexpr, BLOCK: tl.constexpr, TOKENS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and metrics from the partial sums, by program 0. PER_UNIT: divide loss and derivatives by the units.

    The units (tokens or turns of the whole batch) are not known before every column is, so each program adds them up
    and divides its own block of the derivatives.
    """
    program = tl.program_id(0)
    share = 1.0
    if PER_UNIT:
        # 1. the derivatives
        count = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = written_columns(turn_offsets, column, columns)
            count += tl.load(partial + UNITS * columns + column, mask=inside, other=0.0)
        share = 1 / clamp_min(tl.sum(count, 0), 1.0)
        at = program.to(tl.int64) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
        tl.store(coef + at, tl.load(coef + at, mask=at < tokens) * share, mask=at < tokens)
        if entropy_slope is not None:
            tl.store(entropy_slope + at, tl.load(entropy_slope + at, mask=at < tokens) * share, mask=at < tokens)
    if program == 0:
        # 2. every row of the partial sums
        row = tl.arange(0, PADDED_ROWS)
        total = tl.zeros((PADDED_ROWS, BLOCK), tl.float32)
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = written_columns(turn_offsets, column, columns)
            place = row[:, None] * columns + column[None, :]
            total += tl.load(partial + place, mask=(row < ROWS)[:, None] & inside[None, :], other=0.0)
            peak = tl.maximum(peak, tl.load(partial + RATIO_MAX * columns + column, mask=inside, other=0.0))
        # 3. sums to means
        values = tl.sum(total, 1)
        counted = tl.sum(tl.where(row == TOKENS, values, 0.0), 0)
        values = tl.where((row > LOSS) & (row < TOKENS), values / clamp_min(counted, 1.0), values)
        values = tl.where(row == LOSS, values * share, values)
        values = tl.where(row == RATIO_MAX, tl.max(peak, 0), values)
        tl.store(result + row, values)


@dataclass(slots=True)
class Outputs:
    """What the kernels of one call write."""

    coef: Tensor  # (A,) float32
    entropy_slope: Tensor | None  # (A,) float32; None: the loss has no gradient through the entropy
    value: Tensor | None  # (A,) float32 loss by token; None: its sum is wanted
    partial: Tensor  # (ROWS, columns) float32
    result: Tensor  # (PADDED_ROWS,) float32 loss and metrics in the order of the rows
    metrics: tuple[str, ...]

    @classmethod
    def empty(cls, arguments: LossArguments, columns: int) -> Outputs:
        """For partial sums of that many programs."""
        logprob, config = arguments.inputs.logprob, arguments.config
        tokens = logprob.numel()
        absent = {"entropy": arguments.inputs.entropy is None, "ref_kl": not config.needs_reference}
        return cls(
            coef=empty(logprob, tokens),
            entropy_slope=empty(logprob, tokens) if config.needs_entropy else None,
            value=empty(logprob, tokens) if arguments.by_token else None,
            partial=empty(logprob, ROWS.value, columns),
            result=empty(logprob, PADDED_ROWS.value),
            metrics=tuple(name for name in _METRICS if not absent.get(name, False)),
        )

    def pointers(self) -> dict[str, Tensor | None]:
        """Under the names that the kernels give them."""
        return {"coef": self.coef, "entropy_slope": self.entropy_slope, "value": self.value, "partial": self.partial}

    def last_launch(self, per_unit: bool, turn_offsets: Tensor | None) -> Launch:
        """The reduction of the partial sums, of rows or, with turn_offsets (N+1,), of turns."""
        block, tokens_block = _BLOCKS.get(self.coef.device.type, GPU_BLOCKS)
        return Launch(
            kernel=_finish_kernel,
            programs=max(triton.cdiv(len(self.coef), tokens_block), 1) if per_unit else 1,
            arguments={
                "partial": self.partial,
                "turn_offsets": turn_offsets,
                "result": self.result,
                "coef": self.coef,
                "entropy_slope": self.entropy_slope,
                "columns": self.partial.shape[1],
                "tokens": len(self.coef),
            },
            constants={"PER_UNIT": per_unit, "BLOCK": block, "TOKENS_BLOCK": tokens_block},
            num_warps=8,
        )

    def evaluation(self) -> Evaluation:
        """As the other implementations return it."""
        values = self.result.unbind()
        metrics = {name: values[_METRICS[name].value] for name in self.metrics}
        return Evaluation(values[0] if self.value is None else self.value, self.coef, self.entropy_slope, metrics)
