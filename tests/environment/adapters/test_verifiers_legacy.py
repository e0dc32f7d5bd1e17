"""Adapter to verifiers' environments of before 0.3, on the real package."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.environment.adapters import verifiers_legacy
from tests.helpers import adapter_sessions
from tests.helpers.adapter_sessions import caller

pytest.importorskip("verifiers.envs", reason="no verifiers with the interface of before 0.3 is installed")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(Path(adapter_sessions.__file__).parent))
    return {"id": "1", "question": "A number.", "env_id": "legacy-verifiers-environment", "row": 1}


def test_multi_turn_environment(task: dict[str, Any]) -> None:
    """Fails if the row or the question is mistaken, turn rewards, ends or the last answer of the environment are lost,
    a copy counts its sibling's turns, scoring changes the state, or the environment takes Ctrl-C from the run."""
    handler = signal.getsignal(signal.SIGINT)
    with caller() as call:
        session = call(verifiers_legacy.open_session(task, 0))
        assert session.opening == "Guess." and session.tools == []
        assert signal.getsignal(signal.SIGINT) is handler
        first = call.steps(session, "1")[0]
        assert (first.text, first.reward, first.done) == ("guess 1 is wrong", -0.1, False)
        twin = copy.deepcopy(session)
        assert [result.done for result in call.steps(session, "2", "3")] == [False, True]  # max_turns
        last = call.steps(twin, "6")[0]
        assert (last.text, last.done) == ("right", True)
        assert call(session.score([])) == pytest.approx(0.03)
        assert [call(twin.score([])) for _ in range(2)] == [pytest.approx(1.02)] * 2
        call(twin.close())


def test_tool_environment(task: dict[str, Any]) -> None:
    """Fails if tools or their errors do not come through, or an answer without a call is not scored."""
    with caller() as call:
        session = call(verifiers_legacy.open_session({**task, "env_options": {"kind": "tools"}}, 0))
        assert session.tools[0]["function"]["parameters"]["required"] == ["number"]
        texts = [result.text for result in call.calls(session, ("double", {"number": 3}), ("double", {"count": 3}))]
        assert texts[0] == "6" and "count" in texts[1]
        written = [{"role": "user", "content": "A number."}, {"role": "assistant", "content": "<double>3</double>"}]
        answers = [[*written, *written[1:], {"role": "assistant", "content": text}] for text in ("6", "7")]
        assert [call(session.score(answer)) for answer in answers] == [pytest.approx(1.03), pytest.approx(0.03)]
