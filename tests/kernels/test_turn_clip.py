"""Clip ranges of single turns, and what is refused of them and of the dual cap."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch

from atpo_kernels import LossConfig, TokenWeights, turn_policy_loss
from tests.helpers.turn_loss_cases import packed_case, padded_case, turn_clip

LENGTHS = [4, 1, 0, 7, 3, 5]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("level", "clip"), list(product(("token", "turn"), ("hard", "soft", "soft_high", "cispo"))))
def test_each_turn_has_its_own_range(level: Any, clip: Any, impl: str) -> None:
    """Fails if a turn is clipped by another's range, low and high are mixed up, or one tensor hides the number."""
    case, ranges = packed_case(LENGTHS), turn_clip(len(LENGTHS))
    del case["paths"]
    for given in (ranges, {"clip_low": ranges["clip_low"]}, {"clip_high": ranges["clip_high"]}):
        arguments: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.2, "level": level, "clip": clip}
        whole = turn_policy_loss(**case, **arguments | given, impl=impl)
        total = torch.zeros((), dtype=torch.float64)
        for n, (start, end) in enumerate(pairwise(case["turn_offsets"].tolist())):
            mine = slice(start, end)
            alone = turn_policy_loss(
                case["logprob"][mine],
                case["old_logprob"][mine],
                turn_offsets=torch.tensor([0, end - start]),
                weights=TokenWeights(*(getattr(case["weights"], name)[mine] for name in ("pos", "neg", "all"))),
                config=LossConfig(**arguments | {name: float(x[n]) for name, x in given.items()}),
            )
            total = total + alone.loss
            torch.testing.assert_close(whole.coef[mine], alone.coef, rtol=1e-12, atol=0)
        torch.testing.assert_close(whole.loss, total, rtol=1e-12, atol=1e-14)


def test_refusals() -> None:
    """Fails if a range that means nothing, or a clip that is no family any more, is computed with."""
    packed, padded, ranges = packed_case(LENGTHS), padded_case(2, 5), turn_clip(len(LENGTHS))
    bad: list[tuple[dict[str, Any], str]] = [
        (packed | ranges | {"level": "sequence"}, "clip_low by turn goes with level 'token' or 'turn'"),
        (packed | ranges | {"clip": "sapo"}, "no meaning with clip='sapo'"),
        (padded | {"clip_high": ranges["clip_high"]}, "clip_high by turn goes with packed turns"),
        (packed | {"clip_low": ranges["clip_low"][1:]}, r"must be a float \(6,\), got torch.float64 \(5,\)"),
        (packed | {"clip_low": -ranges["clip_low"] - 1}, "at least 0"),
        (packed | {"clip": "dual"}, "clip='hard' and dual_cap=3"),
        (packed | {"dual_cap": 1.0}, "dual_cap must be greater than 1"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            turn_policy_loss(**arguments)
