"""The policy loss of packed turns: one program per turn, whatever its length."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atpo_kernels.turn_policy_loss.layout import LossArguments
from atpo_kernels.turn_policy_loss.torch_path import Evaluation
from atpo_kernels.turn_policy_loss.triton_launch import (
    Launch,
    inverse,
    loss_constants,
    loss_scalars,
    plain,
    token_pointers,
)
from atpo_kernels.turn_policy_loss.triton_paths import TABLES, Paths, path_term, place_turn, sum_turn
from atpo_kernels.turn_policy_loss.triton_sums import (
    TOKENS,
    Outputs,
    evaluate_tokens,
    is_valid,
    load_weights,
    log_ratios,
    no_sums,
    store_sums,
)
from atpo_kernels.turn_policy_loss.triton_terms import clamp_min, policy_term

# (tokens, warps) of a block in rising order: taken is the first that holds one and a half mean turns, or else the last
GPU_BLOCKS = ((128, 4), (512, 8), (2048, 16))
_BLOCKS = {"cpu": ((32, 1),)}  # others: GPU_BLOCKS


@triton.jit(do_not_specialize=["first_turn", "columns"])
def _turns_kernel(
    logprob, entropy, old_logprob, ref_logprob, rollout_logprob, mask, advantages, weight_pos, weight_neg, weight_all,
    denominator, turn_offsets, entry_offsets, entries, entry_leaf, leaf_log_ratio, path_pos, path_neg,
    coef, entropy_slope, value, partial, first_turn, columns, scale,
    low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, importance_cap, kl_coef, entropy_coef,
    LEVEL: tl.constexpr, CLIP: tl.constexpr, KL: tl.constexpr, REDUCTION: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and derivatives of the tokens of one turn, and its column of the partial sums (ROWS, columns)."""
    turn = first_turn + tl.program_id(0)
    base, length = place_turn(turn_offsets, turn)
    # 1. size of the turn and sum of its log-ratios
    total, size = sum_turn(logprob, old_logprob, mask, base, length, LEVEL == "turn", BLOCK)
    # 2. aggregation weight of its tokens
    share = scale
    if denominator is not None:
        share = share / tl.load(denominator).to(tl.float32)
    units = size
    if REDUCTION == "turn-mean":
        share = share / clamp_min(size, 1.0)
        units = tl.where(size > 0, 1.0, 0.0)
    # 3. the policy term where it does not depend on the token
    if LEVEL == "sequence":
        term = path_term(
            turn, entry_offsets, entries, entry_leaf, leaf_log_ratio, path_pos, path_neg,
            low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP,
        )  # fmt: skip
    # 4. the tokens
    sums = no_sums()
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < length
        valid = is_valid(mask, base, t, inside)
        pos, neg, every = load_weights(
            advantages, weight_pos, weight_neg, weight_all, base, t, turn, valid, share, BY_TOKEN
        )  # fmt: skip
        if LEVEL == "sequence":
            gain, slope, ratio, cut_low, cut_high = term
        else:
            log_ratio = tl.full((BLOCK,), 0.0, tl.float32) + total / clamp_min(size, 1.0)
            if LEVEL == "token":
                log_ratio = log_ratios(logprob, old_logprob, base, t, valid)
            gain, slope, ratio, cut_low, cut_high = policy_term(
                log_ratio, pos, neg, low, high, dual_cap, tau_pos, tau_neg, max_log_ratio, CLIP
            )
        sums = evaluate_tokens(
            sums, base, t, inside, valid, gain, slope, ratio, cut_low, cut_high, every,
            logprob, old_logprob, ref_logprob, rollout_logprob, entropy, coef, entropy_slope, value,
            max_log_ratio, importance_cap, kl_coef, entropy_coef, CLIP, KL,
        )  # fmt: skip
    # 5. their sums
    turns = tl.where(sums[TOKENS] > 0, 1.0, 0.0)
    store_sums(sums, turns, units, partial, turn, columns)


@dataclass(slots=True)
class PackedLoss:
    """The loss of packed turns whose log-probs arrive range by range: `prepare`, `turns` for every range, `finish`."""

    outputs: Outputs
    per_unit: bool  # whether loss and derivatives are still to be divided by the number of tokens or turns
    paths: Paths | None  # level `sequence`
    arguments: dict[str, Any]  # of `_turns_kernel`, the same for every range
    constants: dict[str, Any]
    num_warps: int

    @property
    def coef(self) -> Tensor:  # (A,) float32
        """d loss / d logprob of the turns that have been evaluated."""
        return self.outputs.coef

    @property
    def entropy_slope(self) -> Tensor | None:  # (A,) float32
        """d loss / d entropy of the turns that have been evaluated; None: 0."""
        return self.outputs.entropy_slope

    @classmethod
    def prepare(cls, arguments: LossArguments, nonempty_turns: int | None = None) -> PackedLoss:
        """Buffers of one call.

        Of arguments.inputs.logprob and .entropy only shape, device and presence are read; old_logprob=None takes the
        log-probs that `turns` is given. Under reduction "turn-mean", derivatives are right only after `finish`, unless
        the number of turns with tokens is told here; under "token-mean" with a mask and no denominator likewise.
        """
        inputs, (turn_offsets, _, _, paths) = arguments.inputs, arguments.structure
        assert turn_offsets is not None
        tokens, turns = inputs.logprob.numel(), turn_offsets.numel() - 1
        scale, denominator, per_unit = _host_share(arguments, nonempty_turns)
        table = _BLOCKS.get(inputs.logprob.device.type, GPU_BLOCKS)
        block, num_warps = next((x for x in table if 2 * x[0] * turns >= 3 * tokens), table[-1])
        outputs = Outputs.empty(arguments, turns)
        tables = None
        if paths is not None and arguments.config.level == "sequence":
            tables = Paths.of(paths, turns)
        shared = token_pointers(arguments) | outputs.pointers() | loss_scalars(arguments.config)
        shared |= dict.fromkeys(TABLES) if tables is None else tables.tables()
        shared |= {
            "turn_offsets": turn_offsets.contiguous(),
            "denominator": denominator,
            "scale": scale,
            "columns": turns,
        }
        return cls(outputs, per_unit, tables, shared, loss_constants(arguments) | {"BLOCK": block}, num_warps)

    def turns(self, first: int, count: int, logprob: Tensor, entropy: Tensor | None) -> None:  # (A,), (A,)
        """Evaluate turns [first, first + count); logprob and entropy are read, and derivatives written, at theirs.

        At level `sequence` the range must be all turns. A range may be evaluated again, with other log-probs.
        """
        for launch in self.launches(first, count, plain(logprob), plain(entropy)):
            launch.run()

    def finish(self) -> Evaluation:
        """The result, after every turn that has tokens has been evaluated."""
        self.last_launch().run()
        return self.outputs.evaluation()

    def launches(self, first: int, count: int, logprob: Tensor | None, entropy: Tensor | None) -> list[Launch]:
        """What `turns` launches."""
        given = self.arguments | {"logprob": logprob, "entropy": entropy, "first_turn": first}
        before: list[Launch] = []
        if self.paths is not None:
            assert (first, count) == (0, given["columns"]), "a trajectory may have any of the turns"
            before = self.paths.launches(given, self.constants["BLOCK"], self.num_warps)
        last = Launch(
            kernel=_turns_kernel, programs=count, arguments=given, constants=self.constants, num_warps=self.num_warps
        )
        return [*before, last]

    def last_launch(self) -> Launch:
        """What `finish` launches."""
        return self.outputs.last_launch(self.per_unit, self.arguments["turn_offsets"])


def _host_share(arguments: LossArguments, nonempty_turns: int | None) -> tuple[float, Tensor | None, bool]:
    """What of the aggregation weight the host knows: a factor, a denominator on the device, and whether the number of
    tokens (turn-mean: of turns) is still to divide it."""
    reduction, _, denominator = arguments.aggregation
    if reduction in ("sum", "none"):
        return 1.0, None, False
    if reduction == "token-mean" and denominator is None:
        if arguments.structure.mask is not None:
            return 1.0, None, True
        denominator = max(arguments.inputs.logprob.numel(), 1)
    factor, pointer = inverse(1.0 if denominator is None else denominator, arguments.inputs.logprob.device)
    if reduction == "token-mean":
        return factor, pointer, False
    return factor / max(nonempty_turns or 1, 1), pointer, nonempty_turns is None
