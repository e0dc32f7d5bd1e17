"""The check at the start on real environments: which way of forking it finds, and who reseeds the whole process."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

import pytest

from atpo_fast.config import EnvironmentConfig
from atpo_fast.environment.sessions import Sessions

NUMBER = {"env_id": "game:GuessTheNumber-v0-hard"}
TILES = {"env_id": "game:Game2048-v0-easy"}
TURNS = {"env_class": "gsm8k_multi_turn", "max_turns": 3, "reward_spec": {"ground_truth": "4"}}


@pytest.mark.parametrize(
    ("package", "adapter", "columns", "action", "way", "guarded"),
    [
        ("gem", "gem", {"env_id": "rg:chain_sum"}, "\\boxed{5}", "native", True),
        ("gem", "gem", NUMBER, "\\boxed{20}", "copy", True),
        ("gem", "gem", TILES, "\\boxed{up}", "copy", True),
        ("textarena", "textarena", {"env_id": "GuessTheNumber-v0"}, "[3]", "copy", True),
        ("textarena", "textarena", {"env_id": "2048-v0"}, "[up]", "copy", True),
        ("skyrl_gym", "skyrl_gym", TURNS, "#### 3", "copy", False),
        ("reasoning_gym", "reasoning_gym", {"dataset": "chain_sum"}, "7", "native", False),
    ],
)
def test_the_way_that_is_found(
    package: str, adapter: str, columns: dict[str, Any], action: str, way: str, guarded: bool
) -> None:
    """Fails if a game without spawn is not copied, if a game that reseeds the process is let do so, or if one that
    draws from the shared generators (2048) draws other tiles in a copy."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    settings = EnvironmentConfig(factory="my:own", probe=[f"<act> {action} </act>"] * 2)
    factory = import_module(f"atpo_fast.environment.adapters.{adapter}").open_session
    state = random.getstate()
    task = {"id": "1", "question": "Play.", **columns}
    sessions = Sessions(factory, settings, max_chars=4000, task=task, seed=2**40 + 1)
    try:
        assert (sessions.way, sessions._driver.guarded) == (way, guarded)
        assert random.getstate() == state
    finally:
        sessions.close()
