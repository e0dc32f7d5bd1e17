"""A small environment of OpenEnv, and its server on this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Move(Action):
    direction: str


class Place(Observation):
    text: str


class Walk(Environment):
    """A walk on a line; the start comes from the seed, and home is at 0."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.at = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Place:
        self.at = 2 + (seed or 0) % 3
        return Place(text=f"at {self.at}", done=False, reward=None)

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Place:
        self.at += {"left": -1, "right": 1}[action.direction]
        return Place(text=f"at {self.at}", done=self.at == 0, reward=1.0 if self.at == 0 else -0.1)

    @property
    def state(self) -> State:
        return State()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application on this machine; yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def served_walk() -> Iterator[str]:
    """Serve walks, many at once; yields the address."""
    with served(create_app(Walk, Move, Place, max_concurrent_envs=256)) as address:
        yield address
