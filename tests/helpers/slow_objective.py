"""The published losses of one batch as a loop over plain numbers, with derivatives by hand; nothing of ours is called.

Every constant stands in `METHODS`, from the papers and their code, and not from the presets that it checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from atpo_fast import TurnTree

Place = tuple[int, int, int]  # tree, turn, token of its action
MAX_LOG_RATIO = 10.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published loss: ratio level, clip, average, and what is added."""

    level: str = "token"
    low: float = 0.2
    high: float = 0.2
    cap: float | None = None
    soft_above: bool = False
    soft_below: bool = False
    gate: tuple[float, float] | None = None  # temperatures of SAPO
    constant_weight: bool = False  # CISPO
    by_trajectory: bool = False  # mean over trajectories of means over tokens; else the mean over tokens
    kl: float = 0.0
    entropy: float = 0.0
    by_entropy: float = 0.0  # AEPO's factor of the advantage


METHODS = {
    "at2po": Method(level="turn", low=3e-3, high=4e-3, by_trajectory=True),
    "atpo": Method(level="turn", low=3e-3, high=4e-3, by_trajectory=True),
    "grpo": Method(cap=3.0, kl=1e-3),
    "dapo": Method(high=0.28, cap=10.0),
    "gspo": Method(level="sequence", low=3e-4, high=4e-4, by_trajectory=True),
    "aepo": Method(cap=3.0, soft_above=True, by_entropy=0.2),
    "arpo": Method(cap=3.0),
    "ppo": Method(cap=3.0),
    "tree_grpo": Method(cap=3.0, kl=1e-3, entropy=1e-3),
    "igpo": Method(cap=3.0, kl=1e-3, entropy=1e-3),
    "gppo": Method(high=0.28, cap=3.0, soft_above=True, soft_below=True),
    "sapo": Method(gate=(1.0, 1.05), by_trajectory=True),
    "cispo": Method(low=1.0, high=0.28, constant_weight=True),
}


@dataclass
class Batch:
    """A forest, and for every action token the numbers that the policies give it."""

    trees: list[TurnTree]
    log_ratio: dict[Place, float]  # of the current policy against the old one
    old: dict[Place, float]
    ref: dict[Place, float]
    entropy: dict[Place, float]

    def logprob(self, place: Place) -> float:
        """Of the current policy."""
        return self.old[place] + self.log_ratio[place]

    def trajectories(self) -> Iterator[list[tuple[Place, float]]]:
        """(token, advantage) of every trajectory, as often as it counts."""
        for t, tree in enumerate(self.trees):
            for leaf in tree.leaves:
                found = []
                for n in tree.path(leaf):
                    own = tree.advantages if tree.leaf_advantages is None else tree.leaf_advantages
                    assert own is not None
                    advantage = float(own[n if tree.leaf_advantages is None else leaf])
                    found += [((t, n, i), advantage) for i in range(len(tree.turns[n].action_ids))]
                for _ in range(tree.turns[leaf].multiplicity):
                    yield found


@dataclass
class Result:
    """The loss, its derivatives, and which cases occurred."""

    loss: float = 0.0
    by_logprob: dict[Place, float] = field(default_factory=dict)
    by_entropy: dict[Place, float] = field(default_factory=dict)
    cases: set[tuple[str, str]] = field(default_factory=set)  # sign of the advantage, where the ratio lies


def regions(method: Method) -> dict[str, float]:
    """Where a ratio may lie, with a log-ratio that lies there."""
    found = {"inside": 0.0, "above": math.log1p(method.high) + 0.01, "over": MAX_LOG_RATIO + 0.5}
    if method.gate is not None:
        del found["above"]
    elif method.low < 1:
        found["below"] = math.log1p(-method.low) - 0.01
    if method.cap is not None:
        found["past the cap"] = math.log(method.cap) + 0.3
    return found


def slow_loss(batch: Batch, method: Method) -> Result:
    """Add up the loss and its derivatives, one token of one trajectory after another."""
    result = Result()
    trajectories = [trajectory for trajectory in batch.trajectories() if trajectory]
    everything = sum(len(trajectory) for trajectory in trajectories)
    # trajectories without an action token count among those that a mean is over
    count = sum(1 for _ in batch.trajectories())
    entropies = np.array([batch.entropy[place] for trajectory in trajectories for place, _ in trajectory])
    mean, std = float(entropies.mean()), float(entropies.std(ddof=1))
    for trajectory in trajectories:
        weight = 1 / (count * len(trajectory)) if method.by_trajectory else 1 / everything
        for place, advantage in trajectory:
            factor = 1 + method.by_entropy * (batch.entropy[place] - mean) / std
            if factor < 0 and advantage:
                result.cases.add(("changed sign", _sign(advantage)))
            advantage *= factor
            u = _log_ratio(batch, place, trajectory, method.level)
            value, slope, region = _policy(batch, place, advantage, u, method)
            if advantage:
                result.cases.add((_sign(advantage), region))
            if method.kl:
                kl, kl_slope = _low_var(batch.ref[place] - batch.logprob(place))
                result.cases.add(("kl", "bounded" if kl_slope == 0 else "free"))
                value, slope = value + method.kl * kl, slope + method.kl * kl_slope
            value -= method.entropy * batch.entropy[place]
            result.loss += weight * value
            result.by_logprob[place] = result.by_logprob.get(place, 0.0) + weight * slope
            result.by_entropy[place] = result.by_entropy.get(place, 0.0) - weight * method.entropy
    return result


def _log_ratio(batch: Batch, place: Place, trajectory: list[tuple[Place, float]], level: str) -> float:
    """The log-ratio, averaged over the tokens of the level."""
    members = [other for other, _ in trajectory if level == "sequence" or other[:2] == place[:2]]
    members = [place] if level == "token" else members
    return math.fsum(batch.log_ratio[other] for other in members) / len(members)


def _policy(batch: Batch, place: Place, a: float, u: float, method: Method) -> tuple[float, float, str]:
    """Loss of one token, its derivative by the log-prob, and where its ratio lies."""
    tree = batch.trees[place[0]]
    low = method.low if tree.clip_low is None or np.isnan(tree.clip_low[place[1]]) else tree.clip_low[place[1]]
    high = method.high if tree.clip_high is None or np.isnan(tree.clip_high[place[1]]) else tree.clip_high[place[1]]
    ratio, over = math.exp(min(u, MAX_LOG_RATIO)), u > MAX_LOG_RATIO
    region = "over" if over else _region(ratio, low, high, method)
    through = 0.0 if over else ratio  # d ratio / d log-prob
    if method.gate is not None:
        tau = method.gate[0] if a > 0 else method.gate[1]
        sigmoid = 1 / (1 + math.exp(-min(tau * (ratio - 1), 700)))
        return -a * 4 / tau * sigmoid, -a * 4 * sigmoid * (1 - sigmoid) * through, region
    if method.constant_weight:
        weight = min(max(ratio, 1 - low), 1 + high)
        return -a * weight * batch.logprob(place), -a * weight, region
    if a > 0 and ratio > 1 + high:
        return -a * (1 + high), -a * (1 + high) * (method.soft_above and not over), region
    if a < 0 and method.cap is not None and ratio > method.cap:
        return -a * method.cap, 0.0, region
    if a < 0 and ratio < 1 - low:
        return -a * (1 - low), -a * (1 - low) * method.soft_below, region
    return -a * ratio, -a * through, region


def _region(ratio: float, low: float, high: float, method: Method) -> str:
    if method.cap is not None and ratio > method.cap:
        return "past the cap"
    if method.gate is not None:
        return "inside"
    return "below" if ratio < 1 - low else "above" if ratio > 1 + high else "inside"


def _low_var(gap: float) -> tuple[float, float]:
    """k3 of gap = reference - current, with argument and value bounded, and its derivative by the current log-prob."""
    kl = math.exp(gap) - gap - 1 if abs(gap) <= 20 else math.inf
    return (kl, 1 - math.exp(gap)) if kl <= 10 else (10.0, 0.0)


def _sign(number: float) -> str:
    return "+" if number > 0 else "-"
