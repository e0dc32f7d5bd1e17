"""Random inputs of turn_policy_loss, and a run of it that returns all it computes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atpo_kernels import LeafPaths, TokenWeights, turn_policy_loss
from tests.helpers.devices import DEVICE
from tests.helpers.error_bounds import Bound, assert_no_less_precise, head_bounds, loss_bounds
from tests.helpers.kernel_cases import TEMPERATURE, Head, turn_offsets

# wide enough that tokens fall on both sides of both bounds and beyond the dual cap
BOUNDS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "dual_cap": 1.5, "sapo_tau_pos": 0.9, "sapo_tau_neg": 1.2}
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


def turn_clip(turns: int, seed: int = 0) -> dict[str, Tensor]:
    """Clip ranges of packed turns, of 0 to 0.5; exact in float32."""
    rng = torch.Generator().manual_seed(seed)
    low, high = torch.randint(129, (2, turns), generator=rng).double() / 256
    return {"clip_low": low, "clip_high": high}


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


def assert_precise(
    case: dict[str, Any], dtype: torch.dtype = torch.float32, truth: str = "reference", **keywords: Any
) -> None:
    """The gate of the Triton kernels, for every result: from inputs of a dtype, against float64 of the same inputs.

    The definition keeps a tensor of all tokens for every turn; for very many of them take `truth="torch"`, its equal.
    """
    keywords = {name: value for name, value in {**BOUNDS, **keywords}.items() if name not in case}
    rounded = converted(case, dtype, DEVICE)
    inputs = converted(rounded, torch.float64, DEVICE)
    exact = run(inputs, impl=truth, **keywords)
    plain, ours = (run(rounded, impl=impl, **keywords) for impl in ("torch", "triton"))
    assert ours.keys() == exact.keys()
    dtypes = {name: value.dtype for name, value in ours.items()}
    # what a shift changes is the same by the definition, which loops over turns, and takes ten times as long
    bounds = loss_bounds(lambda shifted, **more: run(shifted, impl="torch", **{**keywords, **more}), inputs, dtypes)
    for name, value in exact.items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape, name
        assert_no_less_precise(plain[name], ours[name], value, bounds[name])


def linear_loss_bounds(
    head: Head,  # in float64, as it is in the dtype
    keywords: dict[str, Any],  # of run_linear_loss
    exact: list[Tensor],  # its results
    dtype: torch.dtype,
    **more: Any,
) -> list[Bound]:
    """Bounds of every result of run_linear_loss: the head's, the loss's, and what one does to the other."""
    rows = torch.zeros_like(exact[2])
    gradients = 2 + (len(exact[-1].shape) == 1)  # with or without the bias's
    seen = [*exact[2:4], *exact[-gradients:]]
    values = head_bounds(head, seen, (rows, rows), dtype, temperature=TEMPERATURE)[:2]
    case = keywords | {"logprob": exact[2], "entropy": exact[3]}
    if keywords["old_logprob"] is None:
        case["old_logprob"] = exact[2]
    loss = lambda shifted, **options: run(shifted, impl="torch", **{**more, **options})  # noqa: E731
    by_name, found = loss_bounds(loss, case, {}, (values[0], values[1])), loss(case)
    names = ("gradient of logprob", "gradient of entropy")
    # the upstream gradient of the case is -2, that of run_linear_loss -4; by powers of 2 nothing rounds
    up = (2 * found[names[0]], 2 * found[names[1]])
    by_up = (by_name[names[0]].scaled(2), by_name[names[1]].scaled(2))
    half = torch.float16 if dtype != torch.float32 else dtype
    by_head = head_bounds(
        head, seen, up, dtype, temperature=TEMPERATURE, stored=True, exponentials=half, by_up=by_up, factor=4.0
    )
    metrics = [by_name[name] for name in found if name not in ("loss", "coef", *names)]
    return [by_name["loss"], by_name["coef"], *values, *metrics, *by_head[2:]]
