"""The definition of a task: what the policy is asked, how its answer is read, and what earns a reward.

It comes from the section `task`, or from a Python file of the user's own that defines `TASK`:

    from atpo_fast.task import Prompt, TaskDefinition

    def right(trajectory):
        return float(trajectory.answer == trajectory.question.answers[0])

    TASK = TaskDefinition(prompt=Prompt(user="{question} Write #### and the number."), answer="hashes", rewards=[right])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_fast.common.choices import PromptKind
from atpo_fast.common.errors import ConfigError
from atpo_fast.config import TaskConfig, as_dict
from atpo_fast.data.prompts import PROMPTS, Prompt
from atpo_fast.environment.extraction import EXTRACTIONS, Extraction, extraction_by
from atpo_fast.environment.own_code import load_own
from atpo_fast.environment.rewards import RewardTerm

RewardLike = RewardTerm | str | Callable[..., Any] | tuple[str | Callable[..., Any], float]
_NAME = "TASK"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDefinition:
    """What a task consists of beside its data; without arguments, the published task.

    Attributes:
        prompt: templates of the messages, or the name of a prompt: published, short, messages.
        answer: how the answer is read: boxed, tag, last_line, hashes, or a function of the text that returns the
            answer or None.
        rewards: rewards that are added up: names, functions, pairs of one of these and a weight, or `RewardTerm`s.
    """

    prompt: Prompt | PromptKind = "published"
    answer: str | Callable[[str], str | None] = "boxed"
    rewards: Sequence[RewardLike] = ("published",)

    @property
    def templates(self) -> Prompt:
        """Templates of the messages. Raises ConfigError for a name that no prompt has."""
        if isinstance(self.prompt, Prompt):
            return self.prompt
        if self.prompt not in PROMPTS:
            raise ConfigError(f"prompt={self.prompt!r}: must be a Prompt, or one of {', '.join(PROMPTS)}")
        return PROMPTS[self.prompt]

    @property
    def extraction(self) -> Extraction:
        """Way in which the answer is read. Raises ConfigError for what is none."""
        answer = load_own(self.answer, "task.answer") if _is_path(self.answer) else self.answer
        if isinstance(answer, str) and answer in EXTRACTIONS:
            return EXTRACTIONS[answer]  # type: ignore[index]
        if not callable(answer):
            raise ConfigError(f"answer={answer!r}: must be a function of the text, or one of {', '.join(EXTRACTIONS)}")
        try:
            inspect.signature(answer).bind("")
        except (TypeError, ValueError):
            taken = inspect.signature(answer)
            raise ConfigError(f"answer={answer!r}: takes {taken}, and is given the text alone") from None
        return extraction_by(answer)

    @property
    def terms(self) -> list[RewardTerm]:
        """Rewards as `RewardTerm`s."""
        return [_term(reward) for reward in self.rewards]


def load_definition(config: TaskConfig) -> TaskDefinition:
    """Return the definition that a configuration gives or names.

    Raises:
        ConfigError: the Python file or module is not there, fails, or holds no definition.
    """
    if config.file is not None:
        found = load_own(config.file, "task.file", default=_NAME)
        if not isinstance(found, TaskDefinition):
            raise ConfigError(f"task.file={config.file}: holds {type(found).__name__}, and not a TaskDefinition")
        return found
    prompt: Prompt | PromptKind = config.prompt or "published"
    if config.system is not None or config.user is not None:
        prompt = Prompt(system=config.system or "", user=config.own_user)
    return TaskDefinition(
        prompt=prompt, answer=config.answer, rewards=[RewardTerm(**as_dict(term)) for term in config.rewards]
    )


def _is_path(answer: object) -> bool:
    return isinstance(answer, str) and ":" in answer


def _term(reward: RewardLike) -> RewardTerm:
    if isinstance(reward, RewardTerm):
        return reward
    if isinstance(reward, tuple):
        function, weight = reward
        return RewardTerm(function=function, weight=float(weight))
    return RewardTerm(function=reward)
