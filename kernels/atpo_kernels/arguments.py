"""One call of a policy loss as its caller wrote it: the record that every implementation starts from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atpo_kernels.choices import Reduction
from atpo_kernels.records import LeafPaths, LossConfig, TokenWeights


class Structure(NamedTuple):
    """Structure of the tokens: which of them count, and which form a turn and a trajectory."""

    turn_offsets: Tensor | None  # (N+1,); None: a padded batch
    mask: Tensor | None = None  # (A,) or (B, T); None: every token counts
    turn_ids: Tensor | None = None  # (B, T); None: turns are runs of the mask
    paths: LeafPaths | None = None


class Averaging(NamedTuple):
    """The reduction of token losses, and its denominators."""

    reduction: Reduction
    max_length: int | None = None
    denominator: float | Tensor | None = None


class TurnClip(NamedTuple):
    """Clip ranges of packed turns, in place of the configuration's clip_low and clip_high where given."""

    low: Tensor | None = None  # (N,)
    high: Tensor | None = None  # (N,)


def loss_config(
    config: LossConfig | None,
    clip_low: float | Tensor | None,  # a tensor is (N,)
    clip_high: float | Tensor | None,  # a tensor is (N,)
    overrides: dict[str, Any],  # fields of LossConfig
) -> tuple[LossConfig, TurnClip]:
    """Apply the overrides of a call; clip ranges that are tensors are returned beside the configuration."""
    given = {"clip_low": clip_low, "clip_high": clip_high}
    by_turn = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in given.items() if value is not None and name not in by_turn}
    made = replace(config or LossConfig(), **numbers, **overrides)  # type: ignore[arg-type]
    return made, TurnClip(by_turn.get("clip_low"), by_turn.get("clip_high"))


@dataclass(slots=True)
class LossInputs:
    """Tensors of one call that have one element per token: (A,) or (B, T) each."""

    logprob: Tensor
    old_logprob: Tensor | None  # None: the current log-probs, without gradient
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    entropy: Tensor | None

    def named(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Return the tensors by name, detached and cast."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: None if x is None else x.detach().to(dtype) for name, x in values}


@dataclass(slots=True, frozen=True)
class LossArguments:
    """The checked arguments of one call of `turn_policy_loss`."""

    inputs: LossInputs
    advantages: Tensor | None  # packed: (N,) or (A,); padded: (B,) or (B, T)
    weights: TokenWeights | None  # in place of advantages
    structure: Structure
    averaging: Averaging
    config: LossConfig
    turn_clip: TurnClip = field(default_factory=TurnClip)

    @property
    def by_token(self) -> bool:
        """Whether the losses of the tokens are returned instead of their sum."""
        return self.averaging.reduction == "none"

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Shape (B, T) of a padded batch; a 1-D tensor is one row."""
        shape = self.inputs.logprob.shape
        return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
