"""The rewards by name. Each is a function of a trajectory and the section `reward`.

| name | what earns what |
|---|---|
| `published` | AT2PO: format, then EM (or F1, `reward.metric`); see `environment/reward.py` |
| `arpo_f1` | ARPO: as `published`, with F1 |
| `search_r1_em` | Search-R1: 1 when the last answer tags hold an accepted answer, a quarter with more than ten \
opening or closing answer tags; else 0. No other format is asked for |
| `em`, `f1` | exact match and F1 of the answer, whatever the format |
| `math` | 1 when the answer equals an accepted one as mathematics (math-verify), else 0 |
| `format` | 1 when the format holds, else 0 |
| `session` | the score that the environment's session gives; 0 where it gives none |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from atpo_fast.common.choices import RewardName
from atpo_fast.common.errors import ConfigError
from atpo_fast.config import RewardConfig
from atpo_fast.data.matching import exact_match
from atpo_fast.environment.extraction import CALL_TAGS, answer_in_tags
from atpo_fast.environment.rewards.trajectory import Trajectory
from atpo_fast.environment.tags import TAGS, close_tag, open_tag

_ANSWER_TAGS = 10  # from Search-R1: more of them cost three quarters
_MATH_CHARS = 2000  # no longer answer is read as mathematics, which takes more than linear time


def published(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return the published score: EM or F1 of a well-formed answer."""
    return _published(trajectory, reward, trajectory.em if reward.metric == "em" else trajectory.f1)


def arpo_f1(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return the published score with F1, as in ARPO."""
    return _published(trajectory, reward, trajectory.f1)


def search_r1_em(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return Search-R1's score: exact match of the last answer."""
    answer = answer_in_tags(trajectory.written)
    if answer is None or not exact_match(answer, trajectory.question.answers, reward.normalise):
        return 0.0
    tags = max(trajectory.written.count(tag(TAGS.answer)) for tag in (open_tag, close_tag))
    return 0.25 if tags > _ANSWER_TAGS else 1.0


def em(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return the exact match of the answer."""
    return trajectory.em


def f1(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return the F1 of the answer."""
    return trajectory.f1


def well_formed(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return 1 when the format holds."""
    return float(trajectory.format_ok)


def session(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return the score of the environment; rewards of turns come beside it (`TurnTree.turn_rewards`)."""
    return 0.0 if trajectory.score is None else trajectory.score


def math(trajectory: Trajectory, reward: RewardConfig) -> float:
    """Return 1 when the answer equals an accepted one as mathematics."""
    answer = trajectory.answer
    if answer is None or len(answer) > _MATH_CHARS:
        return 0.0
    return float(any(_math_equal(gold, answer) for gold in trajectory.question.answers))


NAMED: Mapping[RewardName, Callable[[Trajectory, RewardConfig], float]] = {
    "published": published,
    "arpo_f1": arpo_f1,
    "search_r1_em": search_r1_em,
    "em": em,
    "f1": f1,
    "math": math,
    "format": well_formed,
    "session": session,
}
COMPARING = frozenset({"published", "arpo_f1", "search_r1_em", "em", "f1", "math"})
"""Those that compare with the accepted answers."""


def _published(trajectory: Trajectory, reward: RewardConfig, metric: float) -> float:
    """Apply the published rule; format costs nothing in validation."""
    if trajectory.answer is None or not (trajectory.format_ok or trajectory.validation):
        return reward.format_penalty
    both_tools = all(close_tag(name) in trajectory.written for name in CALL_TAGS)
    if trajectory.f1 == 0:
        value = 0.0
    else:
        value = trajectory.f1 + reward.tool_bonus if both_tools else metric
    return value - reward.turn_cost * trajectory.tool_calls


@cache
def math_verify() -> Any:
    """Import math-verify. Raises ConfigError where it is not installed."""
    try:
        import math_verify as library
    except ImportError as error:
        raise ConfigError(f"the reward math needs math-verify ({error}): pip install 'atpo-fast[math]'") from error
    return library


def _math_equal(gold: str, answer: str) -> bool:
    """Compare two answers; texts that are no mathematics are equal where they are the same."""
    if gold.strip() == answer.strip():
        return True
    library = math_verify()
    # The library's time-outs are alarms of the system, which only the main thread can set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    parsed = [library.parse(f"\\boxed{{{text}}}", parsing_timeout=seconds) for text in (gold, answer)]
    return bool(library.verify(*parsed, timeout_seconds=seconds))
