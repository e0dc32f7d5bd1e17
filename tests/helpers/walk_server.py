"""A small environment of OpenEnv, its server on this machine, and sessions of its harness."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from openenv.core.client_types import StepResult
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_types import Tool
from openenv.core.env_server.types import Action, Observation, State
from openenv.core.harness import ResourceSessionFactory, StepEnvSessionAdapter


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


class Walks(ResourceSessionFactory[StepEnvSessionAdapter]):
    """Walks in this process, as sessions of OpenEnv's harness."""

    def create(self, task: Any, seed: int | None = None, episode_id: str | None = None) -> StepEnvSessionAdapter:
        schema = {"type": "object", "properties": {"direction": {"type": "string"}}, "required": ["direction"]}
        return StepEnvSessionAdapter(
            LocalClient(),
            task=task,
            seed=seed,
            tool_specs=[Tool(name="move", description="Move.", input_schema=schema)],
            action_builder=lambda name, arguments: Move(**arguments),
            initial_messages_builder=lambda result, state: [{"role": "user", "content": result.observation.text}],
        )


class LocalClient:
    """The client that the harness's adapter drives."""

    def __init__(self) -> None:
        self.environment = Walk()
        self.closed = False

    def reset(self, **arguments: Any) -> StepResult[Place]:
        place = self.environment.reset(**arguments)
        return StepResult(place, place.reward, place.done)

    def step(self, action: Move) -> StepResult[Place]:
        place = self.environment.step(action)
        return StepResult(place, place.reward, place.done)

    def close(self) -> None:
        self.closed = True


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
