"""SkyRL's adapter against SkyRL itself: `make test-adapters` installs it.

SkyRL 0.3.0 uses `typing.TypedDict` in pydantic models, which pydantic refuses on Python 3.11; there the name is
replaced by that of typing_extensions before SkyRL is imported. All else is the real package.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("skyrl") is None:
    pytest.skip("SkyRL is not installed", allow_module_level=True)
if sys.version_info < (3, 12):
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[assignment]

from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config.config import AlgorithmConfig

from atpo_kernels import turn_policy_loss
from atpo_kernels.hosts.skyrl import check, policy_loss, register

B, T = 6, 12
# SkyRL's name -> our fields of LossConfig; SkyRL caps log-ratios at 20, GSPO's at 10
SAME: dict[str, dict[str, Any]] = {
    "regular": {"level": "token", "max_log_ratio": 20.0},
    "dual_clip": {"level": "token", "dual_cap": 3.0, "max_log_ratio": 20.0},
    "gspo": {"level": "sequence"},
    "sapo": {"level": "token", "clip": "sapo", "max_log_ratio": 20.0},
    "cispo": {"level": "token", "clip": "cispo", "clip_low": 0.0, "clip_high": 5.0, "max_log_ratio": 20.0},
}
REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")


def settings(**more: Any) -> AlgorithmConfig:
    """SkyRL's configuration of the algorithm."""
    return AlgorithmConfig(eps_clip_low=0.1, eps_clip_high=0.15, **more)


def batch() -> dict[str, Tensor]:
    """Arguments of a policy loss; row 1 has no action tokens."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    mask = (torch.rand(B, T, generator=rng) < 0.7).double()
    mask[1] = 0
    old = -normal(B, T).abs()
    return {
        "old_log_probs": old,
        "log_probs": old + 0.5 * normal(B, T),
        "advantages": normal(B, T),
        "loss_mask": mask,
        "rollout_logprobs": old + 0.5 * normal(B, T),
    }


def evaluate(fn: Any, given: dict[str, Tensor], config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """Loss, and gradient with respect to the log-probs."""
    leaf = given["log_probs"].clone().requires_grad_()
    loss, metrics = fn(**{**given, "log_probs": leaf}, config=config)
    assert all(isinstance(value, float) for value in metrics.values()) and "clip_ratio" in metrics
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """SkyRL computes the ratio's exponential in float32 (`safe_exp_delta`): 6e-8 of each term."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("correction", [{}, {"tis_ratio_type": "token"}, {"sequence_mask_metric": "product"}], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_equals_skyrl(name: str, correction: dict[str, str], reduction: str) -> None:
    """Fails if a loss that both have means something else, or the off-policy correction is left out."""
    config, given = settings(policy_loss_type=name, loss_reduction=reduction), batch()
    for option, value in correction.items():
        setattr(config.off_policy_correction, option, value)
    given["advantages"] = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        given["advantages"], given["loss_mask"], reduction, micro_batch_size=2, max_seq_len=T
    )
    theirs = evaluate(ppo_utils.PolicyLossRegistry.get(name), given, config)
    assert_equal(evaluate(functools.partial(policy_loss, **SAME[name]), given, config), theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up(reduction: str) -> None:
    """Fails if the registered loss averages what SkyRL's advantages already hold, or is not that of turns."""
    register()
    registered, config, given = ppo_utils.PolicyLossRegistry.get("at2po"), settings(), batch()
    given["advantages"] = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        given["advantages"], given["loss_mask"], reduction, micro_batch_size=2, max_seq_len=T
    )
    whole = evaluate(registered, given, config)
    parts = [evaluate(registered, {k: v[i : i + 2] for k, v in given.items()}, config) for i in range(0, B, 2)]
    losses, gradients = zip(*parts, strict=True)
    torch.testing.assert_close((sum(losses), torch.cat(gradients)), whole, rtol=1e-11, atol=1e-13)
    leaf = given["log_probs"].clone().requires_grad_()
    how: dict[str, Any] = {"mask": given["loss_mask"], "reduction": "sum", "clip_low": 0.1, "clip_high": 0.15}
    out = turn_policy_loss(leaf, given["old_log_probs"], given["advantages"], **how)
    torch.testing.assert_close(whole[1], torch.autograd.grad(out.loss, leaf)[0], rtol=1e-11, atol=1e-13)


def test_check() -> None:
    """Fails if SkyRL does not take the registration."""
    check()
