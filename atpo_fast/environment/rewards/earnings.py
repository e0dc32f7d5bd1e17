"""Call the rewards of a task on the trajectories of search trees, and add up what each trajectory earns.

Functions run one after the other, in the order of the trajectories; the calls of an async function run side by side, no
more than its `concurrency` at once, each for `timeout_seconds` at most. A failure names the trajectory.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atpo_fast.common.errors import RewardError
from atpo_fast.common.event_loop import LazyEventLoop
from atpo_fast.config import RewardConfig
from atpo_fast.environment.own_code import place_of
from atpo_fast.environment.rewards.signatures import calls
from atpo_fast.environment.rewards.terms import Reward
from atpo_fast.environment.rewards.trajectory import Trajectory

SCORE = "score"
"""Key of the reward in a dictionary that a function returns; the other numbers in it are only reported."""

_TEXT_CHARS = 160


@dataclass(slots=True)
class Earned:
    """What a trajectory earns: the weighted sum, and each reward by name, unweighted, with what it reports besides."""

    total: float = 0.0
    by_name: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Failure:
    """The reason why a function gave a trajectory no reward."""

    reason: str
    error: BaseException | None = None


_Outcome = Mapping[str, float] | _Failure | None  # none: the reward has nothing to say about the trajectory


def earn(
    rewards: Sequence[Reward],
    groups: Sequence[Sequence[Trajectory]],  # the trajectories of each search tree
    settings: RewardConfig,
    loop: LazyEventLoop,
) -> list[list[Earned]]:
    """Return what each trajectory earns.

    Raises:
        RewardError: a function raised, took too long, or returned no finite number, and its failures end the run.
    """
    flat = [trajectory for group in groups for trajectory in group]
    earned = [Earned() for _ in flat]
    for reward in rewards:
        for trajectory, mine, outcome in zip(flat, earned, _outcomes(reward, groups, settings, loop), strict=True):
            _add(mine, reward, _settled(reward, trajectory, outcome))
    rest = iter(earned)
    return [[next(rest) for _ in group] for group in groups]


def describe(trajectory: Trajectory) -> str:
    """Name a trajectory: its question, its leaf, and how its text begins."""
    question, text = trajectory.question, " ".join(trajectory.written[: 2 * _TEXT_CHARS].split())[:_TEXT_CHARS]
    return f"question {question.id!r} ({question.text[:80]!r}), leaf {trajectory.leaf}, whose text begins {text!r}"


def _add(earned: Earned, reward: Reward, values: Mapping[str, float] | None) -> None:
    if values is None:
        return
    earned.total += reward.weight * values[SCORE]
    earned.by_name[reward.name] = values[SCORE]
    earned.by_name |= {f"{reward.name}/{name}": value for name, value in values.items() if name != SCORE}


def _settled(reward: Reward, trajectory: Trajectory, outcome: _Outcome) -> Mapping[str, float] | None:
    """Return the values of an outcome; a failure ends the run, or counts as the reward says."""
    if not isinstance(outcome, _Failure):
        if outcome is None or reward.failed_value is None:
            return outcome
        return {**outcome, "failed": 0.0}
    if reward.failed_value is not None:
        return {SCORE: reward.failed_value, "failed": 1.0}
    raise RewardError(
        f"reward {reward.name}: {outcome.reason}; {describe(trajectory)}. With on_error: fail in task.rewards it earns "
        "failed_value instead"
    ) from outcome.error


def _outcomes(
    reward: Reward, groups: Sequence[Sequence[Trajectory]], settings: RewardConfig, loop: LazyEventLoop
) -> list[_Outcome]:
    """Call one reward on all trajectories; returns an outcome for each, in order."""
    if reward.signature is None:
        return [
            _tried(lambda t=trajectory: _values(reward.function(t, settings)))  # type: ignore[misc]
            for group in groups
            for trajectory in group
        ]
    todo = [(len(mine), {**given, **reward.arguments}) for mine, given in calls(reward.signature, groups)]
    whole = reward.signature.style == "trl"
    if reward.is_async:
        answers = loop.submit(_side_by_side(reward, [given for _, given in todo])).result()
    else:
        answers = [_answer(reward.function, given) for _, given in todo]
    return [
        outcome for (count, _), answer in zip(todo, answers, strict=True) for outcome in _split(answer, count, whole)
    ]


def _answer(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call a function; returns what it returned or why it did not."""
    try:
        return function(**given)
    except Exception as error:  # the user's own code may raise anything
        return _raised(error)


async def _side_by_side(reward: Reward, arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """Await the calls of an async function, some at a time; returns their answers or failures, in order."""
    places = asyncio.Semaphore(reward.concurrency)

    async def one(given: dict[str, Any]) -> Any:
        async with places:
            try:
                return await asyncio.wait_for(_awaitable(reward.function(**given)), reward.timeout_seconds)
            except (TimeoutError, asyncio.TimeoutError) as error:
                return _Failure(f"gave no answer within {reward.timeout_seconds:g} seconds", error)
            except Exception as error:
                return _raised(error)

    return list(await asyncio.gather(*map(one, arguments)))


async def _awaitable(answer: Awaitable[Any]) -> Any:
    return await answer


def _raised(error: Exception) -> _Failure:
    return _Failure(f"raised {type(error).__name__}: {error}{place_of(error)}", error)


def _split(answer: Any, count: int, whole: bool) -> list[_Outcome]:
    """Return the outcomes of the `count` trajectories of a call; of a `whole` tree, the answer is a list."""
    if isinstance(answer, _Failure):
        return [answer] * count
    if not whole:
        return [_tried(lambda: _values(answer))]
    try:
        values = list(answer)
    except TypeError:
        return [_Failure(f"returned {_short(answer)}, and not a list of numbers")] * count
    if len(values) != count:
        return [_Failure(f"returned {len(values)} numbers for {count} completions")] * count
    return [None if value is None else _tried(lambda v=value: _values(v)) for value in values]  # type: ignore[misc]


def _tried(values: Callable[[], Mapping[str, float] | _Failure]) -> Mapping[str, float] | _Failure:
    try:
        return values()
    except Exception as error:
        return _raised(error)


def _values(answer: Any) -> Mapping[str, float] | _Failure:
    """Read what a function returned for a trajectory: a number, or a dictionary with one as its score."""
    if not isinstance(answer, Mapping):
        answer = {SCORE: answer}
    if SCORE not in answer:
        return _Failure(f"returned a dictionary without the key {SCORE!r}: {_short(dict(answer))}")
    score = _number(answer[SCORE])
    if score is None or not math.isfinite(score):
        return _Failure(f"returned {_short(answer[SCORE])}, which is no finite number")
    others = {str(name): number for name, value in answer.items() if (number := _number(value)) is not None}
    return {name: number for name, number in others.items() if math.isfinite(number)} | {SCORE: score}


def _number(value: Any) -> float | None:
    """Return a number of any library as a float, None for what is no number."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]}…"
