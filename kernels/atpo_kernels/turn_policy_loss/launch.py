"""Launches of the policy loss's kernels, as records: what is compiled ahead of time is what a call launches.

Two launches, one for the loss of every token and one for the sums; level "sequence" on packed turns has two more, and
sorts its table of paths. A tensor that is not contiguous is copied first. `PackedLoss` takes the packed layout in
ranges of turns, for callers that compute the log-probs chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from atpo_kernels.arguments import LossArguments
from atpo_kernels.kernel_launch import Launch
from atpo_kernels.records import LeafPaths, LossConfig
from atpo_kernels.turn_policy_loss.kernels import (
    _finish_kernel,
    _leaf_kernel,
    _rows_kernel,
    _turn_sums_kernel,
    _turns_kernel,
)
from atpo_kernels.turn_policy_loss.kernels.sums import METRICS, PADDED_ROWS, ROWS
from atpo_kernels.turn_policy_loss.tiles import (
    finish_blocks,
    packed_block,
    packed_blocks,
    padded_block,
    padded_blocks,
)
from atpo_kernels.turn_policy_loss.torch_impl import Evaluation

_TABLES = ("entry_offsets", "entries", "entry_leaf", "leaf_log_ratio", "path_pos", "path_neg")


@torch.no_grad()
def turn_policy_loss_triton(arguments: LossArguments) -> Evaluation:
    """Compute `turn_policy_loss` by Triton kernels; see there."""
    turn_offsets, inputs = arguments.structure.turn_offsets, arguments.inputs
    if turn_offsets is not None:
        loss = PackedLoss.prepare(arguments)
        loss.turns(0, turn_offsets.numel() - 1, inputs.logprob, inputs.entropy)
        return loss.finish()
    outputs, launches = padded_launches(arguments)
    for launch in launches:
        launch.run()
    return outputs.evaluation()


def plain(tensor: Tensor | None) -> Tensor | None:
    """Detach a tensor, and copy it if it is not contiguous."""
    return None if tensor is None else tensor.detach().contiguous()


def empty(like: Tensor, *shape: int) -> Tensor:
    """Allocate a float32 tensor on the device of another tensor."""
    return like.new_empty(shape, dtype=torch.float32)


def inverse(denominator: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """Return 1/denominator as a number, or 1 and a tensor from which kernels read the denominator."""
    if isinstance(denominator, Tensor) and denominator.device == device:
        return 1.0, denominator.detach()
    return 1 / float(denominator), None


def token_pointers(arguments: LossArguments) -> dict[str, Tensor | None]:
    """List what kernels read by token beside logprob and entropy; None for what the loss does not read."""
    inputs, weights, config = arguments.inputs, arguments.weights, arguments.config
    found = {
        "old_logprob": inputs.old_logprob,
        "ref_logprob": inputs.ref_logprob if config.needs_reference else None,
        "rollout_logprob": inputs.rollout_logprob if config.importance_cap is not None else None,
        "mask": arguments.structure.mask,
        "advantages": arguments.advantages,
        "weight_pos": None if weights is None else weights.pos,
        "weight_neg": None if weights is None else weights.neg,
        "weight_all": None if weights is None else weights.all,
    }
    return {name: plain(tensor) for name, tensor in found.items()}


def loss_scalars(config: LossConfig) -> dict[str, float | None]:
    """List the numbers of the configuration under the names that the kernels give them; None for what is off."""
    numbers = {
        "low": 1 - config.clip_low,
        "high": 1 + config.clip_high,
        "dual_cap": config.dual_cap,
        "tau_pos": config.sapo_tau_pos,
        "tau_neg": config.sapo_tau_neg,
        "max_log_ratio": config.max_log_ratio,
        "importance_cap": config.importance_cap or 0,
        "kl_coef": config.kl_coef,
        "entropy_coef": config.entropy_coef,
    }
    return {name: None if number is None else float(number) for name, number in numbers.items()}


def loss_constants(arguments: LossArguments) -> dict[str, Any]:
    """List what the kernels are specialised on."""
    config, advantages = arguments.config, arguments.advantages
    return {
        "LEVEL": config.level,
        "CLIP": config.clip,
        "KL": config.kl,
        "REDUCTION": arguments.averaging.reduction,
        "BY_TOKEN": advantages is not None and advantages.shape == arguments.inputs.logprob.shape,
    }


@dataclass(slots=True)
class Outputs:
    """Results of one call, which its kernels write."""

    grad_logprob: Tensor  # (A,) float32
    grad_entropy: Tensor | None  # (A,) float32; None: the loss has no gradient through the entropy
    value: Tensor | None  # (A,) float32 loss by token; None: its sum is wanted
    partial: Tensor  # (ROWS, columns) float32
    result: Tensor  # (PADDED_ROWS,) float32 loss and metrics in the order of the rows
    metrics: tuple[str, ...]

    @classmethod
    def empty(cls, arguments: LossArguments, columns: int) -> Outputs:
        """Allocate the results, with partial sums of that many programs."""
        logprob, config = arguments.inputs.logprob, arguments.config
        tokens = logprob.numel()
        absent = {"entropy": arguments.inputs.entropy is None, "ref_kl": not config.needs_reference}
        return cls(
            grad_logprob=empty(logprob, tokens),
            grad_entropy=empty(logprob, tokens) if config.needs_entropy else None,
            value=empty(logprob, tokens) if arguments.by_token else None,
            partial=empty(logprob, ROWS.value, columns),
            result=empty(logprob, PADDED_ROWS.value),
            metrics=tuple(name for name in METRICS if not absent.get(name, False)),
        )

    def pointers(self) -> dict[str, Tensor | None]:
        """List the results under the names that the kernels give them."""
        return {
            "grad_logprob": self.grad_logprob,
            "grad_entropy": self.grad_entropy,
            "value": self.value,
            "partial": self.partial,
        }

    def last_launch(self, per_unit: bool, turn_offsets: Tensor | None) -> Launch:
        """Make the launch that reduces the partial sums, of rows or, with turn_offsets (N+1,), of turns."""
        block, tokens_block = finish_blocks(self.grad_logprob.device)
        return Launch(
            kernel=_finish_kernel,
            programs=max(triton.cdiv(len(self.grad_logprob), tokens_block), 1) if per_unit else 1,
            arguments={
                "partial": self.partial,
                "turn_offsets": turn_offsets,
                "result": self.result,
                "grad_logprob": self.grad_logprob,
                "grad_entropy": self.grad_entropy,
                "columns": self.partial.shape[1],
                "tokens": len(self.grad_logprob),
            },
            constants={"PER_UNIT": per_unit, "BLOCK": block, "TOKENS_BLOCK": tokens_block},
            num_warps=8,
        )

    def evaluation(self) -> Evaluation:
        """Return the results as the other implementations do."""
        values = self.result.unbind()
        metrics = {name: values[METRICS[name].value] for name in self.metrics}
        return Evaluation(
            values[0] if self.value is None else self.value, self.grad_logprob, self.grad_entropy, metrics
        )


@dataclass(slots=True)
class Paths:
    """Trajectories through turns, looked up both ways."""

    leaf_offsets: Tensor  # (S+1,) CSR over P
    entry_turns: Tensor  # (P,) turn of an entry
    entry_offsets: Tensor  # (N+1,) CSR over `entries`
    entries: Tensor  # (P,) entries in the order of their turns, those of one turn in the order of the trajectories
    entry_leaf: Tensor  # (P,) trajectory of an entry
    path_pos: Tensor  # (P,)
    path_neg: Tensor  # (P,)
    turn_sums: Tensor  # (2, N) float32 sum of the log-ratios and number of tokens of a turn
    leaf_log_ratio: Tensor  # (S,) float32

    @classmethod
    def of(cls, paths: LeafPaths, turns: int) -> Paths:
        """Look up the paths, without waiting for the device."""
        entry_turns, leaf_offsets = paths.turns.contiguous(), paths.offsets.contiguous()
        in_order, entries = entry_turns.sort(stable=True)
        every_turn = torch.arange(turns + 1, device=entry_turns.device, dtype=entry_turns.dtype)
        every_entry = torch.arange(len(entries), device=entry_turns.device, dtype=leaf_offsets.dtype)
        return cls(
            leaf_offsets=leaf_offsets,
            entry_turns=entry_turns,
            entry_offsets=torch.searchsorted(in_order, every_turn),
            entries=entries,
            entry_leaf=torch.bucketize(every_entry, leaf_offsets[1:].contiguous(), right=True),
            path_pos=paths.weight_pos.detach().contiguous(),
            path_neg=paths.weight_neg.detach().contiguous(),
            turn_sums=paths.weight_pos.new_empty(2, turns, dtype=torch.float32),
            leaf_log_ratio=paths.weight_pos.new_empty(leaf_offsets.numel() - 1, dtype=torch.float32),
        )

    def tables(self) -> dict[str, Tensor]:
        """List what the program of a turn reads, under the names that its kernel gives it."""
        return {name: getattr(self, name) for name in _TABLES}

    def launches(self, given: dict[str, Any], block: int, num_warps: int) -> list[Launch]:
        """Make the launches that fill in leaf_log_ratio; `given` are the arguments of the kernel of a turn."""
        turns = {"turn_sums": self.turn_sums, "turns": self.turn_sums.shape[1]}
        read = {name: given[name] for name in ("logprob", "old_logprob", "mask", "turn_offsets")}
        leaves = {name: getattr(self, name) for name in ("leaf_offsets", "entry_turns", "leaf_log_ratio")}
        return [
            Launch(
                kernel=_turn_sums_kernel,
                programs=self.turn_sums.shape[1],
                arguments=read | turns,
                constants={"BLOCK": block},
                num_warps=num_warps,
                blocks=packed_blocks(self.turn_sums.device),
            ),
            Launch(
                kernel=_leaf_kernel,
                programs=len(self.leaf_log_ratio),
                arguments=leaves | turns,
                constants={},
                num_warps=1,
            ),
        ]


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
    def grad_logprob(self) -> Tensor:  # (A,) float32
        """Derivative of the loss by logprob, of the turns that have been evaluated."""
        return self.outputs.grad_logprob

    @property
    def grad_entropy(self) -> Tensor | None:  # (A,) float32
        """Derivative of the loss by entropy, of the turns that have been evaluated; None: 0."""
        return self.outputs.grad_entropy

    @classmethod
    def prepare(cls, arguments: LossArguments, nonempty_turns: int | None = None) -> PackedLoss:
        """Allocate the buffers of one call.

        Of arguments.inputs.logprob and .entropy only shape, device and presence are read; old_logprob=None takes the
        log-probs that `turns` is given. Under reduction "turn-mean", derivatives are right only after `finish`, unless
        the number of turns with tokens is given here; so are they under "token-mean" with a mask and no denominator.
        """
        inputs, (turn_offsets, _, _, paths) = arguments.inputs, arguments.structure
        assert turn_offsets is not None
        tokens, turns = inputs.logprob.numel(), turn_offsets.numel() - 1
        scale, denominator, per_unit = _packed_share(arguments, nonempty_turns)
        block, num_warps = packed_block(inputs.logprob.device, tokens, turns)
        outputs = Outputs.empty(arguments, turns)
        tables = None
        if paths is not None and arguments.config.level == "sequence":
            tables = Paths.of(paths, turns)
        shared = token_pointers(arguments) | outputs.pointers() | loss_scalars(arguments.config)
        shared |= dict.fromkeys(_TABLES) if tables is None else tables.tables()
        shared |= {
            "turn_offsets": turn_offsets.contiguous(),
            "turn_clip_low": plain(arguments.turn_clip.low),
            "turn_clip_high": plain(arguments.turn_clip.high),
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
        """Return the result, after every turn that has tokens has been evaluated."""
        self.last_launch().run()
        return self.outputs.evaluation()

    def launches(self, first: int, count: int, logprob: Tensor | None, entropy: Tensor | None) -> list[Launch]:
        """List the kernel launches that evaluate turns [first, first + count)."""
        given = self.arguments | {"logprob": logprob, "entropy": entropy, "first_turn": first}
        before: list[Launch] = []
        if self.paths is not None:
            assert (first, count) == (0, given["columns"]), "a trajectory may have any of the turns"
            before = self.paths.launches(given, self.constants["BLOCK"], self.num_warps)
        last = Launch(
            kernel=_turns_kernel,
            programs=count,
            arguments=given,
            constants=self.constants,
            num_warps=self.num_warps,
            blocks=packed_blocks(self.grad_logprob.device),
        )
        return [*before, last]

    def last_launch(self) -> Launch:
        """Return the kernel launch that reduces the partial sums at the end."""
        return self.outputs.last_launch(self.per_unit, self.arguments["turn_offsets"])


def _packed_share(arguments: LossArguments, nonempty_turns: int | None) -> tuple[float, Tensor | None, bool]:
    """Split what the host knows of the aggregation weight: a factor, a denominator on the device, and whether the
    number of tokens (turn-mean: of turns) is still to divide it."""
    reduction, _, denominator = arguments.averaging
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


def padded_launches(arguments: LossArguments) -> tuple[Outputs, list[Launch]]:
    """Make the launches of a padded batch, and the results that they fill in."""
    inputs, (rows, length) = arguments.inputs, arguments.padded_shape
    scale, denominator, per_unit = _padded_share(arguments)
    outputs = Outputs.empty(arguments, rows)
    by_turn = arguments.config.level == "turn"
    scratch = None
    if by_turn or arguments.averaging.reduction == "turn-mean":
        scratch = empty(inputs.logprob, 2, rows, length)
    block, num_warps = padded_block(inputs.logprob.device, length)
    given = token_pointers(arguments) | outputs.pointers() | loss_scalars(arguments.config)
    given |= {
        "logprob": plain(inputs.logprob),
        "entropy": plain(inputs.entropy),
        "turn_ids": plain(arguments.structure.turn_ids),
        "denominator": denominator,
        "running_size": None if scratch is None else scratch[0],
        "running_mean": scratch[1] if scratch is not None and by_turn else None,
        "length": length,
        "columns": rows,
        "scale": scale,
    }
    constants = loss_constants(arguments) | {"BLOCK": block}
    launch = Launch(
        kernel=_rows_kernel,
        programs=rows,
        arguments=given,
        constants=constants,
        num_warps=num_warps,
        blocks=padded_blocks(inputs.logprob.device),
    )
    return outputs, [launch, outputs.last_launch(per_unit, None)]


def _padded_share(arguments: LossArguments) -> tuple[float, Tensor | None, bool]:
    """Split what the host knows of the aggregation weight: a factor, a denominator on the device, and whether the
    number of tokens is still to divide it."""
    (rows, length), mask = arguments.padded_shape, arguments.structure.mask
    reduction, max_length, denominator = arguments.averaging
    if reduction in ("sum", "none"):
        return 1.0, None, False
    if reduction == "token-mean" and denominator is None:
        return (1 / max(rows * length, 1), None, False) if mask is None else (1.0, None, True)
    factor, pointer = inverse(max(rows, 1) if denominator is None else denominator, arguments.inputs.logprob.device)
    if reduction == "seq-mean-token-sum-norm":
        factor /= max_length or max(length, 1)
    return factor, pointer, False
