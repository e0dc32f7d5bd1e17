"""An environment of verifiers before 0.3, as `verifiers.load_environment` finds it: by the name of this module."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset


class Guessing(vf.MultiTurnEnv):
    """Guess a number in three turns; each guess has a reward of its own."""

    async def setup_state(self, state: Any) -> Any:
        state["guesses"] = []
        return state

    async def add_trajectory_step(self, state: Any, trajectory_step: Any) -> None:
        trajectory_step["reward"] = -0.1
        await super().add_trajectory_step(state, trajectory_step)

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        state["guesses"].append(messages[-1].content)
        text = f"guess {len(state['guesses'])} is wrong"
        if messages[-1].content == state["answer"]:
            text = "right"
            state["final_env_response"] = [{"role": "user", "content": text}]
        return [{"role": "user", "content": text}]


def double(number: int) -> str:
    """Double a number.

    Args:
        number: what to double
    """
    return str(2 * number)


async def right(completion: Any, answer: str) -> float:
    return float(completion[-1].content in ("right", answer))


async def turns(state: Any) -> float:
    return 0.01 * len(state["trajectory"])


def load_environment(kind: str = "guess") -> vf.Environment:
    prompt = [{"role": "system", "content": "Guess."}, {"role": "user", "content": "A number."}]
    rows = Dataset.from_list([{"prompt": prompt, "answer": str(number)} for number in (3, 6)])
    rubric = vf.Rubric(funcs=[right, turns])
    if kind == "tools":
        return vf.ToolEnv(tools=[double], dataset=rows, rubric=rubric)
    return Guessing(dataset=rows, rubric=rubric, max_turns=3)
