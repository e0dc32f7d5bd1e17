"""How far rounding can move the results of the kernels: bounds that hold in any order of summation, on any processor.

One draw of a rounding error says little: two correct programs that add in another order differ by as much as their
errors, and with peaked scores all of the error of a gradient can be that of one near tie. So what is computed is held
against what rounding can do at most, element by element, from the inputs in float64.

Rules. u is half the distance of 1 to the next number. A sum of n products in floating point, in any order, with or
without fused operations, is off by at most gamma(n) = n u / (1 - n u) times the sum of the absolute products (Higham,
Accuracy and Stability, section 3.1). A rounding to a dtype is off by at most half a spacing there.

Softmax. Logits z = (h.w + b) / T are off by at most e = gamma(D + 4) (|h|.|w| + |b|) / T, and the exponent z - peak by
a few u of itself; e is both. To first order a change dz of the logits changes log p_v by dz_v - sum_u p_u dz_u, so

    |d log p_v| <= (1 - p_v) e_v + sum_{u != v} p_u e_u + s,          |dp_v| <= p_v |d log p_v|,
    |dH| <= sum_v p_v |log p_v + H| e_v + (s + 2 u) (1 + log V + sum_v p_v (peak - z_v))   (H the entropy)

where s = gamma(V + 16) for the sum of exponentials, which are rescaled a few times on the way. In a row with a near tie
of peaked logits e is large and p (1 - p) is not small; in all others p (1 - p) makes it vanish. What is left out, of
second order, is a share of e, at most 0.01 here (`SECOND_ORDER`).

The backward computes logits again, with another shape of product and so, on some processors, with other roundings than
those in the peak and the sum that it is given. Then nothing cancels where p is near 1:

    |d log p_v| <= e_v + sum_u p_u e_u + s

That, and no near tie, is what a gradient 1 - p shows of a peaked softmax; plain PyTorch keeps its logits.

Gradients are products with these numbers: the error of a product A B is at most |dA| |B| + gamma(K) |A| |B|. Where a
kernel stores one side of a product in half precision (weights, or gradients by logits, for the matrix units), one
rounding of that side is added, and at the end one of the result. Nothing else may be in half precision: logits rounded
to bfloat16 would be off by 2^-9 |z|, and the bound of a log-prob has 2^-24 (D + 4) |h|.|w| in that place.

Losses are sums of functions of log ratios, which are means of differences of n numbers: these are off by at most
gamma(n + 4) times their largest. How far that moves a result is asked of the definition itself, in float64, with
shifted inputs, so that a token within that distance of a clip's border may fall on either side; gamma(n + 32) times the
size of the terms is added for their own roundings and sums.

Size. The bound is what roundings do when all of them are largest and of one sign. Of independent signs they add up in
quadrature: gamma(n) becomes u sqrt(n / 3) and sums become roots of sums of squares. `TYPICAL` is the bound by these
rules: the root mean square of the error is below it. Beside plain PyTorch, errors are taken in units of their bound, so
that all elements count alike and no near tie decides: many draws in one tensor.

Chance. A tensor of few elements is few draws. A rounding is uniform, hence sub-Gaussian with its variance, and so are
sums of independent ones; the mean square of n such errors is more than 1 + 2 sqrt(x / n) + 2 x / n times what is
expected once in e^x draws (Hsu, Kakade and Zhang, A tail inequality for quadratic forms, 2012). With x = 20 the root of
this is 7.1 for one element, 1.5 for a hundred, 1.05 for ten thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

UNIT = 2.0**-24  # u of float32, in which all kernels compute
SECOND_ORDER = 1.01
UNLIKELY = 20.0  # x: once in 5e8 draws
UNDERFLOW = 1e-30  # of weights below float32's smallest
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # bits


@dataclass(frozen=True)
class Rule:
    """How errors add up: all largest and of one sign, or in quadrature."""

    worst: bool

    def gamma(self, terms: int) -> float:
        """Error of a float32 sum of that many terms, as a share of the sum of their absolute values."""
        return terms * UNIT / (1 - terms * UNIT) if self.worst else UNIT * (terms / 3) ** 0.5

    def add(self, *errors: Tensor) -> Tensor:
        """Errors of one number."""
        if self.worst:
            return sum(errors[1:], errors[0])
        return sum((error.square() for error in errors[1:]), errors[0].square()).sqrt()

    def sum(self, errors: Tensor, dim: int) -> Tensor:
        """Errors of the terms of a sum."""
        return errors.sum(dim) if self.worst else errors.square().sum(dim).sqrt()

    def times(self, errors: Tensor, factor: Tensor) -> Tensor:  # (..., M, K), (..., K, N) -> (..., M, N)
        """Error of a matrix product from the errors of its left side."""
        return errors @ factor.abs() if self.worst else (errors.square() @ factor.square()).sqrt()

    def product(self, left: Tensor, right: Tensor) -> Tensor:  # (..., M, K), (..., K, N) -> (..., M, N)
        """Error of forming a matrix product in float32."""
        return self.gamma(left.shape[-1] + 16) * (left.abs() @ right.abs())

    def rounding(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Error of one rounding of numbers to a dtype: half of the spacing there, which ends at the smallest normal."""
        exponent = torch.frexp(numbers.abs().clamp_min(torch.finfo(dtype).smallest_normal)).exponent
        half = torch.ldexp(torch.ones_like(numbers), exponent - PRECISION[dtype] - 1)
        return half if self.worst else half / 3**0.5

    def share(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Error of numbers in [0, 1] that were rounded to a dtype when they were up to 1 / number times as large."""
        smallest = 0.5 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        largest = 0.5 * torch.finfo(dtype).eps * numbers + smallest
        return largest if self.worst else largest / 3**0.5

    def softmax(self, p: Tensor, errors: Tensor, again: bool) -> Tensor:  # (..., V), (..., V) -> (..., V)
        """Error of log p from those of the logits, which were computed once, or again for p."""
        mean = self.sum(p * errors, -1)[..., None]
        others = mean - p * errors if self.worst else (mean.square() - (p * errors).square()).clamp_min(0).sqrt()
        of_sum = torch.full_like(p, self.gamma(p.shape[-1] + 16))
        return self.add(errors, mean, of_sum) if again else self.add((1 - p) * errors, others, of_sum)


WORST, TYPICAL = Rule(True), Rule(False)


@dataclass(frozen=True)
class Bound:
    """Of the error of one tensor, element by element."""

    worst: Tensor  # with the roundings to half precision that the kernel is allowed
    typical: Tensor  # of float32 alone

    def scaled(self, factor: float) -> Bound:
        """Of the tensor times a positive number."""
        return Bound(self.worst * factor, self.typical * factor)


@dataclass(frozen=True)
class HeadErrors:
    """Bounds of what an LM head gives, and of gradients through it, by one rule."""

    rule: Rule
    hidden: Tensor  # (A, D) float64, like all here
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: float
    log_p: Tensor  # (A, V)
    entropy: Tensor  # (A,)
    by_log_p: Tensor  # (A, V) error of log p
    by_log_p_again: Tensor  # (A, V) error of log p from logits that were computed again
    by_entropy: Tensor  # (A,) error of the entropy

    @classmethod
    def of(cls, rule: Rule, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> HeadErrors:
        """Errors of log p and entropy."""
        offset = torch.zeros_like(weight[:, 0]) if bias is None else bias
        z = (hidden @ weight.T + offset) / temperature
        size = (hidden.abs() @ weight.abs().T + offset.abs()) / temperature
        below = z.amax(-1, keepdim=True) - z
        errors = rule.add(rule.gamma(hidden.shape[1] + 4) * size, rule.gamma(4) * (z.abs() + below + 1))
        log_p = z.log_softmax(-1)
        p, words = log_p.exp(), z.shape[1]
        entropy = -(p * log_p).sum(-1)
        last = rule.gamma(4) * (log_p.abs() + torch.tensor(words).log())
        by_log_p, again = (rule.add(rule.softmax(p, errors, again), last) for again in (False, True))
        spread = 1 + torch.tensor(words).log() + (p * below).sum(-1)
        slope = p * (log_p + entropy[:, None]).abs()
        by_entropy = rule.add(rule.sum(slope * errors, -1), (rule.gamma(words + 16) + rule.gamma(4)) * spread)
        return cls(rule, hidden, weight, bias, temperature, log_p, entropy, by_log_p, again, by_entropy)

    def gradients(
        self,
        targets: Tensor,  # (A,)
        up: tuple[Tensor, Tensor],  # (A,) gradients by log-prob and entropy
        by_up: tuple[Tensor, Tensor] | None,  # (A,) their errors
        stored: torch.dtype,  # of the gradients by logits as the products take them
        exponentials: torch.dtype,  # of the exponentials from which these come
    ) -> list[Tensor]:
        """Errors of the gradients of hidden, weight and bias before they are rounded."""
        rule, p = self.rule, self.log_p.exp()
        grad_logprob, grad_entropy = (x[:, None] for x in up)
        by_logprob_up, by_entropy_up = (x[:, None] for x in by_up or (torch.zeros_like(up[0]),) * 2)
        hit = F.one_hot(targets, p.shape[1])
        deviation = self.log_p + self.entropy[:, None]
        # 1. softmax, and its logarithm
        kept = rule.share(p, exponentials) * (1 - hit) + UNDERFLOW  # the target's is taken from its log-prob
        by_p = rule.add(p * self.by_log_p_again, kept)
        # 2. gradient by the logits
        gradient = (grad_logprob * (hit - p) - grad_entropy * p * deviation) / self.temperature
        parts = (grad_logprob.abs() * (hit + p) + grad_entropy.abs() * p * deviation.abs()) / self.temperature
        by_gradient = rule.add(
            (grad_logprob.abs() * by_p + grad_entropy.abs() * by_p * (1 + deviation.abs())) / self.temperature,
            (grad_entropy.abs() * p * self.by_entropy[:, None]) / self.temperature,
            (by_logprob_up * (hit - p).abs() + by_entropy_up * p * deviation.abs()) / self.temperature,
            rule.gamma(8) * parts,
        )
        if stored != torch.float32:
            by_gradient = rule.add(by_gradient, rule.rounding(gradient.abs() + by_gradient, stored))
        # 3. the products
        ones = torch.ones(len(targets), 1, dtype=p.dtype)
        found = [(by_gradient, gradient, self.weight)]
        found += [(by_gradient.T, gradient.T, x) for x in (self.hidden, ones)[: 1 if self.bias is None else 2]]
        errors = [rule.add(rule.times(by, right), rule.product(left, right)) for by, left, right in found]
        return [*errors[:2], *(x[:, 0] for x in errors[2:])]


class AttentionErrors(NamedTuple):
    """Errors of the output and the gradients of attention before they are rounded to their dtype; in float64.

    None where there are no sinks.
    """

    out: Tensor  # (T, Hq, d)
    q: Tensor  # (T, Hq, d)
    k: Tensor  # (P + T, Hkv, d)
    v: Tensor  # (P + T, Hkv, d)
    sinks: Tensor | None  # (Hq,)


def attention_errors(
    rule: Rule,
    tensors: list[Tensor],  # q, k, v and the upstream gradient in float64
    visible: Tensor,  # (T, P + T) bool
    scale: float,
    results: list[Tensor],  # output, gradients of q, k and v: exact
    dtype: torch.dtype,  # of the output, which the backward reads
    stored: torch.dtype,  # of weights and of gradients by scores as the products take them
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (Hq,)
) -> AttentionErrors:
    """By the derivation above, with scores for logits; delta = sum(dO * O) has the errors of O, rounded, times dO.

    A soft cap multiplies errors by its slope and adds those of tanh, 8 u of itself; the slope 1 - tanh^2 is off by what
    tanh is off. A sink is a last key of value 0 that every query sees.
    """
    q, k, v, up = (x.detach().transpose(0, 1) for x in tensors)  # (H, T, d)
    group = len(q) // len(k)
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    out = results[0].transpose(0, 1)

    def kept(numbers: Tensor, errors: Tensor) -> Tensor:
        return errors if stored == torch.float32 else rule.add(errors, rule.rounding(numbers.abs() + errors, stored))

    # 1. weights
    z, width = scale * q @ k.mT, q.shape[-1]
    errors = rule.gamma(width + 4) * (scale * q.abs() @ k.abs().mT)
    slope, by_slope = torch.ones_like(z), torch.zeros_like(z)
    if softcap is not None:
        tanh = (z / softcap).tanh()
        z, slope = softcap * tanh, 1 - tanh.square()
        errors = rule.add(errors * slope, rule.gamma(10) * z.abs())
        by_slope = rule.add(2 * tanh.abs() * errors / softcap, torch.full_like(z, rule.gamma(2)))
    if sinks is not None:
        beside = sinks.detach()[:, None, None].expand(-1, len(visible), 1)
        z, errors = torch.cat([z, beside], -1), torch.cat([errors, rule.gamma(4) * beside.abs()], -1)
        slope, by_slope = F.pad(slope, (0, 1), value=1.0), F.pad(by_slope, (0, 1))
        visible = F.pad(visible, (0, 1), value=True)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    z = z.masked_fill(~visible, -torch.inf)
    below = (z.amax(-1, keepdim=True) - z).masked_fill(~visible, 0)
    z_size = z.masked_fill(~visible, 0).abs()
    errors = rule.add(errors, rule.gamma(4) * (z_size + below + 1)) * visible
    p = z.softmax(-1)
    by_p, by_p_again = ((p * rule.softmax(p, errors, again) + UNDERFLOW) * visible for again in (False, True))
    # 2. output, from weights that are stored before their sum is known, and gradient of the values
    by_stored = by_p if stored == torch.float32 else rule.add(by_p, rule.share(p, stored))
    by_out = rule.add(rule.times(by_stored * visible, v), rule.product(p, v))
    by_v = rule.add(rule.times((kept(p, by_p_again) * visible).mT, up), rule.product(p.mT, up))
    # 3. gradients by the scores
    rounded = rule.add(by_out, rule.rounding(out.abs() + by_out, dtype)) if dtype != torch.float32 else by_out
    by_delta = rule.add(rule.sum(up.abs() * rounded, -1), rule.gamma(width + 4) * (up * out).abs().sum(-1))
    difference = up @ v.mT - (up * out).sum(-1, keepdim=True)
    by_difference = rule.add(rule.product(up, v.mT), by_delta[..., None], rule.gamma(4) * difference.abs())
    ds = p * difference
    by_ds = rule.add(by_p_again * difference.abs(), p * by_difference, rule.gamma(4) * ds.abs()) * visible
    by_sinks = None
    if sinks is not None:
        by_sinks = rule.add(rule.sum(by_ds[..., -1], -1), rule.gamma(len(visible) + 4) * ds[..., -1].abs().sum(-1))
    by_ds = rule.add(by_ds * slope, by_slope * ds.abs())
    ds = ds * slope
    by_ds = kept(ds, by_ds) * visible
    # 4. gradients of queries and keys
    by_q = scale * rule.add(rule.times(by_ds, k), rule.product(ds, k))
    by_k = scale * rule.add(rule.times(by_ds.mT, q), rule.product(ds.mT, q))

    def heads(errors: Tensor) -> Tensor:  # (Hq, K, d) -> (K, Hkv, d)
        of_keys = errors if sinks is None else errors[:, :-1]
        return rule.sum(of_keys.unflatten(0, (-1, group)), 1).transpose(0, 1)

    return AttentionErrors(by_out.transpose(0, 1), by_q.transpose(0, 1), heads(by_k), heads(by_v), by_sinks)


def head_bounds(
    head: Any,  # hidden, weight, bias and targets in float64, as they are in the dtype
    exact: list[Tensor],  # log-prob, entropy, gradients of hidden, weight and (if there is one) bias
    up: tuple[Tensor, Tensor],  # (A,) upstream gradients of log-prob and entropy
    dtype: torch.dtype,
    *,
    temperature: float,
    stored: bool = False,
    exponentials: torch.dtype = torch.float32,
    by_up: tuple[Bound, Bound] | None = None,
    factor: float = 1.0,
) -> list[Bound]:
    """Bounds of all that an LM head gives in float32 and, for gradients, in a dtype that they are rounded to.

    `stored`: gradients by logits are stored in that dtype too; `exponentials`: what these are made from is stored in.
    `by_up` (A,) are errors of the upstream gradients. The gradients are rounded before a `factor`, a power of 2, comes,
    which rounds only what has underflowed.
    """
    found = []
    bias = head.bias if len(exact) == 5 else None
    for rule, half in ((WORST, dtype), (TYPICAL, torch.float32)):
        known = HeadErrors.of(rule, head.hidden, head.weight, bias, temperature)
        kept = [half if stored else torch.float32, exponentials if half == dtype else torch.float32]
        worse = [x.worst if rule.worst else x.typical for x in by_up or ()]
        given = (worse[0], worse[1]) if worse else None
        gradients = known.gradients(head.targets, up, given, *kept)
        values = [known.by_log_p.gather(1, head.targets[:, None])[:, 0], known.by_entropy]
        found.append([rounded(rule, e, x, torch.float32) for e, x in zip(values, exact[:2], strict=True)])
        found[-1] += [rounded(rule, e, x, half, factor) for e, x in zip(gradients, exact[2:], strict=True)]
    return [Bound(*pair) for pair in zip(*found, strict=True)]


def attention_bounds(
    tensors: list[Tensor],  # q, k, v and the upstream gradient in float64, as they are in the dtype
    visible: Tensor,  # (T, P + T) bool
    scale: float,
    exact: list[Tensor],  # output, gradients of q, k and v, and of sinks where there are some
    dtype: torch.dtype,
    *,
    stored: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (Hq,) in float64, as they are in the dtype
) -> list[Bound]:
    """Bounds of attention in float32 and results rounded to a dtype, in which weights may be stored too."""
    found = []
    for rule, half in ((WORST, dtype), (TYPICAL, torch.float32)):
        kept = half if stored else torch.float32
        errors = attention_errors(rule, tensors, visible, scale, exact, half, kept, softcap, sinks)
        given = [error for error in errors if error is not None]
        found.append([rounded(rule, e, x, half) for e, x in zip(given, exact, strict=True)])
    return [Bound(*pair) for pair in zip(*found, strict=True)]


def loss_bounds(
    run: Callable[..., dict[str, Tensor]],  # the loss of a case in float64, every result by name; takes options
    case: dict[str, Any],  # its inputs
    dtypes: dict[str, torch.dtype],  # of the results; float32 where not named
    known: tuple[Bound, Bound] | None = None,  # errors (A,) of the log-probs and entropies that it is given
) -> dict[str, Bound]:
    """Bounds of all results of turn_policy_loss."""
    exact, without = run(case), run(case, kl_coef=0.0)  # one large KL would hide all else
    pairs = (("logprob", "old_logprob"), ("logprob", "ref_logprob"), ("old_logprob", "rollout_logprob"))
    given = {name for name, value in case.items() if value is not None}
    gaps = [case[one] - case[other] for one, other in pairs if given.issuperset((one, other))]
    gap = max((float(x.abs().max()) for x in gaps if x.numel()), default=0.0)
    reach = 1 + gap + max((float(x.abs().max()) for x in (case["logprob"],) if x.numel()), default=0.0)
    terms = case["logprob"].numel()
    # 1. what a shift of the logarithms by their error, and by that of their mean, does
    step = torch.full_like(case["logprob"], WORST.gamma(terms + 4) * reach)
    steps = {"logprob": step, "rollout_logprob": step}
    if known is not None:
        steps |= {"logprob": step + known[0].worst, "entropy": known[1].worst}
    shifts = {name: torch.zeros_like(value) for name, value in exact.items()}
    for name in steps.keys() & given:
        for sign in (-1, 1):
            for result, value in run(case | {name: case[name] + sign * steps[name]}).items():
                shifts[result] = torch.maximum(shifts[result], (value - exact[result]).abs())
    if known is not None:  # what moves a sum: for a loss its coefficients, for means their slopes
        largest = max(float(x.worst.max()) if terms else 0.0 for x in known)
        for name, value in exact.items():
            if value.dim() == 0:
                slope = exact["coef"].abs().sum() if name == "loss" else math.exp(gap)
                shifts[name] = shifts[name] + largest * slope
    # 2. and the roundings of terms and sums; those of a loss may cancel
    found = {}
    for name, value in exact.items():
        size = value.abs() + (without.get(name, value).abs().max() if value.numel() else 0)
        if name == "loss" and value.dim() == 0:
            size = size + exact["coef"].abs().sum()
        errors = []
        for rule, dtype in ((WORST, dtypes.get(name, torch.float32)), (TYPICAL, torch.float32)):
            shift = 2 * shifts[name] * rule.gamma(terms + 4) / WORST.gamma(terms + 4)
            errors.append(rounded(rule, shift + rule.gamma(terms + 32) * size, value, dtype))
        found[name] = Bound(*errors)
    return found


def rounded(rule: Rule, error: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """The error of a result that is rounded at the end, but for a factor that comes later."""
    return rule.add(error, factor * rule.rounding((exact.abs() + error) / factor, dtype))


def errors_of(found: Tensor, exact: Tensor) -> Tensor:
    """Distance to float64; none where both are beyond the largest number of the dtype."""
    beyond = found.isinf() & (exact.to(found.dtype) == found)
    return (found.double() - exact).abs().masked_fill(beyond, 0)


def assert_within(ours: Tensor, exact: Tensor, worst: Tensor) -> None:
    """Fails where an element is further from float64 than rounding can bring it."""
    error, allowed = errors_of(ours, exact), SECOND_ORDER * worst + UNDERFLOW
    if not bool((error <= allowed).all()):
        at = int((error / allowed).nan_to_num(torch.inf).argmax())
        found = [float(x.flatten()[at]) for x in (error, allowed, exact)]
        raise AssertionError("error {} beyond the bound {} at {}, element {}".format(*found, at))


def assert_no_less_precise(plain: Tensor, ours: Tensor, exact: Tensor, bound: Bound) -> None:
    """The gate of every kernel: within what rounding can do, and no further from float64 than plain PyTorch is.

    The second in the mean square over all elements, each in units of its bound, and up to what float32 typically does
    with some luck: the order of its sums is nobody's merit. In half precision that is next to nothing.
    """
    if exact.numel() == 0:
        return
    assert_within(ours, exact, bound.worst)

    def size(errors: Tensor) -> float:
        return float((errors / (bound.worst + UNDERFLOW)).square().mean().sqrt())

    share = UNLIKELY / exact.numel()
    chance = (1 + 2 * share**0.5 + 2 * share) ** 0.5
    error, allowed = size(errors_of(ours, exact)), size(errors_of(plain, exact)) + chance * size(bound.typical)
    assert error <= allowed, (error, allowed)
