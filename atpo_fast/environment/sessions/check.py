"""The check at the start of a run: which way of forking sessions works (`environment.fork`), seen from real sessions.

A fork is tried by acting in it: afterwards the original has to answer the same actions as the fork did, and so has a
second fork that was made before. A replay is tried by giving a second session the actions of the first. What the
actions that are tried (`environment.probe`) do not show is not found.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atpo_fast.common.errors import ConfigError, first_line
from atpo_fast.config import EnvironmentConfig
from atpo_fast.environment.arguments import JsonSchema, text_property
from atpo_fast.environment.own_code import place_of
from atpo_fast.environment.session import forks_by_itself
from atpo_fast.environment.sessions.driver import Driver, LostError
from atpo_fast.environment.sessions.random_state import RandomState, digest
from atpo_fast.environment.sessions.states import LiveSession, Outcome, StateTree
from atpo_fast.environment.tags import ToolCall, parse_call

_LOG = logging.getLogger(__name__)
_TOOLS = 4  # tools that are tried where no actions are given
_EXAMPLES: Mapping[str, Any] = {"integer": 1, "number": 1, "boolean": True, "array": [], "object": {}, "null": None}

Way = Literal["native", "copy", "replay", "none"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """How sessions are forked, and whether a second session with the same seed answers as the first."""

    way: Way
    reproducible: bool


async def choose(driver: Driver, settings: EnvironmentConfig, task: Mapping[str, Any], seed: int) -> Chosen:
    """Open sessions of a task, learn their tools, and find out how to fork them.

    Raises:
        ConfigError: a session cannot be opened, or no way that may be used passes its check.
    """
    check = _Check(driver, settings, StateTree("of the check", dict(task), seed))
    outside = RandomState.now()
    try:
        return await check.run()
    finally:
        await check.close()
        outside.set()


class _Check:
    """Sessions that are tried, and what they answer."""

    def __init__(self, driver: Driver, settings: EnvironmentConfig, tree: StateTree) -> None:
        self._driver, self._settings, self._tree = driver, settings, tree
        self._opened: list[LiveSession] = []
        self._probes: list[ToolCall] = []

    async def run(self) -> Chosen:
        """Try the ways in their order."""
        before = digest()
        first = await self._open()
        self._driver.learn(first.session)
        self._probes = self._actions()
        answers = await self._try(first)
        if self._settings.guard_random is None and digest() != before:
            self._driver.guarded = True
            first = await self._open()
            answers = await self._try(first)
        if not any(answer.ok for answer in answers):
            _LOG.warning(
                "environment.probe: none of the actions %s was accepted, so the check of environment.fork sees little; "
                "last answer: %s",
                [probe.argument for probe in self._probes],
                answers[-1].text[:200],
            )
        second = await self._open()
        same_opening = self._driver.opening(first.session) == self._driver.opening(second.session)
        reproducible = same_opening and not _differ(answers, await self._try(second))
        return Chosen(await self._way(first, reproducible), reproducible)

    async def _way(self, first: LiveSession, reproducible: bool) -> Way:
        asked = self._settings.fork
        problems: dict[str, str] = {}
        for way in ("native", "copy"):
            if asked in ("auto", way):
                problem = await self._problem(first, way)  # type: ignore[arg-type]
                if problem is None:
                    return way  # type: ignore[return-value]
                problems[way] = problem
        if asked == "none":
            return "none"
        unequal = "a second session with the same task and seed answers the same actions otherwise"
        if asked == "replay" or (asked == "auto" and reproducible):
            if not reproducible:
                _LOG.warning("environment.fork=replay: %s, so branches will not continue as they should", unequal)
            return "replay"
        problems |= {"replay": unequal} if asked == "auto" else {}
        raise ConfigError(
            f"environment.fork={asked}: no way was found to fork sessions of {self._settings.factory}. "
            f"{'; '.join(f'{way}: {problem}' for way, problem in problems.items())}. Give the session a fork() of its "
            "own, set another environment.fork, or with rollout.strategy=chain environment.fork=none"
        )

    async def _problem(self, first: LiveSession, way: Literal["native", "copy"]) -> str | None:
        """Say why a way of forking cannot be used; None where it can."""
        if way == "native" and not forks_by_itself(first.session):
            return f"{type(first.session).__name__} has neither fork() nor get_state() and set_state()"
        original = await self._open()
        if any(answer.done for answer in await self._try(original)):
            original = await self._open()
        try:
            forks = [await self._fork(original, way) for _ in range(2)]
        except Exception as error:
            return f"failed: {first_line(error)}{place_of(error)}"
        in_fork, in_original, in_second = [await self._try(live) for live in (forks[0], original, forks[1])]
        if _differ(in_fork, in_original) or _differ(in_fork, in_second):
            return "after actions in a fork, the original answers the same actions otherwise"
        return None

    async def _open(self) -> LiveSession:
        try:
            session, random = await self._driver.open(self._tree.task, self._tree.seed)
        except Exception as error:
            raise ConfigError(
                f"environment.factory={self._settings.factory}: no session can be opened for question "
                f"{self._tree.task.get('id')!r}: {first_line(error)}{place_of(error)}"
            ) from error
        return self._keep(LiveSession(session, random, self._tree))

    async def _fork(self, original: LiveSession, way: Literal["native", "copy"]) -> LiveSession:
        return self._keep(LiveSession(*(await self._driver.fork(original, way)), self._tree))

    def _keep(self, live: LiveSession) -> LiveSession:
        self._opened.append(live)
        return live

    async def _try(self, live: LiveSession) -> list[Outcome]:
        """Make all the actions in a session."""
        answers = []
        for probe in self._probes:
            try:
                answers.append(await self._driver.act(live, probe))
            except LostError as error:
                answers.append(Outcome(str(error), ok=False))
        return answers

    def _actions(self) -> list[ToolCall]:
        """Return the actions to try. Raises ConfigError for one that calls nothing."""
        names = [schema["function"]["name"] for schema in self._driver.schemas]
        if not self._settings.probe:
            return [_example(schema["function"]) for schema in self._driver.schemas[:_TOOLS]]
        calls = []
        for text in self._settings.probe:
            call = parse_call(text, names)
            if call is None or call.problem:
                raise ConfigError(
                    f"environment.probe: {text!r} is no action; write it as the policy does, such as "
                    f"<{names[0]}> ... </{names[0]}>"
                )
            calls.append(call)
        return calls

    async def close(self) -> None:
        """Close all sessions."""
        await asyncio.gather(*(self._driver.close_session(live.session) for live in self._opened))


def _differ(answers: Sequence[Outcome], others: Sequence[Outcome]) -> bool:
    return any(answer.differs(other) for answer, other in zip(answers, others, strict=True))


def _example(function: Mapping[str, Any]) -> ToolCall:
    """Make a call of a tool from its schema."""
    parameters: JsonSchema = function["parameters"]
    values = {
        name: _value(content)
        for name, content in parameters.get("properties", {}).items()
        if name in parameters.get("required", [])
    }
    text = text_property(parameters)
    return ToolCall(function["name"], str(values[text]) if text in values else json.dumps(values))


def _value(content: Any) -> Any:
    """Return a value that fits a property of a schema."""
    if not isinstance(content, dict):
        return "look"
    if content.get("enum"):
        return content["enum"][0]
    return content.get("default", _EXAMPLES.get(str(content.get("type")), "look"))
