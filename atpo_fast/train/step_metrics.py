"""Compute the metrics of one step's rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from atpo_fast.environment.reward import OUTCOMES, LeafScore
from atpo_fast.train.dynamic_sampling import varies
from atpo_fast.train.scoring import Group, ScoredTree


def rollout_metrics(
    forest: Sequence[ScoredTree],
    counts: dict[str, float],
    rollout_seconds: float,
    waited: float,
    step_seconds: float,
) -> dict[str, float]:
    """Compute the reward, rollout, count and token metrics of a forest, all that was rolled out for a step.

    Means are over the leaves that were kept (`rollout/turns`, `rollout/tool_calls`, ...); what was counted while the
    trees grew, pruned branches included, is in `counts`, which become metrics under their own names.

    Args:
        counts: what the samplers and the update have counted, summed over ranks.
        rollout_seconds: time of the roll-out, which may have run ahead.
        waited: the part of the step that only waited for it.
    """
    scores = [score for scored in forest for score in scored.scores]
    unique = sum(scored.tree.unique_tokens for scored in forest)
    flat = sum(scored.tree.flat_tokens for scored in forest)

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    update_seconds = max(step_seconds - waited, 1e-9)
    return {
        "reward/mean": mean([s.reward for s in scores]),
        "reward/em": mean([s.em for s in scores]),
        "reward/f1": mean([s.f1 for s in scores]),
        "reward/format": mean([float(s.format_ok) for s in scores]),
        "reward/overlong": mean([s.overlong for s in scores]),
        **_rewards_by_name(scores),
        **outcome_shares(scores),
        "rollout/turns": mean([s.turns for s in scores]),
        "rollout/tool_calls": mean([s.tool_calls for s in scores]),
        "rollout/entropy": mean([turn.nll for scored in forest for turn in scored.tree.turns[1:]]),
        "tokens/unique": float(unique),
        "tokens/flat": float(flat),
        "tokens/overlap": 1 - unique / flat if flat else 0.0,
        "rate/rollout_tokens_per_s": counts["tokens/decoded"] / max(rollout_seconds, 1e-9),
        "rate/train_tokens_per_s": counts["tokens/trained"] / update_seconds,
        "time/total": step_seconds,
        **counts,
        **_failure_rates(counts),
    }


def outcome_shares(scores: Sequence[LeafScore]) -> dict[str, float]:
    """Compute the share of the leaves with each outcome."""
    found = Counter(score.outcome for score in scores)
    return {f"outcome/{name}": found[name] / len(scores) if scores else 0.0 for name in OUTCOMES}


def no_signal(groups: Sequence[Group]) -> float:
    """Compute the share of the questions whose trajectories all earned the same."""
    return sum(not varies(group, "reward") for group in groups) / len(groups) if groups else 0.0


def _rewards_by_name(scores: Sequence[LeafScore]) -> dict[str, float]:
    """Average each reward of the task, unweighted, over the leaves that it has something to say about.

    `reward/turns` is what the environment gave for the turns of a trajectory, where it gave any.
    """
    values: dict[str, list[float]] = {}
    if any(score.turn_rewards for score in scores):
        values["reward/turns"] = [score.turn_rewards for score in scores]
    for score in scores:
        for name, value in score.rewards.items():
            values.setdefault(f"reward/{name}", []).append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def _failure_rates(counts: Mapping[str, float]) -> dict[str, float]:
    """Compute the share of each tool's calls that failed, of the tools that were called."""
    tools = [name.removesuffix("/calls") for name, calls in counts.items() if _is_calls(name) and calls]
    return {f"{tool}/failure_rate": counts[f"{tool}/failures"] / counts[f"{tool}/calls"] for tool in tools}


def _is_calls(name: str) -> bool:
    return name.startswith("tool/") and name.endswith("/calls")


def add_up(numbers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up the numbers of the same name; those that are missing are 0."""
    total: Counter[str] = Counter()
    for each in numbers:
        for name, number in each.items():
            total[name] += number  # type: ignore[assignment]
    return dict(total)
