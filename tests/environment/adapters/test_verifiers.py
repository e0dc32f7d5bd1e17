"""Adapter to verifiers' v1 interface, on the real package."""

from __future__ import annotations

import copy
import json

import pytest

from atpo_fast.environment.adapters.verifiers import VerifiersSession
from atpo_fast.environment.adapters.verifiers_parts import empty_trace
from atpo_fast.tree.traces import grow_trees, read_verifiers
from tests.helpers.adapter_sessions import caller

pytest.importorskip("verifiers", minversion="0.4", reason="verifiers 0.4 is not installed")

import verifiers.v1 as vf

from tests.helpers.verifiers_task import BoxData, BoxTask

TRANSCRIPT = [
    {"role": "user", "content": "Fill the box."},
    {"role": "assistant", "content": "<coins_put> ... </coins_put>"},
    {"role": "tool", "content": "2 of 3"},
    {"role": "assistant", "content": "done"},
]


def test_task_with_tools() -> None:
    """Fails if tools lose the task's state between calls, two sessions share one, a stop condition or a weight is left
    out, the answer or a call is missing in the trace, or scoring once changes what scoring again gives."""
    with caller() as call:
        task = BoxTask(BoxData(goal=3, prompt="Fill the box."))
        session, other = call(VerifiersSession.begin(task)), call(VerifiersSession.begin(task))
        assert session.opening == "Fill the box."
        assert [tool["function"]["name"] for tool in session.tools] == ["coins_put"]
        (result,) = call.calls(session, ("coins_put", {"count": "2"}))
        assert (result.text, result.done) == ("2 of 3", False)
        assert [call(session.score(TRANSCRIPT)) for _ in range(2)] == [pytest.approx(0.51)] * 2
        with pytest.raises(ValueError, match="too many at once"):
            call.calls(session, ("coins_put", {"count": 10}))
        results = call.calls(other, *[("coins_put", {})] * 3)
        assert [(result.text, result.done) for result in results][1:] == [("2 of 3", False), ("3 of 3", True)]
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(session)
        folders = [one._runtime.workdir for one in (session, other)]
        assert all(folder.exists() for folder in folders)
        for one in (session, other):
            call(one.close())
        assert not any(folder.exists() for folder in folders)


def test_a_trace_becomes_a_tree() -> None:
    """Fails if verifiers writes a trace in another form than `atpo-fast import` reads."""
    task = BoxTask(BoxData(goal=3, prompt="Fill the box."))
    trace, _ = empty_trace(task)
    tokens = {"token_ids": [9, 10, 11], "mask": [False, True, True], "logprobs": [-0.25, -0.5]}
    trace.nodes = [
        vf.MessageNode(message=vf.UserMessage(content="Fill the box."), token_ids=[1, 2], mask=[False, False]),
        vf.MessageNode(parent=0, message=vf.AssistantMessage(content="put"), sampled=True, **tokens),
        vf.MessageNode(parent=1, message=vf.UserMessage(content="1 of 3"), token_ids=[20], mask=[False]),
        vf.MessageNode(parent=2, message=vf.AssistantMessage(content="done"), sampled=True, **tokens),
        vf.MessageNode(parent=2, message=vf.AssistantMessage(content="more"), sampled=True, **tokens),
    ]
    trace.record_reward("reached", 1.0)
    trace.record_reward("told", 1.0, weight=0.5)
    episode = read_verifiers(json.loads(json.dumps(trace.to_record(float_decimals=None))))
    assert episode is not None and episode.question_id == task.key
    (tree,) = grow_trees([episode])
    assert [tree.turns[leaf].reward for leaf in tree.leaves] == [1.5, 1.5]
    assert [tree.path_ids(leaf).tolist() for leaf in tree.leaves] == [branch.token_ids for branch in trace.branches]
    assert tree.meta["question"] == "Fill the box."


def test_task_without_tools() -> None:
    """Fails if a task that is answered at once has no score, or its answer is not in the trace."""

    class Plain(vf.Task[vf.TaskData]):
        @vf.reward
        async def right(self, trace: vf.Trace) -> float:
            return float(trace.last_reply == "4")

    with caller() as call:
        session = call(VerifiersSession.begin(Plain(vf.TaskData(prompt="2 + 2?"))))
        assert session.tools == []
        answers = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": text}] for text in "45"]
        assert [call(session.score(answer)) for answer in answers] == [1.0, 0.0]
        call(session.close())
