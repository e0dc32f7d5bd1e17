"""Section `task`: what the policy is asked, how its answer is read, and what earns a reward."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.choices import AnswerKind, PromptKind, RewardName
from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class RewardTermConfig:
    """A reward of the task, and its part in the sum."""

    function: str
    """Reward by name (published, arpo_f1, search_r1_em, em, f1, math, format), or a function of your own as
    package.module:function or path/to/file.py:function."""
    weight: float = 1.0
    """Factor of the reward in the sum."""
    name: str | None = None
    """Name in the metrics; none: the function's."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of a function of your own."""
    on_error: Literal["stop", "fail"] = "stop"
    """What follows where a function raises, takes too long or returns no finite number. stop: the run ends with an
    error that names the trajectory. fail: the trajectory earns `failed_value`."""
    failed_value: float = 0.0
    """Reward of a trajectory on which the function failed, with on_error: fail."""
    concurrency: int | None = Field(default=None, ge=1)
    """Number of calls of an async function that run at once; none: 16."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """Longest time of a call of an async function; none: 120."""


def _as_term(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError('write a template that begins with a brace in quotes: "{question}"')
    return value


Template = Annotated[str, BeforeValidator(_quoted)]
RewardEntry = Annotated[RewardTermConfig, BeforeValidator(_as_term)]


@dataclass(config=STRICT, kw_only=True)
class TaskConfig:
    """Prompt, answer and rewards: in these keys, or in a Python file of your own."""

    file: str | None = None
    """Definition of the task in Python: path/to/task.py (relative to the working directory) or package.module, with
    :NAME behind it where the definition is not called TASK. It takes the place of the other keys."""
    prompt: PromptKind | None = None
    """Prompt of a question. published: the AT2PO system prompt. short: the bare question, for models trained from
    scratch. messages: the chat of the data's own record. None: `system` and `user` where they are given, else
    published."""
    system: Template | None = None
    """Template of the system message of a prompt of your own; {question} and {tools} are filled in."""
    user: Template | None = None
    """Template of the user message of a prompt of your own, likewise; none, with `system`: {question}."""
    answer: str = "boxed"
    """Part of the text that is the answer. boxed: the last box in the answer tags. tag: all of the last answer tags.
    last_line: the last line. hashes: what follows the last ####. Or a function from the text to the answer, or None,
    as package.module:function or path/to/file.py:function."""
    rewards: list[RewardEntry] = Field(default_factory=lambda: [RewardTermConfig(function="published")])
    """Rewards, whose weighted sum a trajectory earns; an entry may be a name alone."""

    def __post_init__(self) -> None:
        others = [name for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        if self.file is not None and others:
            raise ValueError(
                f"task.file={self.file} defines the whole task: leave out {', '.join(f'task.{n}' for n in others)}"
            )
        own = self.system is not None or self.user is not None
        if own and self.prompt is not None:
            raise ValueError(f"task.prompt={self.prompt} has no templates: leave it out, or task.system and task.user")
        if own and "{question}" not in (self.system or "") + self.own_user:
            raise ValueError("task.user and task.system lack the question: write {question} where it belongs")
        _check_name("task.answer", self.answer, get_args(AnswerKind))
        if not self.rewards:
            raise ValueError("task.rewards is empty: name at least one reward")
        for term in self.rewards:
            _check_name("task.rewards: function", term.function, get_args(RewardName))

    @property
    def own_user(self) -> str:
        """Template of the user message of a prompt of the user's own."""
        return "{question}" if self.user is None else self.user


def _check_name(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names and ":" not in value:
        raise ValueError(f"{key}={value!r}: must be one of {', '.join(names)}, or package.module:function")


_DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "system": None,
    "user": None,
    "answer": "boxed",
    "rewards": [RewardTermConfig(function="published")],
}
