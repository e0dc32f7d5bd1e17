"""The global random generators of Python and NumPy, kept apart for each session that uses them.

Some environments seed `random` or `numpy.random` when they are reset, and draw from it when they act. Without a guard
they would reseed the trainer, and sessions would disturb each other's draws.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_ALONE = threading.Lock()  # held by the session whose state the generators have


@dataclass(slots=True)
class RandomState:
    """The state of both generators."""

    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        """Return the state that the generators have now."""
        return cls(random.getstate(), np.random.get_state())

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """Return the state of freshly seeded generators."""
        return cls(random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state())

    def set(self) -> None:
        """Give the generators this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def copy(self) -> RandomState:
        """Return another record of the same state."""
        return RandomState(self.python, self.numpy)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function under this state, alone in the process; what it draws changes this record, and no other."""
        with _ALONE:
            outside = RandomState.now()
            self.set()
            try:
                return function()
            finally:
                inside = RandomState.now()
                self.python, self.numpy = inside.python, inside.numpy
                outside.set()


def digest() -> int:
    """Return a number that changes when anybody draws from the generators or seeds them."""
    numpy: Any = np.random.get_state()
    return hash((random.getstate(), numpy[1].tobytes(), numpy[2:]))
