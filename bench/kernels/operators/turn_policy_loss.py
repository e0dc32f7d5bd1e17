"""Kernels of `turn_policy_loss` in a representative set of configurations, for compilation ahead of time.

Every ratio level, clip, KL estimator, reduction and block size occurs; their product would be some thousand kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atpo_kernels.arguments import Averaging, LossArguments, LossInputs, Structure, TurnClip
from atpo_kernels.records import LeafPaths, LossConfig, TokenWeights
from atpo_kernels.turn_policy_loss.launch import Launch, PackedLoss, padded_launches
from bench.kernels.operators import DTYPE_NAMES, Variant

_TYPES = DTYPE_NAMES | {torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}
_EVERYTHING: dict[str, Any] = {"kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.1, "importance_cap": 2.0}
# configuration, reduction (None: weights), mean length of a turn, dtype of log-probs, a "mask", "clip" ranges by turn
_PACKED: tuple[tuple[dict[str, Any], str | None, int, torch.dtype, str], ...] = (
    ({}, None, 50, torch.float32, ""),
    ({}, "sum", 150, torch.float32, ""),
    ({"level": "token", "dual_cap": 3.0}, None, 150, torch.float32, "clip"),
    ({}, "sum", 2000, torch.float32, ""),
    ({"dual_cap": 3.0, **_EVERYTHING}, "turn-mean", 150, torch.bfloat16, "mask"),
    ({"dual_cap": 3.0, **_EVERYTHING}, "none", 2000, torch.float32, "mask"),
    ({"level": "token", "clip": "soft_high", "kl": "k1", "kl_coef": 0.1}, "token-mean", 150, torch.float16, ""),
    ({"level": "sequence", "clip": "soft"}, None, 150, torch.float32, ""),
    ({"level": "sequence", "clip": "cispo", **_EVERYTHING}, None, 2000, torch.float32, "mask"),
)
# configuration, reduction (None: weights), length of a row, dtype of log-probs, turns by "mask", by "ids", or no mask
_PADDED: tuple[tuple[dict[str, Any], str | None, int, torch.dtype, str], ...] = (
    ({}, "seq-mean-token-mean", 200, torch.float32, "mask"),
    ({}, "seq-mean-token-mean", 1000, torch.float32, "mask"),
    ({}, "seq-mean-token-mean", 4000, torch.float32, "mask"),
    ({"dual_cap": 3.0, **_EVERYTHING}, "turn-mean", 1000, torch.bfloat16, "ids"),
    ({"dual_cap": 3.0, **_EVERYTHING}, "turn-mean", 4000, torch.float32, "ids"),
    ({"clip": "cispo", "kl": "low_var", "kl_coef": 0.1}, None, 4000, torch.float32, "ids"),
    ({"level": "token", "clip": "sapo", "kl": "k2", "kl_coef": 0.1}, "token-mean", 1000, torch.float16, "mask"),
    ({"level": "token", "clip": "hard"}, "none", 1000, torch.float32, "none"),
    ({"level": "sequence", "clip": "soft"}, "seq-mean-token-sum-norm", 4000, torch.float32, "mask"),
)


def variants(target: str) -> list[Variant]:
    """List kernels of `turn_policy_loss` on a target ("sm_90", ...): the same on all."""
    found: dict[tuple[Any, ...], Variant] = {}
    for launch, label in [*_packed(), *_padded()]:
        variant = variant_of(launch, label)
        key = (launch.kernel, *sorted(variant.types.items()), *sorted(map(repr, variant.constants.items())))
        found.setdefault(key, variant)
    return list(found.values())


def variant_of(launch: Launch, label: str) -> Variant:
    """Describe a launch for compilation ahead of time."""
    absent = {name: None for name, value in launch.arguments.items() if value is None}
    return Variant(
        kernel=launch.kernel,
        label=label,
        types={name: _triton_type(value) for name, value in launch.arguments.items() if value is not None},
        constants=absent | launch.constants,
        num_warps=launch.num_warps,
        divisible=tuple(name for name, value in launch.arguments.items() if isinstance(value, Tensor)),
    )


def _triton_type(value: Tensor | int | float) -> str:
    """Name the type that a launch gives an argument."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def _packed() -> list[tuple[Launch, str]]:
    found = []
    for fields, reduction, length, dtype, given in _PACKED:
        config = LossConfig(**fields)
        logprob = _meta(length, dtype=dtype)
        entries = _meta(1, dtype=torch.int32)
        structure = Structure(
            turn_offsets=_meta(2, dtype=torch.int32),
            mask=_meta(length, dtype=torch.bool) if given == "mask" else None,
            paths=LeafPaths(_meta(2, dtype=torch.int32), entries, _meta(1), _meta(1)),
        )
        arguments = _arguments(logprob, (1,), structure, reduction, config)
        if given == "clip":
            arguments = replace(arguments, turn_clip=TurnClip(_meta(1), _meta(1)))
        loss = PackedLoss.prepare(arguments)
        label = _label(config, reduction, dtype, loss.constants["BLOCK"]) + ", clip by turn" * (given == "clip")
        launches = loss.launches(0, 1, logprob, _meta(length, dtype=dtype) if config.needs_entropy else None)
        found += [(launch, label) for launch in [*launches, loss.last_launch()]]
    return found


def _padded() -> list[tuple[Launch, str]]:
    found = []
    for fields, reduction, length, dtype, turns in _PADDED:
        config = LossConfig(**fields)
        logprob = _meta(1, length, dtype=dtype)
        structure = Structure(
            turn_offsets=None,
            mask=None if turns == "none" else _meta(1, length, dtype=torch.bool),
            turn_ids=_meta(1, length, dtype=torch.int64) if turns == "ids" else None,
        )
        _, launches = padded_launches(_arguments(logprob, (1, length), structure, reduction, config))
        label = _label(config, reduction, dtype, launches[0].constants["BLOCK"])
        found += [(launch, f"{label}, turns by {turns}") for launch in launches]
    return found


def _arguments(
    logprob: Tensor, advantages: tuple[int, ...], structure: Structure, reduction: str | None, config: LossConfig
) -> LossArguments:
    """Make the arguments of a call without data."""
    like = torch.empty_like(logprob)
    inputs = LossInputs(logprob, like, like, like, like if config.needs_entropy else None)
    weights = TokenWeights(*(torch.empty_like(logprob, dtype=torch.float32) for _ in range(3)))
    denominator = _meta(1) if reduction == "turn-mean" else None
    averaging = Averaging(reduction or "sum", denominator=denominator)  # type: ignore[arg-type]
    if reduction is None:
        return LossArguments(inputs, None, weights, structure, averaging, config)
    return LossArguments(inputs, _meta(*advantages), None, structure, averaging, config)


def _label(config: LossConfig, reduction: str | None, dtype: torch.dtype, block: int) -> str:
    extras = f", {config.kl}" if config.needs_reference else ""
    name = str(dtype).removeprefix("torch.")
    dual = "" if config.dual_cap is None else " dual"
    return f"{config.level} {config.clip}{dual}{extras}, {reduction or 'weights'}, {name}, blocks of {block}"


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
