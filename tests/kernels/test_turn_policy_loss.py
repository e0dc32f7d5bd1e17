"""turn_policy_loss against a plain loop written from the formulas, and against autograd through the definition."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atpo_kernels import LeafPaths, LossConfig, TokenWeights, turn_policy_loss
from atpo_kernels.choices import ClipFamily, KLEstimator, RatioLevel, Reduction
from tests.helpers.kernel_cases import turn_offsets
from tests.helpers.turn_loss_cases import BOUNDS, packed_case, padded_case

LEVELS, CLIPS, REDUCTIONS, KLS = (get_args(x) for x in (RatioLevel, ClipFamily, Reduction, KLEstimator))


def loop_f(rho: Tensor, logprob: Tensor, advantage: float, c: LossConfig) -> Tensor:
    """f(rho, A) of one token, with the gradient that the clip family defines."""
    low, high = 1 - c.clip_low, 1 + c.clip_high
    clipped = rho.clamp(low, high)
    if c.dual_cap is not None and advantage < 0 and bool(rho > c.dual_cap):
        return torch.tensor(-advantage * c.dual_cap, dtype=rho.dtype) + 0 * logprob
    if c.clip == "cispo":
        return -advantage * clipped.detach() * logprob
    if c.clip == "sapo":
        tau = c.sapo_tau_pos if advantage > 0 else c.sapo_tau_neg
        return -advantage * 4 / tau * torch.sigmoid(tau * (rho - 1))
    if c.clip == "soft" or (c.clip == "soft_high" and advantage > 0):
        clipped = clipped.detach() * rho / rho.detach()
    return torch.maximum(-advantage * rho, -advantage * clipped)


def loop_kl(logprob: Tensor, ref: Tensor, mode: str) -> Tensor:
    """KL estimate of one token."""
    d = ref - logprob
    if mode == "low_var":
        d = d.clamp(-20, 20)
        return (d.exp() - d - 1).clamp(-10, 10)
    return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[mode]


def loop_turns(mask: list[bool]) -> list[list[int]]:
    """Positions of the maximal runs of ones."""
    turns: list[list[int]] = []
    for t, on in enumerate(mask):
        if on and (t == 0 or not mask[t - 1]):
            turns.append([])
        if on:
            turns[-1].append(t)
    return turns


def loop_loss(b: dict[str, Tensor], c: LossConfig, reduction: str) -> Tensor:
    """The published loss, one token at a time."""
    logprob, mask = b["logprob"], b["mask"]
    rows, length = mask.shape
    per_token = torch.zeros_like(mask, dtype=torch.float64)
    total_tokens = max(int(mask.sum()), 1)
    loss = torch.zeros((), dtype=torch.float64)
    by_token: dict[tuple[int, int], Tensor] = {}
    for i in range(rows):
        turns = loop_turns(mask[i].tolist())
        size = sum(len(turn) for turn in turns)
        for turn in turns:
            for t in turn:
                group = {"token": [t], "turn": turn, "sequence": [x for y in turns for x in y]}[c.level]
                mean = sum(float(logprob.detach()[i, x]) - float(b["old_logprob"][i, x]) for x in group) / len(group)
                lp = logprob[i, t]
                rho = (
                    (mean + lp - lp.detach()).exp() if mean <= c.max_log_ratio else torch.exp(0 * lp + c.max_log_ratio)
                )
                f = loop_f(rho, lp, float(b["advantages"][i, t]), c)
                if c.importance_cap is not None:
                    f = f * (b["old_logprob"] - b["rollout_logprob"])[i, t].exp().clamp(max=c.importance_cap)
                if c.kl != "none":
                    f = f + c.kl_coef * loop_kl(lp, b["ref_logprob"][i, t], c.kl)
                f = f - c.entropy_coef * b["entropy"][i, t]
                by_token[i, t] = f
                weight = {
                    "seq-mean-token-mean": 1 / (rows * size),
                    "token-mean": 1 / total_tokens,
                    "seq-mean-token-sum": 1 / rows,
                    "seq-mean-token-sum-norm": 1 / (rows * length),
                    "turn-mean": 1 / (rows * len(turns) * len(turn)),
                    "sum": 1.0,
                    "none": 1.0,
                }[reduction]
                loss = loss + weight * f
    if reduction != "none":
        return loss
    for place, f in by_token.items():
        per_token = per_token.index_put(tuple(torch.tensor(x) for x in place), f)
    return per_token


def ours_and_loop(b: dict[str, Tensor], c: LossConfig, reduction: Any, impl: Any = "torch") -> list[list[Tensor]]:
    """(loss, gradient of logprob, gradient of entropy) of both, with an upstream gradient other than 1."""
    results = []
    for ours in (True, False):
        leaves: dict[str, Any] = b | {k: b[k].clone().requires_grad_() for k in ("logprob", "entropy")}
        if ours:
            loss = turn_policy_loss(**leaves, config=c, reduction=reduction, impl=impl).loss
        else:
            loss = loop_loss(leaves, c, reduction)
        up = torch.linspace(-2, 3, loss.numel(), dtype=torch.float64).view(loss.shape)
        grads = torch.autograd.grad((loss * up).sum(), [leaves["logprob"], leaves["entropy"]], allow_unused=True)
        results.append([loss, *(torch.zeros_like(b["mask"], dtype=torch.float64) if g is None else g for g in grads)])
    return results


@pytest.mark.parametrize(("level", "clip"), list(product(LEVELS, CLIPS)))
def test_padded_batch_equals_the_loop(level: Any, clip: Any) -> None:
    """Fails on an error in ratio level, clip family, aggregation, or their gradients."""
    config = LossConfig(level=level, clip=clip, **BOUNDS | {"dual_cap": None})
    for reduction in REDUCTIONS:
        for ours, loop in zip(*ours_and_loop(padded_case(4, 9), config, reduction), strict=True):
            torch.testing.assert_close(ours, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("level", "clip"), list(product(LEVELS, CLIPS)))
def test_dual_cap_and_cap_of_the_log_ratio_equal_the_loop(level: Any, clip: Any) -> None:
    """Fails if the cap of A < 0 is lost beside a family, reaches A > 0, or a ratio over a cap has a gradient."""
    config = LossConfig(level=level, clip=clip, **BOUNDS, max_log_ratio=0.6)
    b = padded_case(4, 9)
    b["logprob"][0, :] += 0.5  # ratios beyond both caps, also of whole rows and turns
    for ours, loop in zip(*ours_and_loop(b, config, "seq-mean-token-mean"), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kl", [x for x in KLS if x != "none"])
def test_kl_entropy_and_importance_weights_equal_the_loop(kl: Any, impl: Any) -> None:
    """Fails on an error in a KL estimator or its derivative, the entropy bonus or the truncated weights."""
    b = padded_case(3, 8)
    b["ref_logprob"][0, :4] += torch.tensor([4.0, -4.0, 30.0, -30.0])  # beyond both clamps of low_var
    b["logprob"][0, 4] = 0.0  # the only word there is
    config = LossConfig(level="turn", kl=kl, kl_coef=0.3, entropy_coef=0.2, importance_cap=1.1, **BOUNDS)
    for ours, loop in zip(*ours_and_loop(b, config, "seq-mean-token-mean", impl), strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("clip", ["hard", "soft", "cispo"])
def test_a_ratio_at_its_bound_is_not_clipped(clip: Any, impl: Any) -> None:
    """Fails if a ratio that equals a bound, or the cap of A < 0, loses its gradient or is counted as clipped."""
    cap = float(torch.tensor(0.5, dtype=torch.float64).exp())
    log_ratio = torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64)  # 1 at bounds of width 0; exactly the cap
    advantages = torch.tensor([[2.0, -3.0, -1.0]], dtype=torch.float64)
    leaf = log_ratio.clone().requires_grad_()
    options: dict[str, Any] = {"level": "token", "clip": clip, "clip_low": 0.0, "clip_high": 0.0, "dual_cap": cap}
    if clip == "cispo":
        options["clip_high"] = 1.0
    out = turn_policy_loss(leaf, torch.zeros_like(leaf), advantages, reduction="sum", impl=impl, **options)
    torch.testing.assert_close(out.coef[0], torch.tensor([-2.0, 3.0, cap], dtype=torch.float64), rtol=1e-15, atol=0)
    assert torch.equal(torch.autograd.grad(out.loss, leaf)[0], out.coef)
    assert out.metrics["clipped_low"] == out.metrics["clipped_high"] == 0


def test_default_is_the_published_loss() -> None:
    """Fails if a default is not level turn, clip 3e-3/4e-3, seq-mean-token-mean over all rows."""
    b = padded_case(4, 9)
    plain = turn_policy_loss(b["logprob"], b["old_logprob"], b["advantages"], mask=b["mask"]).loss
    config = LossConfig(level="turn", clip="hard", clip_low=3e-3, clip_high=4e-3)
    torch.testing.assert_close(plain, loop_loss(b, config, "seq-mean-token-mean"), rtol=1e-12, atol=1e-14)


def test_advantage_by_row_and_denominator() -> None:
    """Fails if (B,) advantages are not spread over rows, or the caller's denominator is not used in place of B."""
    b = padded_case(4, 9)
    by_row = b["advantages"][:, 0]
    spread = b | {"advantages": by_row[:, None].expand(4, 9)}
    one = turn_policy_loss(b["logprob"], b["old_logprob"], by_row, mask=b["mask"], denominator=16.0)
    torch.testing.assert_close(one.loss * 4, turn_policy_loss(**spread).loss)
    tokens = turn_policy_loss(**spread, reduction="token-mean", denominator=torch.tensor(10.0, dtype=torch.float64))
    torch.testing.assert_close(tokens.loss * 10, turn_policy_loss(**spread, reduction="sum").loss)


def assert_equal_results(results: list[Any], leaves: list[list[Tensor]]) -> None:
    """Same loss, coefficients, metrics and gradients, and gradient equal to the coefficient."""
    ours, reference = results
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.coef, reference.coef, rtol=1e-10, atol=1e-12)
    assert ours.metrics.keys() == reference.metrics.keys()
    for name, value in ours.metrics.items():
        torch.testing.assert_close(value, reference.metrics[name], rtol=1e-9, atol=1e-11, msg=name)
        assert value.shape == () and not value.requires_grad
    grads = [
        torch.autograd.grad(r.loss * -1.7, x, materialize_grads=True) for r, x in zip(results, leaves, strict=True)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads[0][0], -1.7 * ours.coef, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    level=st.sampled_from(LEVELS),
    clip=st.sampled_from(CLIPS),
    kl=st.sampled_from(KLS),
    seed=st.integers(0, 99),
)
def test_packed_turns_equal_the_definition(lengths: list[int], level: Any, clip: Any, kl: Any, seed: int) -> None:
    """Fails if a segment (empty, of one token, the last one) is averaged wrongly, or a path entry is lost."""
    case = packed_case(lengths, seed)
    config = LossConfig(level=level, clip=clip, kl=kl, kl_coef=0.2, entropy_coef=0.1, importance_cap=1.2, **BOUNDS)
    results, leaves = [], []
    for impl in ("torch", "reference"):
        leaf = [case["logprob"].clone().requires_grad_(), case["entropy"].clone().requires_grad_()]
        inputs = case | {"logprob": leaf[0], "entropy": leaf[1]}
        results.append(turn_policy_loss(**inputs, config=config, impl=impl))
        leaves.append(leaf)
    assert_equal_results(results, leaves)


@pytest.mark.parametrize("level", LEVELS)
def test_packed_trajectories_equal_their_padded_batch(level: Any) -> None:
    """Fails if the de-duplicated loss of shared turns is not that of the trajectories written out."""
    lengths, leaves = [2, 3, 1, 4], [[0, 1], [0, 2], [0, 2, 3]]  # turn 0 is shared by all, 2 by two
    rng = torch.Generator().manual_seed(3)
    offsets = turn_offsets(lengths)
    old = -torch.rand(10, generator=rng, dtype=torch.float64)
    logprob = (old + 0.5 * torch.randn(10, generator=rng, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(3, generator=rng, dtype=torch.float64)
    pos, neg, every = torch.zeros(3, 10, dtype=torch.float64)
    rows, path_pos, path_neg = [], [], []
    for leaf, a in zip(leaves, advantage, strict=True):
        share = 1 / (3 * sum(lengths[n] for n in leaf))
        tokens = torch.cat([torch.arange(int(offsets[n]), int(offsets[n + 1])) for n in leaf])
        pos[tokens] += share * a.clamp(min=0)
        neg[tokens] += share * (-a).clamp(min=0)
        every[tokens] += share
        path_pos += [share * a.clamp(min=0)] * len(leaf)
        path_neg += [share * (-a).clamp(min=0)] * len(leaf)
        rows.append(tokens)
    paths = LeafPaths(
        turn_offsets([len(x) for x in leaves]),
        torch.tensor([n for leaf in leaves for n in leaf]),
        torch.stack(path_pos),
        torch.stack(path_neg),
    )
    config = LossConfig(level=level, kl="k3", kl_coef=0.1, **BOUNDS)
    packed = turn_policy_loss(
        logprob,
        old,
        turn_offsets=offsets,
        weights=TokenWeights(pos, neg, every),
        paths=paths,
        ref_logprob=old,
        config=config,
    )
    # the same trajectories padded, with an observation of one token between turns
    columns = [[t for n in leaf for t in [*range(int(offsets[n]), int(offsets[n + 1])), -1]] for leaf in leaves]
    table = torch.tensor([c + [-1] * (max(map(len, columns)) - len(c)) for c in columns])
    flat = turn_policy_loss(
        logprob[table], old[table], advantage, mask=table >= 0, ref_logprob=old[table], config=config
    )
    torch.testing.assert_close(packed.loss, flat.loss, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(x.loss, logprob)[0] for x in (packed, flat)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


def test_turn_ids_replace_the_runs_of_the_mask() -> None:
    """Fails if adjacent turns merge, or a hole in the mask cuts a turn, although the caller said where turns are."""
    b = padded_case(1, 6)
    b["mask"] = torch.tensor([[True, True, True, False, True, False]])
    ids = torch.tensor([[3, 3, 5, 7, 5, -9]])  # anything outside the mask
    joined = turn_policy_loss(**b, turn_ids=ids, reduction="sum", **BOUNDS)
    order = [0, 1, 2, 4]
    packed = turn_policy_loss(
        b["logprob"][0, order],
        b["old_logprob"][0, order],
        b["advantages"][0, order],
        turn_offsets=turn_offsets([2, 2]),
        **BOUNDS,
    )
    torch.testing.assert_close(joined.loss, packed.loss)
    with pytest.raises(ValueError, match="turn_ids must lie in"):
        turn_policy_loss(**b, turn_ids=ids + 4)
    with pytest.raises(ValueError, match="must not be interrupted"):
        turn_policy_loss(**b, turn_ids=torch.tensor([[3, 5, 3, 7, 5, -9]]))


def test_without_old_logprobs_the_policy_is_on_policy() -> None:
    """Fails if old_logprob=None is not the current log-probs, or a gradient flows through them."""
    b = padded_case(3, 7)
    leaf = b["logprob"].clone().requires_grad_()
    out = turn_policy_loss(**(b | {"logprob": leaf, "old_logprob": None}))
    given = turn_policy_loss(**(b | {"old_logprob": b["logprob"]}))
    assert torch.equal(out.loss, given.loss) and torch.equal(torch.autograd.grad(out.loss, leaf)[0], given.coef)
    assert float(out.metrics["ratio_max"]) == 1


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("clip", CLIPS)
def test_garbage_in_padding_is_not_seen(garbage: float, clip: Any) -> None:
    """Fails if padding reaches loss, metrics or gradient, also as 0 * inf or through exp."""
    config = LossConfig(clip=clip, kl="low_var", kl_coef=0.1, entropy_coef=0.1, importance_cap=2.0, **BOUNDS)
    clean = padded_case(4, 9)
    dirty = {k: v if k == "mask" else torch.where(clean["mask"], v, garbage) for k, v in clean.items()}
    results = []
    for b in (clean, dirty):
        leaf = b["logprob"].clone().requires_grad_()
        out = turn_policy_loss(**(b | {"logprob": leaf}), config=config)
        results.append([out.loss, torch.autograd.grad(out.loss, leaf)[0], *out.metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][~clean["mask"]].any()


def test_gradcheck_where_the_gradient_is_a_true_derivative() -> None:
    """Fails if value and coefficient disagree; levels and clips with a stop-gradient have no such derivative."""
    b = padded_case(2, 5)
    for clip, cap in (("hard", None), ("hard", 1.5), ("sapo", None)):

        def loss(logprob: Tensor, entropy: Tensor, clip: Any = clip, cap: float | None = cap) -> Tensor:
            inputs = b | {"logprob": logprob, "entropy": entropy}
            options: dict[str, Any] = BOUNDS | {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.2, "dual_cap": cap}
            return turn_policy_loss(**inputs, level="token", clip=clip, **options).loss

        assert torch.autograd.gradcheck(loss, [b[k].clone().requires_grad_() for k in ("logprob", "entropy")])


def test_metrics_by_hand() -> None:
    """Fails if a clip fraction counts the wrong sign or the wrong denominator, or a mean includes masked tokens."""
    ratio = torch.tensor([[0.5, 2.0, 0.5, 2.0, 1.0, 9.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    out = turn_policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask=mask, level="token")
    expected = {
        "clipped_low": 1 / 5,  # A<0 at ratio 0.5
        "clipped_high": 1 / 5,  # A>0 at ratio 2
        "ratio_mean": 6.0 / 5,
        "ratio_max": 2.0,
        "turns": 1.0,
        "tokens": 5.0,
        "approx_kl": float((ratio - 1 - ratio.log())[0, :5].mean()),
    }
    assert {k: float(v) for k, v in out.metrics.items()} == pytest.approx(expected)


def test_metrics_of_one_token_and_of_none() -> None:
    """Fails if one token is averaged over more, the KL is of another gap, or nothing counted is not 0."""
    logprob, old = torch.tensor([[-1.5]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    ones = torch.ones_like(logprob)
    one = turn_policy_loss(logprob, old, ones, mask=ones.bool()).metrics
    ratio = float(torch.tensor(-0.5, dtype=torch.float64).exp())
    assert float(one["ratio_mean"]) == float(one["ratio_max"]) == pytest.approx(ratio, rel=1e-15)
    assert float(one["approx_kl"]) == pytest.approx(ratio - 1 + 0.5, rel=1e-14) and one["turns"] == one["tokens"] == 1
    none = turn_policy_loss(logprob, old, ones, mask=~ones.bool()).metrics
    assert all(value == 0 for value in none.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Fails if half precision is not computed in float32, or the gradient has another dtype than logprob."""
    b = {k: v if k == "mask" else v.to(dtype) for k, v in padded_case(3, 5).items()}
    leaf = b["logprob"].clone().requires_grad_()
    out = turn_policy_loss(**(b | {"logprob": leaf}))
    out.loss.backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {out.loss.dtype, out.coef.dtype, *(m.dtype for m in out.metrics.values())} == {expected}


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (7,)])
def test_shapes_at_the_edge(shape: tuple[int, ...]) -> None:
    """Fails if an empty batch breaks or cuts the graph, or a 1-D tensor is not one padded row."""
    logprob = torch.randn(shape, requires_grad=True)
    loss = turn_policy_loss(logprob, logprob.detach() - 0.1, torch.ones(shape)).loss
    loss.backward()
    assert torch.isfinite(loss) and logprob.grad is not None and logprob.grad.shape == shape


def test_non_contiguous_inputs() -> None:
    """Fails if a stride is ignored when rows are flattened."""
    b = padded_case(4, 9)
    strided = {k: v.T.contiguous().T for k, v in b.items()}
    plain, other = (turn_policy_loss(**x, reduction="none") for x in (b, strided))
    assert torch.equal(plain.loss, other.loss) and torch.equal(plain.coef, other.coef)


def test_errors_say_what_is_wrong() -> None:
    """Fails if a combination without meaning is computed anyway."""
    b = packed_case([2, 3])
    lp, old, adv, weights = b["logprob"], b["old_logprob"], b["logprob"], b["weights"]
    offsets = turn_offsets([2, 3])
    bad: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((lp, old), {}, "either advantages or weights"),
        ((lp, old, adv), {"weights": weights}, "either advantages or weights"),
        ((lp, old[:3], adv), {}, "old_logprob must be"),
        ((lp, old, adv[:3]), {"turn_offsets": offsets}, "advantages of packed turns"),
        ((lp, old, adv[:2]), {"turn_offsets": turn_offsets([2, 2])}, "turn_offsets end at 4"),
        ((lp, old, adv), {"turn_offsets": offsets, "reduction": "seq-mean-token-mean"}, "which turns form a sequence"),
        ((lp, old), {"turn_offsets": offsets, "weights": weights, "level": "sequence"}, "needs weights and paths"),
        ((lp, old), {"turn_offsets": offsets, "weights": weights, "reduction": "token-mean"}, "'sum' or 'none'"),
        ((lp, old, adv), {"kl": "k3", "kl_coef": 0.1}, "ref_logprob must be given"),
        ((lp, old, adv), {"entropy_coef": 0.1}, "entropy must be given"),
        ((lp, old, adv), {"importance_cap": 2.0}, "rollout_logprob must be given"),
        ((lp, old, adv), {"reduction": "mean"}, "reduction='mean'"),
    ]
    for arguments, keywords, message in bad:
        with pytest.raises(ValueError, match=message):
            turn_policy_loss(*arguments, **keywords)
