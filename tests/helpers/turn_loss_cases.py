"""Random inputs of turn_policy_loss, and a run of it that returns all it computes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atpo_kernels import LeafPaths, TokenWeights, turn_policy_loss
from tests.helpers.kernel_cases import assert_as_precise_as, turn_offsets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels run
# wide enough that tokens fall on both sides of both bounds and beyond the dual cap
BOUNDS = {"clip_low": 0.2, "clip_high": 0.3, "dual_cap": 1.5, "sapo_tau_pos": 0.9, "sapo_tau_neg": 1.2}
EVERY_TERM: dict[str, Any] = {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.2, "importance_cap": 1.1}


def padded_case(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a padded batch in float64; row 1 has no action tokens."""
    rng = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=rng, dtype=torch.float64) * 3
    made = {
        "logprob": old + 0.6 * torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "old_logprob": old,
        "advantages": torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "mask": torch.rand(rows, length, generator=rng) < 0.7,
        "ref_logprob": old + torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "rollout_logprob": old + torch.randn(rows, length, generator=rng, dtype=torch.float64),
        "entropy": torch.rand(rows, length, generator=rng, dtype=torch.float64),
    }
    if rows > 1:
        made["mask"][1] = False
    return made


def packed_case(lengths: list[int], seed: int = 0, leaves: int = 3) -> dict[str, Any]:
    """Arguments of packed turns with weights of both signs, a third of W+ being 0, and trajectories through them."""
    rng = torch.Generator().manual_seed(seed)
    tokens, turns = sum(lengths), len(lengths)
    made = {
        k: v[0, :tokens] for k, v in padded_case(1, max(tokens, 1), seed).items() if k not in ("mask", "advantages")
    }
    share = torch.rand(3, tokens, generator=rng, dtype=torch.float64)
    share[0][torch.rand(tokens, generator=rng) < 0.3] = 0
    chosen = [torch.randperm(turns, generator=rng)[: max(1, turns - i)] for i in range(leaves)] if turns else []
    entries = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)
    signs = torch.randn(len(entries), generator=rng, dtype=torch.float64)
    offsets = turn_offsets([len(c) for c in chosen])
    made["turn_offsets"] = turn_offsets(lengths)
    made["weights"] = TokenWeights(*share)
    made["paths"] = LeafPaths(offsets, entries.int(), signs.clamp(min=0), (-signs).clamp(min=0))
    return made


def converted(value: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A tensor, or the tensors of a record or dictionary: on a device, and with floats of that dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: converted(x, dtype, device) for name, x in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: converted(getattr(value, f.name), dtype, device) for f in fields(value)})
    return value


def run(case: dict[str, Any], **keywords: Any) -> dict[str, Tensor]:
    """Loss, coefficients, metrics, and gradients under an upstream gradient other than 1, by name."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in ("logprob", "entropy") if name in case}
    out = turn_policy_loss(**(case | leaves), **keywords)
    up = torch.linspace(-2, 3, out.loss.numel(), dtype=out.loss.dtype, device=out.loss.device).view(out.loss.shape)
    grads = torch.autograd.grad((out.loss * up).sum(), list(leaves.values()), materialize_grads=True)
    found = {"loss": out.loss.detach(), "coef": out.coef, **out.metrics}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_precise(case: dict[str, Any], dtype: torch.dtype = torch.float32, **keywords: Any) -> None:
    """The gate of the Triton kernels, for every result: from inputs of a dtype, against float64 of the same inputs."""
    keywords = {**BOUNDS, **keywords}
    rounded = converted(case, dtype, DEVICE)
    exact = run(converted(rounded, torch.float64), impl="reference", **keywords)
    plain, ours = (run(rounded, impl=impl, **keywords) for impl in ("torch", "triton"))
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape, name
        results = [plain[name], ours[name], value]
        if name == "loss" and value.dim() == 0:
            # its terms may cancel, so the error is judged beside their size
            results = [torch.stack([x.double(), exact["coef"].abs().sum()]) for x in results]
        assert_as_precise_as(*results)
