"""Sessions: live environments whose state the policy's actions change, such as a game, a terminal or a browser.

A session is one live environment on one branch of a search tree. The user supplies a function `open_session(task,
seed)`; `environment.factory` names it. A session either offers tools (`tools` is not empty: `call`), or it takes plain
text (`step`). Each action gives a `Result`.

A class may inherit from `Session` and override what it has, or have the same methods without inheriting. Only `call`
or `step` is required. Every method but `fork` may be `async` too: coroutines of all sessions run on one event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]
"""A part of a transcript: `role` (user, assistant or tool) and `content`."""

SessionFactory = Callable[[dict[str, Any], int], "Session"]
"""The function that a user supplies: `open_session(task, seed)` begins a task from its start.

`task` holds the columns of the question's record, and `id`, `question` and `answers`. The same task and seed have to
give the same session, or replaying a path cannot lead to the same state. May be `async`.
"""


class ForkError(Exception):
    """A session that cannot be forked in the way that was asked for; the message says why."""


@dataclass(frozen=True)
class Result:
    """What the environment answers to an action.

    Attributes:
        text: observation, which the policy reads.
        reward: reward of this action, which belongs to the turn that made it; None: it has none.
        done: whether the episode has ended. The branch then ends with this turn.
    """

    text: str
    reward: float | None = None
    done: bool = False


class Session(Protocol):
    """A live environment on one branch.

    One thread uses a session at a time, but not always the same one. What a method raises becomes the answer that the
    policy reads, unless it is a `SessionLostError`; state and other sessions must not be touched by it.

    Attributes:
        tools: tools that the policy may call, in OpenAI's form (`{"type": "function", "function": {name, description,
            parameters}}`); empty where actions are plain text. All sessions of a run offer the same.
        opening: text that is added to the question, such as the first observation.

    A session that can fork by itself overrides `fork`; or it has `get_state() -> Any` and `set_state(state) -> None`,
    and then a fork is a newly opened session that gets a deep copy of the state. Any other session is forked from
    outside: by a deep copy, or by repeating its actions (`environment.fork`).
    """

    tools: list[dict[str, Any]] = []  # noqa: RUF012 (part of the protocol; nobody appends to it)
    opening: str | None = None

    def call(self, name: str, arguments: dict[str, Any]) -> Result:
        """Call the tool `name`."""
        what = f"{type(self).__name__} has no tools: it takes plain text"
        raise NotImplementedError(what)

    def step(self, text: str) -> Result:
        """Act by plain text."""
        what = f"{type(self).__name__} takes no plain text: it has tools"
        raise NotImplementedError(what)

    def fork(self) -> Session:
        """Return another session in the same state, which shares nothing mutable with this one."""
        raise ForkError(f"{type(self).__name__} does not fork by itself")

    def score(self, transcript: list[Message]) -> float | Awaitable[float | None] | None:
        """Score the trajectory that ends in the present state, without changing that state; None: no score.

        `transcript` holds the question (role user), what the policy wrote in each turn (assistant), and what answered
        it (tool), in order.
        """
        return None

    def close(self) -> None:
        """Free what the session holds. Called once for every session, also after an exception in another method, and
        from another thread while a call hangs."""
        return


class SessionLostError(Exception):
    """Raised by a session whose environment is gone, such as a container that died: its branch ends."""


def forks_by_itself(session: Any) -> bool:
    """Tell whether a session has a fork of its own, or a state that can be taken and set."""
    own = getattr(type(session), "fork", None)
    return (own is not None and own is not Session.fork) or keeps_state(session)


def keeps_state(session: Any) -> bool:
    """Tell whether the state of a session can be taken and set."""
    return callable(getattr(session, "get_state", None)) and callable(getattr(session, "set_state", None))


def scores(session: Any) -> bool:
    """Tell whether a session scores trajectories."""
    own = getattr(type(session), "score", None)
    return own is not None and own is not Session.score
