"""Real environments rolled out as trees from the command line, by each of the three ways of forking.

The observations of every path have to be those of a session that went this path alone.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.environment_runs import Rolled, roll_out

CALCULATOR = """
import gem.envs
from gem import make
from gem.tools.python_code_tool import PythonCodeTool
from gem.tools.tool_env_wrapper import ToolEnvWrapper

from atpo_fast.environment.adapters.gem import GemSession


def open_session(task, seed):
    return GemSession(ToolEnvWrapper(make("rg:chain_sum"), [PythonCodeTool()], max_tool_uses=2), seed)
"""


def acted(path: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The actions on a path that the environment answered, and its answers; others answer what is no action."""
    answered = [(text, answer) for text, answer in path[1:] if "<act>" in text and "<result>" in answer]
    return [(text, answer) for text, answer in answered if "was not called" not in answer]


def check_counts(rolled: Rolled, way: str) -> None:
    counts = rolled.counts
    assert counts[way] > 0 and rolled.branched > 0, (counts, rolled.branched)
    others = {"native", "copied", "by replay"} - {way}
    assert all(counts[other] == 0 for other in others) and counts["mismatches"] == counts["lost"] == 0, counts


@pytest.mark.slow(reason="teaches a model and rolls out with it")
def test_gem_by_native_forks(tmp_path: Path) -> None:
    """Fails if branches count each other's tool calls: the notice of the last one comes with the second on a path."""
    pytest.importorskip("gem", reason="gem-llm is not installed")
    (tmp_path / "calculator.py").write_text(CALCULATOR)
    actions = ["<python>print(1+1)</python>", "<python>print(7)</python>"]
    rolled = roll_out(tmp_path, f"{tmp_path}/calculator.py:open_session", {}, actions)
    check_counts(rolled, "native")
    for path in rolled.paths:
        answers = [answer for text, answer in acted(path) if re.search(r"<python>\S+</python>", text)]
        for number, answer in enumerate(answers):
            assert ("Code execution" in answer) == (number < 2), path
            cut = "Traceback" in answer  # too long for a result: the notice at its end is left out
            assert cut or ("maximum number of tool use" in answer) == (number == 1), path


@pytest.mark.slow(reason="teaches a model and rolls out with it")
def test_skyrl_gym_by_copies(tmp_path: Path) -> None:
    """Fails if branches count each other's turns: the environment asks otherwise before the last turn of a path."""
    pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed")
    task = {"env_class": "gsm8k_multi_turn", "max_turns": 3, "reward_spec": {"ground_truth": "4"}}
    factory = "atpo_fast.environment.adapters.skyrl_gym:open_session"
    rolled = roll_out(tmp_path, factory, task, ["#### 3", "it is 5", "#### 12"])
    check_counts(rolled, "copied")
    for path in rolled.paths:
        last = ["Now provide only" in answer for _, answer in acted(path)]
        assert last[:2] == [False, True][: len(last[:2])], path


@pytest.mark.slow(reason="teaches a model and rolls out with it")
def test_openenv_by_replay(tmp_path: Path) -> None:
    """Fails if a replayed session is not where its path says: every step moves by one."""
    pytest.importorskip("openenv.core", reason="openenv is not installed")
    from tests.helpers.walk_server import served_walk

    factory = "atpo_fast.environment.adapters.openenv:open_session"
    with served_walk() as address:
        task = {"base_url": address, "action_field": "direction"}
        rolled = roll_out(tmp_path, factory, task, ["left", "right"])
    check_counts(rolled, "by replay")
    for path in rolled.paths:
        places = [int(place) for _, text in path for place in re.findall(r"at (-?\d+)", text)]
        moves = [1 if "right" in text else -1 for text, answer in acted(path) if "at " in answer]
        assert [b - a for a, b in pairwise(places)] == moves, path
