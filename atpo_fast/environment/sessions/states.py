"""The states that the sessions of one search tree have been in, and how each is reached.

A place is the state after the actions on a path: the root is the state of a newly opened session, and every action
leads to a place of its own. A live session is parked at the place whose state it is in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from atpo_fast.environment.sessions.random_state import RandomState
from atpo_fast.environment.tags import ToolCall


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an action was answered with; `ok` is False where it failed, and `text` says how."""

    text: str
    ok: bool = True
    reward: float | None = None
    done: bool = False

    def differs(self, other: Outcome) -> bool:
        """Tell whether two answers to the same action are not the same; the texts of failures may vary."""
        if not (self.ok and other.ok):
            return self.ok != other.ok
        return (self.text, self.reward, self.done) != (other.text, other.reward, other.done)


@dataclass(slots=True, eq=False)
class LiveSession:
    """A session that is open."""

    session: Any
    random: RandomState | None  # state of the global generators, where they are guarded
    tree: StateTree
    place: Place | None = None  # where it is parked; none: it works, or is on its way


@dataclass(slots=True, eq=False)
class Place:
    """A state of the environment: that after an action in the state of its parent."""

    tree: StateTree
    parent: Place | None = None
    action: ToolCall | None = None
    outcome: Outcome | None = None
    live: LiveSession | None = None  # a session parked here
    waiting: int = 0  # branches that begin here and have not acted yet
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of `live`

    def path(self) -> Iterator[Place]:
        """Yield the places from this one up to the root."""
        place: Place | None = self
        while place is not None:
            yield place
            place = place.parent


@dataclass(slots=True, eq=False)
class StateTree:
    """The states of one search tree. All its sessions are opened with the same task and seed.

    Attributes:
        name: question, for messages.
        opening: text that the first session added to the question; none where it had none, or could not be opened.
        opened: whether a session was opened, so that `opening` is known.
    """

    name: str
    task: dict[str, Any]
    seed: int
    opening: str | None = None
    opened: bool = False
    closed: bool = False
    live: set[LiveSession] = field(default_factory=set)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)  # what works for this tree
    root: Place = field(init=False)

    def __post_init__(self) -> None:
        self.root = Place(self)

    def again(self) -> StateTree:
        """Return the states of a second tree of the same question."""
        return StateTree(self.name, self.task, self.seed, self.opening, self.opened)
