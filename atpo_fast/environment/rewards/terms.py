"""The rewards of a task: what they are called, how much they count, and what happens where one fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atpo_fast.common.errors import ConfigError, DataError
from atpo_fast.data.questions import Question
from atpo_fast.environment.own_code import load_own
from atpo_fast.environment.rewards.named import COMPARING, NAMED, math_verify
from atpo_fast.environment.rewards.signatures import Signature, columns_of, read_signature

METRICS = ("mean", "em", "f1", "format", "overlong", "turns")
"""Names in the metrics that mean something else, unless the reward of that name is meant."""

_CONCURRENCY, _TIMEOUT_SECONDS = 16, 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """A reward as a task names it; the fields are those of `task.rewards`.

    `function` is a name, an import path, or the function itself.
    """

    function: str | Callable[..., Any]
    weight: float = 1.0
    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    on_error: Literal["stop", "fail"] = "stop"
    failed_value: float = 0.0
    concurrency: int | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward that can be called.

    Attributes:
        name: name in the metrics.
        function: function of a trajectory and the section `reward` where there is no `signature`; else the user's own.
        signature: how the user's function wants to be called; none for a reward by name.
        arguments: further arguments of the user's function.
        weight: factor in the sum.
        failed_value: reward of a trajectory on which the function failed; none: the failure is an error.
        concurrency: number of calls of an async function that run at once.
        timeout_seconds: longest time of such a call.
    """

    name: str
    function: Callable[..., Any]
    signature: Signature | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    failed_value: float | None = None
    concurrency: int = _CONCURRENCY
    timeout_seconds: float = _TIMEOUT_SECONDS

    @property
    def is_async(self) -> bool:
        """Whether its calls give coroutines."""
        return self.signature is not None and self.signature.is_async


PUBLISHED = Reward(name="published", function=NAMED["published"])


def load_rewards(terms: Iterable[RewardTerm]) -> tuple[Reward, ...]:
    """Load the functions of rewards and check their signatures.

    Raises:
        ConfigError: a function that is not there, or cannot be a reward, two rewards of one name, or an option that
            nobody would read.
    """
    rewards = tuple(map(_load, terms))
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task.rewards: two rewards are called {name}: give each its own `name`")
    return rewards


def check_questions(rewards: Sequence[Reward], questions: Iterable[Question]) -> None:
    """Check that questions have what the rewards need.

    Raises:
        DataError: a question without an accepted answer, or without a column that a function takes.
    """
    comparing = next((r.name for r in rewards if r.signature is None and r.function in _COMPARING), None)
    needed = {r.name: r.signature.columns(r.arguments) for r in rewards if r.signature is not None}
    for question in questions:
        where = f"question {question.id!r} ({question.text[:80]!r})"
        if comparing is not None and not question.answers:
            raise DataError(f"{where}: has no answer, which the reward {comparing} compares with")
        for name, columns in needed.items():
            there = columns_of(question)
            missing = [column for column in columns if column not in there]
            if missing:
                raise DataError(
                    f"{where}: its record has no column {', '.join(missing)}, which the reward {name} takes; it has "
                    f"{', '.join(there)}"
                )


_COMPARING = tuple(NAMED[name] for name in NAMED if name in COMPARING)


def _load(term: RewardTerm) -> Reward:
    shown = term.function if isinstance(term.function, str) else getattr(term.function, "__name__", repr(term.function))
    where = f"task.rewards: {shown}"
    failed_value = term.failed_value if term.on_error == "fail" else None
    if term.on_error == "stop" and term.failed_value:
        raise ConfigError(f"{where}: failed_value={term.failed_value:g} is read with on_error=fail only")
    if isinstance(term.function, str) and term.function in NAMED:
        if term.arguments:
            raise ConfigError(f"{where}: takes no arguments; its options are those of the section reward")
        if term.function == "math":
            math_verify()
        reward = Reward(
            name=term.name or term.function,
            function=NAMED[term.function],  # type: ignore[index]
            weight=term.weight,
            failed_value=failed_value,
        )
    else:
        reward = _load_own(term, where, failed_value)
    own_name = reward.signature is not None or reward.name != term.function
    if (reward.name in METRICS and own_name) or not reward.name:
        raise ConfigError(f"{where}: the metrics have another meaning for the name {reward.name!r}: give it a `name`")
    if not reward.is_async and (term.concurrency is not None or term.timeout_seconds is not None):
        raise ConfigError(f"{where}: concurrency and timeout_seconds are limits of async functions, which it is not")
    return reward


def _load_own(term: RewardTerm, where: str, failed_value: float | None) -> Reward:
    """Load a function of the user's own."""
    function = load_own(term.function, "task.rewards") if isinstance(term.function, str) else term.function
    if inspect.isclass(function):
        function = function()
    if not callable(function):
        raise ConfigError(f"{where}: is {type(function).__name__}, which cannot be called")
    signature = read_signature(function, term.arguments, where)
    name = term.name or str(getattr(function, "__name__", type(function).__name__))
    return Reward(
        name=name,
        function=function,
        signature=signature,
        arguments=dict(term.arguments),
        weight=term.weight,
        failed_value=failed_value,
        concurrency=term.concurrency or _CONCURRENCY,
        timeout_seconds=term.timeout_seconds or _TIMEOUT_SECONDS,
    )
