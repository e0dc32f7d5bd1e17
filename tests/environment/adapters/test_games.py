"""Adapters to GEM, TextArena and Gymnasium-like environments, on the real packages."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from atpo_fast.environment.adapters import gem, gymnasium_like, textarena
from atpo_fast.environment.session import ForkError, Result


def test_gem_forks_by_spawn_with_tools() -> None:
    """Fails if a fork of an environment with tools counts its tool calls together with its sibling's, or asks another
    question."""
    pytest.importorskip("gem", reason="gem-llm is not installed")
    from gem import make
    from gem.tools.python_code_tool import PythonCodeTool
    from gem.tools.tool_env_wrapper import ToolEnvWrapper

    env = ToolEnvWrapper(make("rg:chain_sum"), [PythonCodeTool()], max_tool_uses=2)
    session = gem.GemSession(env, seed=2**40 + 3)  # NumPy's global generator takes no such seed
    assert session.opening is not None and session.opening.startswith("State the final answer")
    assert session.step("<python>print(6 * 7)</python>").text.startswith("Code execution result: 42")
    twin = session.fork()
    assert "Reached the maximum number of tool use" in session.step("<python>print(1)</python>").text
    assert "Reached the maximum number of tool use" in twin.step("<python>print(2)</python>").text
    answer = env.env.data["answer"]
    assert twin.step(f"\\boxed{{{answer}}}").reward == session.step(f"\\boxed{{{answer}}}").reward == 1.0
    assert session.step("\\boxed{x}").done


def test_gem_game_has_no_fork_but_copies() -> None:
    """Fails if a game that cannot spawn is not told apart, or a copy sees what its sibling did."""
    pytest.importorskip("gem", reason="gem-llm is not installed")
    task = {"id": "1", "env_id": "game:GuessTheNumber-v0-hard", "env_options": {"max_turns": 3}}
    session = gem.open_session(task, 5)
    with pytest.raises(ForkError, match="no spawn"):
        session.fork()
    session.step("\\boxed{20}")
    twin = copy.deepcopy(session)
    assert session.step("\\boxed{21}").text.startswith("At turn 2")
    assert "already guessed" not in twin.step("\\boxed{21}").text
    assert "already guessed" in session.step("\\boxed{21}").text or session.env.turn_count == 3


def test_text_arena_tells_only_what_is_new() -> None:
    """Fails if the whole game is repeated in every observation, or the reward at the end is lost."""
    pytest.importorskip("textarena", reason="textarena is not installed")
    session = textarena.open_session({"id": "1", "env_id": "GuessTheNumber-v0"}, 2**40)
    assert session.opening is not None and "Guess The Number" in session.opening
    twin = copy.deepcopy(session)
    texts = [session.step(f"[{guess}]").text for guess in (3, 9)]
    assert all(text.startswith("The target number is") and "\n" not in text for text in texts)
    number = session.env.state.game_state["game_number"]
    assert session.step(f"[{number}]").reward == 1.0
    lost: list[Result] = []
    while not (lost and lost[-1].done):
        lost.append(twin.step(f"[{1 + (number + len(lost)) % 20}]"))
    assert [result.reward is not None for result in lost] == [False] * (len(lost) - 1) + [True]


class Corridor:
    """A Gymnasium-like environment with text: the goal is some steps away."""

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        self.left = 1 + seed % 3
        return f"{self.left} steps to go", {}

    def step(self, action: str) -> tuple[dict[str, str], float, bool, bool, dict[str, Any]]:
        self.left -= action == "go"
        return {"text": f"{self.left} steps to go"}, -0.5, self.left == 0, False, {}


def test_gymnasium_like() -> None:
    """Fails if the text of reset, a reward or an end is lost; this environment has no close."""
    session = gymnasium_like.GymnasiumSession(Corridor(), seed=1)
    assert session.opening == "2 steps to go"
    results = [session.step(action) for action in ("wait", "go", "go")]
    assert [(result.text[0], result.reward, result.done) for result in results] == [
        ("2", -0.5, False),
        ("1", -0.5, False),
        ("0", -0.5, True),
    ]
    session.close()
