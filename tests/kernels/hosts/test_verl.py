"""verl's adapter against verl itself: `make test-adapters` installs it. Losses and estimators in float64."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl")
from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from atpo_kernels import turn_policy_loss
from atpo_kernels.hosts.credit import return_advantages
from atpo_kernels.hosts.verl import check
from atpo_kernels.hosts.verl.loss import policy_loss

B, T = 6, 12
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# verl's name -> our fields of LossConfig; verl caps log-ratios at 20, GSPO's at 10
SAME: dict[str, dict[str, Any]] = {
    "vanilla": {"level": "token", "dual_cap": 3.0, "max_log_ratio": 20.0},
    "gspo": {"level": "sequence"},
    "sapo": {"level": "token", "clip": "sapo", "max_log_ratio": 20.0},
    "cispo": {"level": "token", "clip": "cispo", "max_log_ratio": 20.0},
}
"""The losses that both have."""


def config(mode: str, **more: Any) -> FSDPActorConfig:
    """verl's configuration of an actor."""
    made = FSDPActorConfig(
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=mode,
        clip_ratio_low=0.1,
        clip_ratio_high=0.15,
        **more,
    )
    return made


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a policy loss; row 1 has no action tokens."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(B, T, generator=rng) < 0.7
    mask[1] = False
    old = -normal(B, T).abs()
    return {
        "old_log_prob": old,
        "log_prob": old + 0.5 * normal(B, T),
        "advantages": normal(B, T),
        "response_mask": mask,
        "rollout_is_weights": normal(B, T).abs(),
    }


def evaluate(fn: Any, given: dict[str, Tensor], settings: FSDPActorConfig) -> tuple[Tensor, Tensor]:
    """Loss, and gradient with respect to the log-probs."""
    leaf = given["log_prob"].clone().requires_grad_()
    loss, metrics = fn(**{**given, "log_prob": leaf}, loss_agg_mode=settings.loss_agg_mode, config=settings)
    assert all(name.startswith("actor/") and isinstance(value, float) for name, value in metrics.items())
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """In float64; verl adds 1e-8 to the number of tokens of a row, which is 5e-9 of 2 tokens."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "info", [{}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 10}], ids=["", "info"]
)
@pytest.mark.parametrize(
    ("name", "mode"),  # verl averages SAPO by seq-mean-token-mean whatever the mode says
    [(name, mode) for name in SAME for mode in MODES if name != "sapo" or mode == "seq-mean-token-mean"],
)
def test_equals_core_algos(name: str, mode: str, info: dict[str, int]) -> None:
    """Fails if a loss that both have, a mode of averaging or the counts of the whole batch mean something else."""
    for scale in (None, 20):
        settings = config(mode, loss_scale_factor=scale)
        settings.global_batch_info.update(info, loss_scale_factor=scale)
        ours = evaluate(functools.partial(policy_loss, **SAME[name]), batch(), settings)
        assert_equal(ours, evaluate(core_algos.get_policy_loss_fn(name), batch(), settings))


def test_clip_range_of_the_configuration() -> None:
    """Fails if the clip range of verl's configuration is not read, or the ratio is not that of a turn."""
    given = batch()
    ours = evaluate(core_algos.get_policy_loss_fn("at2po"), given, config("seq-mean-token-sum"))
    leaf = given["log_prob"].clone().requires_grad_()
    out = turn_policy_loss(
        leaf,
        given["old_log_prob"],
        given["advantages"] * given["rollout_is_weights"],
        mask=given["response_mask"],
        reduction="seq-mean-token-sum",
        denominator=B - 1,
        clip_low=0.1,
        clip_high=0.15,
    )
    assert_equal(ours, (out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))


def micro_batch_loss(given: dict[str, Tensor], rows: slice, ranks: int, mode: str) -> tuple[Tensor, Tensor]:
    """verl's own `ppo_loss` of some rows, with the counts that its engine hands over."""
    leaf = given["log_prob"][rows].clone().requires_grad_()
    nested = lambda x: torch.nested.as_nested_tensor(list(x), layout=torch.jagged)  # noqa: E731
    data = TensorDict(
        {
            "prompts": nested(torch.ones(len(leaf), 2, dtype=torch.long)),
            "responses": nested(torch.ones(len(leaf), T, dtype=torch.long)),
            "response_mask": nested(given["response_mask"][rows].long()),
            "old_log_probs": nested(given["old_log_prob"][rows]),
            "advantages": nested(given["advantages"][rows]),
        },
        batch_size=len(leaf),
    )
    counts = {"dp_size": ranks, "batch_num_tokens": int(given["response_mask"].sum()), "global_batch_size": B}
    tensordict_utils.assign_non_tensor(data, **counts)
    settings = config(mode, policy_loss=PolicyLossConfig(loss_mode="at2po"))
    # log-probs of prompt and response, shifted by one as the engine has them
    whole = torch.cat([leaf.new_zeros(len(leaf), 1), leaf, leaf.new_zeros(len(leaf), 1)], 1)
    loss, _ = ppo_loss(settings, {"log_probs": nested(whole)}, data)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_ranks_add_up(mode: str) -> None:
    """Fails if three micro-batches or two ranks give another gradient than one batch, through verl's own `ppo_loss`."""
    given = batch()
    whole = micro_batch_loss(given, slice(0, B), 1, mode)
    for size, ranks in ((2, 1), (3, 2)):
        parts = [micro_batch_loss(given, slice(i, i + size), ranks, mode) for i in range(0, B, size)]
        losses, gradients = zip(*parts, strict=True)
        assert_equal((sum(losses) / ranks, torch.cat(gradients) / ranks), whole)


def test_missing_counts() -> None:
    """Fails if two ranks without the counts of the whole batch are averaged by what one of them has."""
    settings = config("token-mean")
    settings.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match="needs the counts"):
        evaluate(policy_loss, batch(), settings)


def test_estimators() -> None:
    """Fails if verl calls the estimators with other arguments, or a turn's reward goes to another turn."""
    from verl import DataProto

    rng = torch.Generator().manual_seed(0)
    mask = batch()["response_mask"].long()
    rewards = torch.randn(B, T, generator=rng)
    uid = np.array(["a", "a", "a", "b", "b", "b"], dtype=object)
    found = {}
    for name in ("at2po_turn", "at2po_tree"):
        data = DataProto.from_dict(
            {"token_level_rewards": rewards, "response_mask": mask, "responses": mask}, non_tensors={"uid": uid}
        )
        gamma = {"gamma": 0.9}
        found[name] = compute_advantage(data, name, config=core_algos.AlgoConfig(**gamma)).batch["advantages"]
    torch.testing.assert_close(found["at2po_turn"], return_advantages(rewards, mask, list(uid), 0.9))
    padded = torch.nn.functional.pad(mask, (1, 0))
    starts = (padded.diff() == 1) * mask
    turn = (starts.cumsum(1) - 1).clamp(min=0)
    sums = torch.zeros(B, T).scatter_add_(1, turn, rewards * mask)
    torch.testing.assert_close(found["at2po_tree"], sums.gather(1, turn) * mask)


def test_found_in_a_new_process() -> None:
    """Fails if a process that only imports verl does not have the names: the entry point is how users get them."""
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from atpo_kernels.hosts.verl import check; check()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    check()


def test_a_failure_to_register_is_told() -> None:
    """Fails if verl's silence about a broken plugin leaves the user without a word."""
    code = (
        "import logging, sys; logging.basicConfig(); import atpo_kernels.hosts.verl as adapter\n"
        "def broken(): raise RuntimeError('not today')\n"
        "adapter.register = broken\n"
        "import verl; from atpo_kernels.hosts.verl import check; check()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert "not registered with verl: RuntimeError: not today" in done.stderr
    assert "Unsupported loss mode: at2po" in done.stderr
