"""Alarms: conditions of a step's metrics that a person should hear of at once, with the cause as far as it shows.

They depend on the metrics of the steps so far and on nothing else, and what they remember of them is in the checkpoint:
a resumed run raises the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from atpo_fast.config.logging import AlarmConfig

Metrics = Mapping[str, Any]
Memory = dict[str, float]
Condition = Callable[[Metrics, AlarmConfig, Memory], "str | None"]

_NEARLY_ALL = 0.9  # right answers with which a policy may be sure of itself
_SKIPPED = "policy/skipped_steps"


def look(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> tuple[dict[str, str], dict[str, float]]:
    """Look at the metrics of a step.

    Args:
        metrics: those of the step.
        settings: thresholds.
        memory: what is known of the steps before; it is brought up to date.

    Returns:
        The alarms that begin with this step, as a text for each name, and the metrics `alarm/NAME` of those that hold.
    """
    begun: dict[str, str] = {}
    holding: dict[str, float] = {}
    for name, (condition, at_once) in _CONDITIONS.items():
        text = condition(metrics, settings, memory)
        count = memory.get(f"steps/{name}", 0.0) + 1 if text is not None else 0.0
        memory[f"steps/{name}"] = count
        needed = 1 if at_once else settings.steps
        if text is not None and count >= needed:
            holding[f"alarm/{name}"] = 1.0
            if count == needed:
                begun[name] = text
    return begun, holding


def outcome_words(metrics: Metrics) -> str:
    """List the shares of the outcomes of a step, the largest first."""
    shares = {name.removeprefix("outcome/"): metrics[name] for name in metrics if name.startswith("outcome/")}
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ranked if share > 0) or "no trajectory"


def _entropy(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    entropy = metrics.get("policy/entropy", metrics.get("rollout/entropy"))
    if settings.min_entropy is None or entropy is None or entropy >= settings.min_entropy or _solved(metrics):
        return None
    return (
        f"the policy's entropy is {entropy:.2g} nats a token, less than logging.alarms.min_entropy="
        f"{settings.min_entropy:g}: it hardly tries anything else. Lower optim.lr, or go back to an earlier "
        "checkpoint; objective.clip_high and objective.entropy_coef keep it from sinking"
    )


def _format(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    if "outcome/right" not in metrics:
        return None
    share = sum(metrics.get(f"outcome/{name}", 0.0) for name in ("right", "wrong", "unread"))
    best = memory["best_format"] = max(memory.get("best_format", 0.0), share)
    causes = f"outcomes: {outcome_words(metrics)}"
    if settings.min_format is not None and share < settings.min_format:
        return (
            f"{share:.0%} of the trajectories keep the format (logging.alarms.min_format={settings.min_format:g}); "
            f"{causes}. Does the prompt ask for what task.answer reads, and has the model learned to write it? "
            "trees.jsonl has texts"
        )
    if settings.format_drop is not None and share < (1 - settings.format_drop) * best:
        return f"the share of trajectories in the format has fallen from {best:.0%} to {share:.0%}; {causes}"
    return None


def _equal_rewards(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    flat = metrics.get("sampling/no_signal")
    if not settings.equal_rewards or flat is None or flat < 1 or _solved(metrics):
        return None
    return (
        f"every question's trajectories earn the same, {metrics.get('reward/mean', math.nan):.3f} on average, so there "
        f"is nothing to learn from; outcomes: {outcome_words(metrics)}. Where outcomes differ, the reward does not see "
        "it (task.rewards); where all are alike, questions are too hard or too easy, or the prompt is wrong"
    )


def _logprob_gap(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    gap, limit = metrics.get("rollout/logprob_gap"), settings.max_logprob_gap
    if gap is None or limit is None or gap <= limit or metrics.get("rollout/staleness"):
        return None
    return (
        f"the log-probs of engine and trainer differ by {gap:.2g} nats a token on average (logging.alarms."
        f"max_logprob_gap={limit:g}): do temperature, dtype and weights agree?"
    )


def _clipped(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    share, limit = (
        metrics.get("policy/clipped_low", 0.0) + metrics.get("policy/clipped_high", 0.0),
        settings.max_clipped,
    )
    if limit is None or share <= limit:
        return None
    return f"{share:.0%} of the action tokens are clipped (logging.alarms.max_clipped={limit:g}): optim.lr is too high"


def _tools(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    limit = settings.max_tool_failures
    suffix = "/failure_rate"
    rates = {name[5 : -len(suffix)]: metrics[name] for name in metrics if name.endswith(suffix)}
    failing = {tool: rate for tool, rate in rates.items() if limit is not None and rate > limit}
    if not failing:
        return None
    return "; ".join(_tool_words(tool, rate, metrics) for tool, rate in failing.items())


def _tool_words(tool: str, rate: float, metrics: Metrics) -> str:
    counts = {what: int(metrics.get(f"tool/{tool}/{what}", 0)) for what in ("calls", "timeouts", "empty")}
    return (
        f"{rate:.0%} of {counts['calls']} calls of {tool} failed ({counts['timeouts']} timed out, {counts['empty']} "
        "answered nothing)"
    )


def _staleness(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    staleness, limit = metrics.get("rollout/staleness", 0.0), settings.max_staleness
    if limit is None or staleness <= limit:
        return None
    return f"samples are {staleness:.0f} steps older than the weights (logging.alarms.max_staleness={limit})"


def _not_finite(metrics: Metrics, settings: AlarmConfig, memory: Memory) -> str | None:
    skipped = metrics.get(_SKIPPED, 0.0)
    new, memory["skipped"] = skipped - memory.get("skipped", 0.0), skipped
    if not settings.not_finite:
        return None
    names = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if new > 0:
        return f"{new:.0f} optimizer steps were left out, because a gradient was not finite (the weights are unharmed)"
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not finite" if names else None


def _solved(metrics: Metrics) -> bool:
    return bool(metrics.get("outcome/right", 0.0) >= _NEARLY_ALL)


_CONDITIONS: dict[str, tuple[Condition, bool]] = {  # condition, and whether one step is enough
    "not_finite": (_not_finite, True),
    "tools": (_tools, True),
    "format": (_format, False),
    "equal_rewards": (_equal_rewards, False),
    "entropy": (_entropy, False),
    "logprob_gap": (_logprob_gap, False),
    "clipped": (_clipped, False),
    "staleness": (_staleness, False),
}
