"""Adapters to OpenEnv, on real servers on this machine: over the client, with and without MCP tools, and a harness's
ResourceSession."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from atpo_fast.environment.adapters import openenv, openenv_harness
from atpo_fast.tree.traces import grow_trees, read_openenv
from tests.helpers.adapter_sessions import Caller, caller

pytest.importorskip("openenv.core", reason="openenv is not installed")

from fastmcp import FastMCP
from openenv.core.env_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from openenv.core.harness import TrainingTrace, TrainingTurn

from tests.helpers.walk_server import Walks, served, served_walk


class Drawers(MCPEnvironment):
    """A chest of drawers: tools with a state."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        mcp = FastMCP("drawers")
        self.things: list[str] = []

        @mcp.tool()
        def put(thing: str, count: int = 1) -> str:
            """Put something in."""
            if thing == "elephant":
                raise ValueError("too large")
            self.things += [thing] * count
            return f"{len(self.things)} things"

        super().__init__(mcp)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        self.things = []
        return Observation(done=False, reward=None)

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        raise NotImplementedError

    @property
    def state(self) -> State:
        return State()


@pytest.fixture(scope="module")
def walk() -> Iterator[str]:
    with served_walk() as address:
        yield address


def opened(call: Caller, **columns: Any) -> Any:
    return call(openenv.open_session({"id": "1", **columns}, 4))  # without a seed, a walk begins elsewhere


def test_client(walk: str) -> None:
    """Fails if the text of reset, a reward or an end is lost, if two sessions share a state, or if a second session
    with the seed differs from the first: then no path could be replayed."""
    with caller() as call:
        first, second = (opened(call, base_url=walk, action_field="direction") for _ in range(2))
        assert first.opening == second.opening == "at 3"
        assert [result.text for result in call.steps(first, "right", "left")] == ["at 4", "at 3"]
        home = call.steps(second, "left", "left", "left")
        assert [(result.text, result.reward, result.done) for result in home] == [
            ("at 2", -0.1, False),
            ("at 1", -0.1, False),
            ("at 0", 1.0, True),
        ]
        with pytest.raises(Exception, match="up"):
            call.steps(first, "up")
        with pytest.raises(TypeError, match="cannot be copied"):
            first.__deepcopy__({})
        for session in (first, second):
            call(session.close())


def test_tools_of_an_mcp_environment() -> None:
    """Fails if the schemas of tools or their results do not come through, or an error is taken for a result."""
    app = create_app(Drawers, CallToolAction, CallToolObservation, max_concurrent_envs=2)
    with served(app) as address, caller() as call:
        session = opened(call, base_url=address)
        (tool,) = session.tools
        assert tool["function"]["name"] == "put" and tool["function"]["description"] == "Put something in."
        assert tool["function"]["parameters"]["required"] == ["thing"]
        texts = [
            result.text
            for result in call.calls(session, ("put", {"thing": "sock", "count": 2}), ("put", {"thing": "tie"}))
        ]
        assert texts == ["2 things", "3 things"]
        assert "too large" in call.calls(session, ("put", {"thing": "elephant"}))[0].text
        call(session.close())


def test_resource_session() -> None:
    """Fails if the reward counts twice, of the step and of `verify`, or the session's resources are never released."""
    session = openenv_harness.sessions_of(Walks())({"id": "1"}, 3)
    assert session.opening == "at 2" and session.tools[0]["function"]["name"] == "move"
    results = [session.call("move", {"direction": "left"}) for _ in range(2)]
    assert [(result.reward, result.done) for result in results] == [(None, False), (None, True)]
    assert "at 0" in results[-1].text
    assert session.score([{"role": "user", "content": "Go home."}]) == 1.0
    session.close()
    assert session._inner._client.closed


def test_a_training_trace_becomes_a_tree() -> None:
    """Fails if OpenEnv writes a trace in another form than `atpo-fast import` reads."""
    calls = [([1, 2], [3], "a"), ([1, 2, 3, 20], [4, 5], "b"), ([1, 2, 3, 20], [6], "c")]
    turns = [
        TrainingTurn(
            node_id=name,
            prompt_token_ids=prompt,
            completion_token_ids=ids,
            per_token_logps=[-0.5] * len(ids),
            loss_mask=[0] * len(prompt) + [1] * len(ids),
        )
        for prompt, ids, name in calls
    ]
    trace = TrainingTrace(turns=turns)
    for written in (trace.model_dump(mode="json"), {"turns": trace.to_trace_entries()}):
        episode = read_openenv(written | {"task_id": "walk", "reward": 1.0}, "record 1")
        assert episode is not None
        (tree,) = grow_trees([episode])
        assert tree.question_id == "walk"
        assert [tree.path_ids(leaf).tolist() for leaf in tree.leaves] == [[1, 2, 3, 20, 4, 5], [1, 2, 3, 20, 6]]
