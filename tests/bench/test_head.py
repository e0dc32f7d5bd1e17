"""The benches of the head operators: what is judged, and the published loop."""

from __future__ import annotations

from typing import Any

import torch

from atpo_kernels import turn_policy_loss
from bench.core.verdicts import judge
from bench.head.goals import GPU
from bench.head.turn_losses import published_loop


def gpu_record(**changes: Any) -> dict[str, Any]:
    """A made-up record of the main case."""
    ours = {"ms": {"p50": 50.0}, "same_work": True, "fraction_of_gemm": 0.9, "peak_bytes": 3, "gradient_bytes": 2}
    times = {"plain": 100.0, "liger_grpo": 200.0, "quack": 40.0}
    others = {name: {"ms": {"p50": ms}, "same_work": name != "quack"} for name, ms in times.items()}
    case: dict[str, Any] = {
        "bench": "linear_turn_policy_loss",
        "mode": "gradient",
        "shape": [16384, 2560, 151936],
        "dtype": "bfloat16",
    }
    case |= {"peaked": True, "loss_tokens": 1.0, "clipped": 0.0, "turn_length": 64}
    return case | {"implementations": {"ours": ours | changes} | others}


def test_goals_are_judged() -> None:
    """Fails if a goal passes when missed, is judged from another case, or counts a peer that does less work."""

    def verdicts(**changes: Any) -> list[bool | None]:
        found = judge(GPU, [gpu_record(**changes)])
        return [None if verdict is None else verdict.passed for verdict in found.values()]

    assert verdicts() == [True, True, None, True, True, None, True, None, None, None, None]
    slow = verdicts(ms={"p50": 90.0}, fraction_of_gemm=0.5, peak_bytes=2 * 10**9)
    assert slow == [False, False, None, False, False, None, False, None, None, None, None]
    assert all(v is None for v in judge(GPU, [gpu_record() | {"peaked": False}]).values())


def test_published_loop_is_the_turn_loss() -> None:
    """Fails if the loop that we are compared with computes another loss (turns at borders, empty rows, clipping)."""
    rng = torch.Generator().manual_seed(0)
    old, noise, advantages = torch.randn(3, 5, 40, generator=rng, dtype=torch.float64)
    mask = (torch.rand(5, 40, generator=rng) > 0.3).double()
    mask[1], mask[2] = 0, 1
    results = []
    for loss in (
        lambda new: published_loop(new, old, advantages, mask),
        lambda new: turn_policy_loss(new, old, advantages, mask=mask).loss,
    ):
        logprob = (old + 0.01 * noise).requires_grad_()
        value = loss(logprob)
        results += [value, torch.autograd.grad(value, logprob)[0]]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])
