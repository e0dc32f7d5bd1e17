"""Alarms: each tells its own cause, after as many steps as it is given, and once; a healthy step raises none."""

from __future__ import annotations

import math

import pytest

from atpo_fast.config.logging import AlarmConfig
from atpo_fast.telemetry.alarms import look

HEALTHY = {
    "policy/entropy": 0.4,
    "reward/mean": 0.3,
    "outcome/right": 0.4,
    "outcome/wrong": 0.5,
    "outcome/no_answer": 0.1,
    "sampling/no_signal": 0.3,
    "rollout/logprob_gap": 1e-6,
    "rollout/staleness": 0.0,
    "policy/clipped_low": 0.05,
    "policy/clipped_high": 0.05,
    "policy/skipped_steps": 0.0,
    "tool/search/calls": 50.0,
    "tool/search/failure_rate": 0.0,
}
SOLVED = HEALTHY | {"outcome/right": 0.98, "outcome/wrong": 0.02, "policy/entropy": 1e-4, "sampling/no_signal": 1.0}
ILL = {
    "entropy": ({"policy/entropy": 0.001}, "entropy is 0.001 nats"),
    "format": ({"outcome/right": 0.02, "outcome/wrong": 0.0, "outcome/no_answer": 0.98}, "no_answer 98%"),
    "equal_rewards": ({"sampling/no_signal": 1.0}, "wrong 50%, right 40%, no_answer 10%"),
    "logprob_gap": ({"rollout/logprob_gap": 0.3}, "differ by 0.3 nats"),
    "clipped": ({"policy/clipped_high": 0.6}, "65% of the action tokens"),
    "tools": ({"tool/search/failure_rate": 0.5, "tool/search/timeouts": 20.0}, "50% of 50 calls of search failed (20"),
    "staleness": ({"rollout/staleness": 3.0}, "3 steps older"),
    "not_finite": ({"policy/loss": math.nan}, "policy/loss is not finite"),
}
AT_ONCE = ("tools", "not_finite")


# Fails when a condition is not looked at, says something else, comes too early, or comes again at every step (a day of
# which nobody would read).
@pytest.mark.parametrize("name", ILL)
def test_each_alarm_begins_once(name: str) -> None:
    changes, words = ILL[name]
    memory: dict[str, float] = {}
    assert look(HEALTHY, AlarmConfig(), memory) == ({}, {})
    begun = [look(HEALTHY | changes, AlarmConfig(), memory) for _ in range(4)]
    first = 0 if name in AT_ONCE else 1
    assert [list(texts) for texts, _ in begun] == [[name] if step == first else [] for step in range(4)]
    assert words in begun[first][0][name]
    assert [list(holding) for _, holding in begun] == [[f"alarm/{name}"] if step >= first else [] for step in range(4)]
    look(HEALTHY, AlarmConfig(), memory)
    again = [look(HEALTHY | changes, AlarmConfig(), memory)[0] for _ in range(2)]
    assert list(again[first]) == [name]


# Fails when a policy that has learned everything is called collapsed.
def test_a_solved_task_is_no_alarm() -> None:
    memory: dict[str, float] = {}
    assert [look(SOLVED, AlarmConfig(), memory) for _ in range(5)] == [({}, {})] * 5


# Fails when only the absolute share counts: a policy that loses its format on the way is told late.
def test_the_format_may_not_fall() -> None:
    memory: dict[str, float] = {}
    for share in (0.2, 0.8, 0.88, 0.5):  # a half may be lost
        assert look(HEALTHY | {"outcome/right": share, "outcome/wrong": 0.0}, AlarmConfig(), memory) == ({}, {})
    fallen = HEALTHY | {"outcome/right": 0.3, "outcome/wrong": 0.1}
    look(fallen, AlarmConfig(), memory)
    begun, _ = look(fallen, AlarmConfig(), memory)
    assert "fallen from 88% to 40%" in begun["format"]


# Fails when a gradient that was left out is told at every later step, or never, or when null does not switch off.
def test_skipped_steps_and_switches() -> None:
    memory: dict[str, float] = {}
    left_out = HEALTHY | {"policy/skipped_steps": 2.0}
    assert "2 optimizer steps were left out" in look(left_out, AlarmConfig(), memory)[0]["not_finite"]
    assert look(left_out, AlarmConfig(), memory) == ({}, {})
    silent = AlarmConfig(
        min_entropy=None, min_format=None, format_drop=None, equal_rewards=False, max_logprob_gap=None,
        max_clipped=None, max_tool_failures=None, max_staleness=None, not_finite=False,
    )  # fmt: skip
    for changes, _ in ILL.values():
        assert look(HEALTHY | changes, silent, memory) == ({}, {})
        assert look(HEALTHY | changes, silent, memory) == ({}, {})
