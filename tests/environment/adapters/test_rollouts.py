"""A real environment of each protocol rolled out as trees from the command line.

    .venv-environments/games/bin/python -m pytest tests/environment/adapters/test_rollouts.py -s

prints how the sessions of each branched. The observations of every path have to be those of a session that goes this
path alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import adapter_sessions
from tests.helpers.environment_runs import Action, played_alone, roll_out

ADAPTERS = "atpo_fast.environment.adapters"
LIMIT = 64  # tokens of a result, and so at least as many characters

CALCULATOR = """
import gem.envs
from gem import make
from gem.tools.python_code_tool import PythonCodeTool
from gem.tools.tool_env_wrapper import ToolEnvWrapper

from atpo_fast.environment.adapters.gem import GemSession


def open_session(task, seed):
    return GemSession(ToolEnvWrapper(make("rg:chain_sum"), [PythonCodeTool()], max_tool_uses=2), seed)
"""

SHOP = """
from atpo_fast.environment.adapters import trl


class Shop:
    def reset(self, **row):
        self.coins = 9
        return "You have 9 coins."

    def buy(self, price: int) -> str:
        \"\"\"
        Buy something.

        Args:
            price: how many coins
        \"\"\"
        self.coins -= price
        return f"{self.coins} coins left"

    def get_reward(self):
        return float(self.coins == 0)


open_session = trl.sessions_of(Shop)
"""

HARNESS = """
from atpo_fast.environment.adapters import openenv_harness
from tests.helpers.walk_server import Walks

open_session = openenv_harness.sessions_of(Walks())
"""

BOXES = """
from atpo_fast.environment.adapters import verifiers
from tests.helpers.verifiers_task import BoxData, BoxTask

open_session = verifiers.sessions_of([BoxTask(BoxData(goal=goal, prompt="Fill the box.")) for goal in (3, 5)])
"""


@dataclass(frozen=True)
class Case:
    """An environment, and by which way its sessions are forked."""

    way: str  # none: there is nothing to fork
    package: str
    actions: list[Action]
    factory: str = ""  # of an adapter
    code: str = ""  # or of a file of one's own
    task: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    long: bool = False  # whether the opening is


CASES = {
    "gem": Case("native", "gem", ["<python>print(1+1)</python>", "<python>print(7)</python>"], code=CALCULATOR),
    "textarena": Case(
        "copied",
        "textarena",
        ["[3]", "[9]", "[14]"],
        "textarena:open_session",
        task={"env_id": "GuessTheNumber-v0"},
        long=True,
    ),
    "skyrl-gym": Case(
        "copied",
        "skyrl_gym",
        ["#### 3", "it is 5", "#### 12"],
        "skyrl_gym:open_session",
        task={"env_class": "gsm8k_multi_turn", "max_turns": 3, "reward_spec": {"ground_truth": "4"}},
    ),
    "reasoning-gym": Case(
        "none", "reasoning_gym", ["4", "12"], "reasoning_gym:open_session", task={"dataset": "chain_sum"}
    ),
    # Needs no package of its own; once is enough.
    "trl": Case("copied", "gem", [("buy", '{"price": 2}'), ("buy", '{"price": 3}')], code=SHOP),
    "openenv": Case(
        "by replay", "openenv.core", ["left", "right"], "openenv:open_session", task={"action_field": "direction"}
    ),
    "openenv-harness": Case("by replay", "openenv.core", [("move", "left"), ("move", "right")], code=HARNESS),
    "verifiers": Case(
        "by replay",
        "verifiers",
        [("coins_put", '{"count": 1}'), ("coins_put", '{"count": 2}')],
        code=BOXES,
        task={"task": 0},
        version="0.4",
    ),
    "verifiers-legacy": Case(
        "copied",
        "verifiers.envs",
        ["1", "2", "4"],
        "verifiers_legacy:open_session",
        task={"env_id": "legacy-verifiers-environment", "row": 1},
    ),
}


@pytest.mark.slow(reason="teaches a model and rolls out with it")
@pytest.mark.parametrize("name", CASES)
def test_rolled_out_as_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fails if a branch sees what its siblings did, or sessions are forked in another way than the table says."""
    case = CASES[name]
    pytest.importorskip(case.package, minversion=case.version, reason=f"{name} is not installed")
    monkeypatch.syspath_prepend(str(Path(adapter_sessions.__file__).parent))
    factory = f"{ADAPTERS}.{case.factory}"
    if case.code:
        (tmp_path / "own.py").write_text(case.code)
        factory = f"{tmp_path}/own.py:open_session"
    with served(name) as columns:
        task = case.task | columns
        rolled = roll_out(tmp_path, factory, task, case.actions, case.long)
        counts = rolled.counts
        assert counts["opened"] > 4
        assert case.way == "none" or (counts[case.way] > 0 and rolled.branched > 0), (counts, rolled.branched)
        others = {"native", "copied", "by replay"} - {case.way}
        assert all(counts[other] == 0 for other in others) and counts["mismatches"] == counts["lost"] == 0, counts
        pairs = played_alone(factory, task, rolled)
    assert len(pairs) > 20
    for pair in pairs:
        recorded, alone = (re.sub(r"line \d+", "line", text) for text in pair)  # of a script that GEM writes
        cut = len(recorded) >= LIMIT and alone.startswith(recorded.removesuffix("\n</result>"))
        assert recorded == alone or cut, (recorded, alone)


@contextlib.contextmanager
def served(name: str) -> Iterator[dict[str, str]]:
    """Serve what an environment needs; yields the columns that say where."""
    if name != "openenv":
        yield {}
        return
    from tests.helpers.walk_server import served_walk

    with served_walk() as address:
        yield {"base_url": address}
