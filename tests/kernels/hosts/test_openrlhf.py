"""OpenRLHF's adapter against OpenRLHF itself: `make test-adapters` installs it.

Importing `openrlhf.models` imports flash-attn, which needs CUDA: names of it are put in its place. The loss is real.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_kernels import turn_policy_loss
from atpo_kernels.hosts.openrlhf import TurnPolicyLoss, check

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("OpenRLHF is not installed", allow_module_level=True)


class _Absent(ModuleType):
    """A package that is not here; whatever is imported from it is None."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def import_loss() -> Any:
    """OpenRLHF's class, imported while names stand in for flash-attn."""
    from transformers.utils import import_utils

    for version in (2, 3, 4):  # asked now, as transformers keeps the answer
        assert not getattr(import_utils, f"is_flash_attn_{version}_available")()
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
        sys.modules.setdefault(name, _Absent(name))
    return importlib.import_module("openrlhf.models.loss").PolicyLoss


PolicyLoss = import_loss()
B, T = 6, 12


def batch() -> dict[str, Tensor]:
    """Arguments of forward; row 1 has no action tokens."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(B, T, generator=rng) < 0.7
    mask[1] = False
    old = -normal(B, T).abs()
    return {
        "old_log_probs": old,
        "log_probs": old + 0.5 * normal(B, T),
        "advantages": normal(B, T),
        "action_mask": mask,
    }


def evaluate(loss: Any, given: dict[str, Tensor], **counts: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient with respect to the log-probs, clip ratio and KL."""
    leaf = given["log_probs"].clone().requires_grad_()
    value, clip_ratio, kl, vllm_kl, filtered = loss(**{**given, "log_probs": leaf}, **counts)
    assert vllm_kl is None and filtered is None
    return value.detach(), torch.autograd.grad(value, leaf)[0], clip_ratio.double(), kl


@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 10}], ids=str)
@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("options", [{}, {"policy_loss_type": "gspo"}, {"dual_clip": 3.0}], ids=str)
def test_equals_openrlhf(options: dict[str, Any], token_level_loss: bool, counts: dict[str, int]) -> None:
    """Fails if a loss that both have is averaged otherwise. OpenRLHF adds 1e-8 to the number of tokens of a row."""
    clip: dict[str, Any] = {"clip_eps_low": 0.1, "clip_eps_high": 0.15, "token_level_loss": token_level_loss}
    given = batch()
    if "policy_loss_type" in options:  # theirs differentiates the mean: the same where a row has one advantage
        given["advantages"] = given["advantages"][:, :1].expand(B, T)
    theirs = evaluate(PolicyLoss(**clip, **options), given, **counts)
    ours = evaluate(TurnPolicyLoss(**clip, **options, level="token"), given, **counts)
    for i in (0, 1, 3):
        torch.testing.assert_close(ours[i], theirs[i], rtol=2e-8, atol=1e-9)
    if not options:  # else ours counts capped tokens as clipped; theirs is in float32
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("token_level_loss", [True, False])
def test_micro_batches_and_ranks_add_up(token_level_loss: bool) -> None:
    """Fails if three micro-batches or two ranks give another gradient than one batch, at the level of turns."""
    given, loss = batch(), TurnPolicyLoss(clip_eps_low=0.1, clip_eps_high=0.15, token_level_loss=token_level_loss)
    counts = {"batch_num_tokens": int(given["action_mask"].sum()), "global_batch_size": B - 1}
    whole = evaluate(loss, given, **counts)[:2]
    for size, ranks in ((2, 1), (3, 2)):
        rows = [{k: v[i : i + size] for k, v in given.items()} for i in range(0, B, size)]
        parts = [evaluate(loss, part, dp_size=ranks, **counts)[:2] for part in rows]
        losses, gradients = zip(*parts, strict=True)
        added = sum(losses) / ranks, torch.cat(gradients) / ranks
        torch.testing.assert_close(added, whole, rtol=1e-11, atol=1e-13)
    leaf = given["log_probs"].clone().requires_grad_()
    how: dict[str, Any] = {"reduction": "token-mean"} if token_level_loss else {"denominator": B - 1}
    out = turn_policy_loss(
        leaf,
        given["old_log_probs"],
        given["advantages"],
        mask=given["action_mask"],
        clip_low=0.1,
        clip_high=0.15,
        **how,
    )
    torch.testing.assert_close(whole[1], torch.autograd.grad(out.loss, leaf)[0], rtol=1e-11, atol=1e-13)


def test_corrections_are_refused() -> None:
    """Fails if a correction of OpenRLHF's configuration is dropped without a word."""
    with pytest.raises(ValueError, match="is_correction_level='token'"):
        TurnPolicyLoss(is_correction_level="token", is_correction_mode="mask")


def test_check() -> None:
    """Fails if OpenRLHF's loss has taken on an argument."""
    check()
