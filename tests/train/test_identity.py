"""A run folder knows what it is a run of: what differs is named, and refused unless it is harmless."""

from __future__ import annotations

import pytest

from atpo_fast.config import load_config
from atpo_fast.train.identity import COLD_START, HARMLESS, RUN, TREES, Scope, _flat, differences

EXACT = "rollout.schedule=synchronous"


def record(**settings: object) -> dict[str, dict[str, object]]:
    return {"settings": {name.replace("__", "."): value for name, value in settings.items()}, "contents": {}}


# Fails when something that a thing does not depend on is in its way, or something that it depends on is not.
@pytest.mark.parametrize(
    ("scope", "names"), [(RUN, ["optim.lr", "seed"]), (COLD_START, ["cold_start.lr", "seed"]), (TREES, ["seed"])]
)
def test_each_thing_depends_on_its_own_settings(scope: Scope, names: list[str]) -> None:
    before = record(seed=0, optim__lr=1.0, cold_start__lr=1.0)
    now = record(seed=1, optim__lr=2.0, cold_start__lr=2.0)
    assert sorted(name for name, _ in differences(before, now, scope)) == sorted(names)


# A renamed or removed key would leave its old name here, and then stop every run in which it differs.
def test_every_harmless_name_exists() -> None:
    from atpo_fast.config.names import KEYS

    for name in HARMLESS:
        known = name in KEYS or any(key.startswith(name[:-1]) for key in KEYS if name.endswith("*"))
        assert known or name == "evaluation questions", name
    assert "train.steps" in dict(_flat({"train": {"steps": 3}, "seed": 0}))
    assert load_config(None).train.on_change == "refuse"
