"""The flat objective, written as a plain loop over trajectories from docs/design.md#objective, and a toy causal model.

Nothing here is shared with the packed path but `TurnTree` and the names in `Objective`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atpo_fast import Objective, TurnTree
from atpo_fast.packing import PackedTrees
from atpo_kernels import LossConfig

DOUBLE = torch.float64
Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids (T,), positions (T,), visible (T, T) bool -> (T, V)


@dataclass
class Flat:
    """One trajectory: per token its id, loss mask, and on action tokens advantage, turn and the log-probs."""

    ids: list[int]
    mask: list[int]
    advantage: list[float]
    turn: list[int]
    old: list[float]
    rollout: list[float]
    ref: list[float]


class ToyModel(nn.Module):
    """Two layers of single-head attention over embeddings of token and position, in float64."""

    def __init__(self, vocab: int, positions: int = 200, width: int = 6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=DOUBLE))

        self.token, self.place, self.head = matrix(vocab, width), matrix(positions, width), matrix(width, vocab)
        self.layers = nn.ParameterList([matrix(width, 3 * width) for _ in range(2)])

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        hidden = self.token[ids] + self.place[positions]
        for layer in self.layers:
            q, k, v = (hidden @ layer).chunk(3, dim=-1)
            scores = (q @ k.T / q.shape[-1]).masked_fill(~visible, -math.inf)
            hidden = torch.tanh(hidden + scores.softmax(-1) @ v)
        return hidden @ self.head


def flatten(trees: Sequence[TurnTree]) -> list[Flat]:
    """Every leaf of every tree, as often as it counts."""
    flats = []
    for tree in trees:
        for leaf in tree.leaves:
            flat = Flat([], [], [], [], [], [], [])
            for n in tree.path(leaf):
                turn = tree.turns[n]
                a, o = turn.action_ids.tolist(), turn.observation_ids.tolist()
                own: Any = tree.advantages if tree.leaf_advantages is None else tree.leaf_advantages
                advantage = float(own[n if tree.leaf_advantages is None else leaf]) if a else 0.0
                logprobs = turn.logprobs.tolist() + [0.0] * len(o)
                flat.ids += a + o
                flat.mask += [1] * len(a) + [0] * len(o)
                flat.advantage += [advantage] * len(a) + [0.0] * len(o)
                flat.turn += [n] * (len(a) + len(o))
                flat.old += logprobs
                flat.rollout += [x + 0.1 * math.sin(x) for x in logprobs]
                flat.ref += [1.1 * x for x in logprobs]
            flats += [flat] * tree.turns[leaf].multiplicity
    return flats


def flat_loss(model: Logits, flats: Sequence[Flat], objective: Objective) -> Tensor:
    """Sum over trajectories of sum over action tokens of w * (policy term + KL - entropy bonus)."""
    config = objective.loss_config
    total = torch.zeros((), dtype=DOUBLE)
    for flat in flats:
        length = len(flat.ids)
        acting = [t for t in range(length) if flat.mask[t]]
        if not acting:
            continue
        ids = torch.tensor(flat.ids)
        causal = torch.ones(length, length).tril().bool()
        table = model(ids, torch.arange(length), causal).log_softmax(-1)
        rows = table[[t - 1 for t in acting]]
        logp = rows.gather(1, ids[acting][:, None])[:, 0]
        entropy = -(rows.exp() * rows).sum(-1)
        old = _pick(flat.old, acting)
        ratio = _ratio(logp, logp.detach() - old, [flat.turn[t] for t in acting], config)
        value = policy_term(ratio, logp, _pick(flat.advantage, acting), config)
        if config.importance_cap is not None:
            value = value * (old - _pick(flat.rollout, acting)).exp().clamp(max=config.importance_cap)
        if config.kl != "none":
            value = value + config.kl_coef * _kl(logp, _pick(flat.ref, acting), config.kl)
        value = value - config.entropy_coef * entropy
        total = total + (_weights(flat, acting, flats, objective) * value).sum()
    return total


def policy_term(ratio: Tensor, logp: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """f(rho, A) of every clip mode by the sign of A; `ratio` carries the straight-through gradient."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    mode = config.clip
    clipped = ratio.clamp(low, high)
    if mode == "sapo":
        tau = config.sapo_tau_neg + (advantage > 0).double() * (config.sapo_tau_pos - config.sapo_tau_neg)
        return _dual(-advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1)), ratio, advantage, config)
    if mode == "cispo":
        return _dual(-advantage * clipped.detach() * logp, ratio, advantage, config)
    if mode in ("soft", "soft_high"):
        kept = clipped.detach() * ratio / ratio.detach()  # the bound's value, with the gradient of the ratio
        clipped = torch.where(ratio > high, kept, clipped)
        clipped = torch.where(ratio < low, kept if mode == "soft" else clipped, clipped)
    value = torch.where((-advantage * clipped) > (-advantage * ratio), -advantage * clipped, -advantage * ratio)
    return _dual(value, ratio, advantage, config)


def _dual(value: Tensor, ratio: Tensor, advantage: Tensor, config: LossConfig) -> Tensor:
    """The loss with the cap of the dual clip: a constant for A < 0 where the ratio is greater."""
    if config.dual_cap is None:
        return value
    return torch.where((advantage < 0) & (ratio > config.dual_cap), config.dual_cap * advantage.abs(), value)


def packed_loss(
    model: Logits, rows: Sequence[PackedTrees], objective: Objective, fill: Callable[[PackedTrees], None] | None = None
) -> Tensor:
    """Sum over rows of `objective.loss` on one forward of each row; `fill` sets rollout and reference log-probs."""
    total = torch.zeros((), dtype=DOUBLE)
    for row in rows:
        if fill is not None:
            fill(row)
        table = model(row.input_ids, row.position_ids, visible_keys(row)).log_softmax(-1)[row.predictor]
        logp = table.gather(1, row.targets[:, None])[:, 0]
        total = total + objective.loss(logp, row, -(table.exp() * table).sum(-1))
    return total


def fill_like_flat(row: PackedTrees) -> None:
    """The rollout and reference log-probs that `flatten` gives."""
    assert row.old_logprob is not None
    row.rollout_logprob = row.old_logprob + 0.1 * row.old_logprob.sin()
    row.ref_logprob = 1.1 * row.old_logprob


def visible_keys(row: PackedTrees) -> Tensor:
    """(T, T) whether query q sees key k: k <= q < subtree_end[k]."""
    q = torch.arange(row.num_tokens)[:, None]
    return (q >= q.T) & (q < row.subtree_end[None, :])


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Gradient of every parameter, zeros where the loss does not depend on it."""
    parameters = list(model.parameters())
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True))


def assert_equal(packed: Tensor, flat: Tensor, model: nn.Module, tolerance: float = 1e-10) -> None:
    """Loss and every parameter gradient agree relative to their size."""
    expected, found = gradients(flat, model), gradients(packed, model)
    assert abs(packed.item() - flat.item()) <= tolerance * (1 + abs(flat.item()))
    size = max(g.abs().max().item() for g in expected)
    for e, f in zip(expected, found, strict=True):
        assert (e - f).abs().max().item() <= tolerance * (1e-3 + size)


def _ratio(logp: Tensor, delta: Tensor, turns: list[int], config: LossConfig) -> Tensor:
    """exp(min(u, 10)), u the mean of delta over the token's group; d ratio / d logp is the ratio, 0 over the cap."""
    level = config.level
    if level == "token":
        mean = delta
    elif level == "sequence":
        mean = delta.mean().expand_as(delta)
    else:
        members = [[i for i, other in enumerate(turns) if other == turn] for turn in turns]
        mean = torch.stack([delta[m].mean() for m in members])
    return (mean + logp - logp.detach()).clamp(max=config.max_log_ratio).exp()


def _kl(logp: Tensor, ref: Tensor, mode: str) -> Tensor:
    gap = ref - logp
    return {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1, "low_var": gap.exp() - gap - 1}[mode]


def _weights(flat: Flat, acting: list[int], flats: Sequence[Flat], objective: Objective) -> Tensor:
    """(action tokens,) w of docs/design.md#aggregation."""
    batch, tokens = len(flats), len(acting)
    turns = [flat.turn[t] for t in acting]
    own = torch.tensor([turns.count(turn) for turn in turns], dtype=DOUBLE)
    ones = torch.ones(tokens, dtype=DOUBLE)
    return {
        "seq-mean-token-mean": ones / (batch * tokens),
        "token-mean": ones / sum(sum(f.mask) for f in flats),
        "seq-mean-token-sum": ones / batch,
        "seq-mean-token-sum-norm": ones / (batch * objective.max_length),
        "turn-mean": 1 / (batch * len(set(turns)) * own),
    }[objective.aggregation]


def _pick(values: list[float], at: list[int]) -> Tensor:
    return torch.tensor([values[t] for t in at], dtype=DOUBLE)


def exact_norms(model: nn.Module) -> nn.Module:
    """Replace transformers' RMSNorm, which rounds to float32, by torch's, which does not; returns the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                eps: Any = child.variance_epsilon
                setattr(module, name, nn.RMSNorm(child.weight.shape, eps=eps, dtype=torch.float64))
    return model
