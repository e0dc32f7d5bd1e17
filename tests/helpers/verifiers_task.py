"""A task of verifiers' v1 interface: a box to fill with coins."""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf


class Box(vf.State):
    coins: int = 0


class BoxData(vf.TaskData):
    goal: int


class Coins(vf.Toolset[vf.ToolsetConfig, Box]):
    TOOL_PREFIX = "coins"

    async def setup_task(self, task: BoxData) -> None:
        self.goal = task.goal

    @vf.tool
    async def put(self, count: int = 1) -> str:
        """Put coins into the box."""
        if count > 9:
            raise ValueError("too many at once")
        self.state.coins += count
        return f"{self.state.coins} of {self.goal}"


class BoxTask(vf.Task[BoxData, Box]):
    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return [Coins(vf.ToolsetConfig())]

    @vf.stop
    async def full(self, trace: vf.Trace) -> bool:
        return bool(trace.state.coins >= self.data.goal)

    @vf.reward
    async def reached(self, trace: vf.Trace) -> float:
        return float(trace.state.coins == self.data.goal)

    @vf.reward(weight=0.5)
    async def told(self, trace: vf.Trace) -> float:
        return float("done" in trace.last_reply)

    @vf.reward(weight=0.01)
    async def calls(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        assert len(trace.assistant_messages) == 1 + len(trace.tool_messages)
        return float(sum(len(message.tool_calls or []) for message in trace.assistant_messages))
