"""A small text game whose actions change its state and cannot be undone: rooms, keys and locked doors.

In every room lie some keys, and there is a door for each. A look shows some of the keys, drawn anew each time. Who
takes a key sees the others turn to dust; a key opens the door of its colour, and the door falls shut behind. The door
that the question names next leads on, at last to the treasury with a gem and a piece of glass, whose colours differ;
behind any other is a pit, which ends the episode. The answer is the colour of the gem.

| action | answer |
|---|---|
| `look` | `Keys: red blue.`; in the treasury `Treasury: gem green and glass red.` |
| `take red` | `Held red.`, `No red here.`, or `Dust.` when a key was taken in this room before |
| `open red` | what is seen behind the door, `Locked.` without its key, or `Pit.` |
"""

from __future__ import annotations

import random
from typing import Any

from atpo_fast.environment.session import Message, Result, Session

UNKNOWN = "What?"


def open_session(task: dict[str, Any], seed: int) -> RoomsSession:
    """Open the rooms of a question (`atpo_fast.world.levels`); `seed` decides what each look shows."""
    return RoomsSession(task, seed)


class RoomsSession(Session):
    """The game on one branch. It has no fork of its own: a deep copy is a session in the same state.

    Args:
        task: `doors`, the colours on the way; `rooms`, the colours of the keys in each room; `gem` and `glass`, the
            colours of what lies in the treasury; `shown`, the number of keys that a look shows; `door_reward`.
        seed: seed of the looks.
    """

    def __init__(self, task: dict[str, Any], seed: int) -> None:
        self._doors: list[str] = task["doors"]
        self._rooms: list[list[str]] = task["rooms"]
        self._gem, self._glass, self._shown = task["gem"], task["glass"], int(task["shown"])
        self._door_reward = float(task["door_reward"])
        self._seed = seed
        self._room = 0  # number of doors passed
        self._looks = 0
        self._key: str | None = None
        self._taken = False  # whether a key was taken in this room
        self._fallen = False
        self.opening = self._look()

    def step(self, text: str) -> Result:
        """Look, take a key, or open a door."""
        if self._fallen:
            return Result("Pit.", done=True)
        if text == "look":
            return Result(self._look())
        verb, _, colour = text.partition(" ")
        if verb == "take" and colour:
            return Result(self._take(colour))
        if verb == "open" and colour:
            return self._open(colour)
        return Result(UNKNOWN)

    def score(self, transcript: list[Message]) -> float:
        """Score 1 where the treasury was reached."""
        return float(self._room == len(self._doors))

    def _look(self) -> str:
        draw = random.Random(f"{self._seed} {self._room} {self._looks}")
        self._looks += 1
        if self._room == len(self._doors):
            seen = [f"gem {self._gem}", f"glass {self._glass}"]
            draw.shuffle(seen)
            return f"Treasury: {seen[0]} and {seen[1]}."
        if self._taken:
            return "Dust."
        return f"Keys: {' '.join(draw.sample(self._rooms[self._room], self._shown))}."

    def _take(self, colour: str) -> str:
        if self._room == len(self._doors) or self._taken:
            return "Dust."
        if colour not in self._rooms[self._room]:
            return f"No {colour} here."
        self._key, self._taken = colour, True
        return f"Held {colour}."

    def _open(self, colour: str) -> Result:
        if colour != self._key:
            return Result("Locked.")
        self._key, self._taken = None, False
        if colour != self._doors[self._room]:
            self._fallen = True
            return Result("Pit.", done=True)
        self._room += 1
        return Result(self._look(), reward=self._door_reward or None)
