"""Rewards as other trainers call them, unchanged: one of verl, one of TRL, and an asynchronous one for an LLM judge."""

from __future__ import annotations

import asyncio
from typing import Any

from atpo_fast.task import Trajectory


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> float:
    """Return 1 where the solution begins with the number; as verl calls rewards, with the record's columns."""
    return float(solution_str.strip().startswith(ground_truth))


def accuracy(completions: list[list[dict[str, str]]], solution: list[str], **columns: Any) -> list[float]:
    """Return 1 for each reply that is the solution; as TRL calls rewards, with conversations and columns."""
    return [float(reply[0]["content"].strip() == right) for reply, right in zip(completions, solution, strict=True)]


async def judge(trajectory: Trajectory, patience: float = 0.0) -> float:
    """Return what a judge says; here it only likes short replies, where a request to a server would stand."""
    await asyncio.sleep(patience)
    return 1 / (1 + len(trajectory.response))
