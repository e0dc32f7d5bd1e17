"""Recognise a reward function by its signature, and call it as it expects to be called.

| written for | signature | called for |
|---|---|---|
| atpo_fast | `reward(trajectory) -> float` | each trajectory |
| TRL | `reward(completions, prompts=…, **columns) -> list[float]` | all trajectories of a search tree |
| verl | `compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float` | each trajectory |

Each may be async, and may return a dictionary with the key `score` in the place of a number. Arguments are given by
name, and only those that the function takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atpo_fast.common.errors import ConfigError
from atpo_fast.data.questions import Question
from atpo_fast.environment.function_tool import is_async
from atpo_fast.environment.rewards.trajectory import Trajectory

Style = Literal["atpo_fast", "trl", "verl"]

_VERL = ("data_source", "solution_str", "ground_truth")
_GIVEN: Mapping[Style, tuple[str, ...]] = {
    "atpo_fast": ("trajectory",),
    "trl": ("prompts", "completions", "completion_ids"),
    "verl": (*_VERL, "extra_info"),
}
_FORMS = (
    "reward(trajectory) -> float; as in TRL reward(completions, prompts=..., **columns) -> list[float]; or as in verl "
    "compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a reward function takes.

    Attributes:
        style: for which trainer it is written.
        names: names of its parameters.
        required: those without a default.
        takes_any: whether it takes further ones (`**columns`).
        is_async: whether its calls give coroutines.
    """

    style: Style
    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool
    is_async: bool

    def accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that the function takes."""
        return {name: value for name, value in arguments.items() if self.takes_any or name in self.names}

    def columns(self, arguments: Collection[str]) -> list[str]:
        """Return the columns of the data that a function in TRL's style cannot do without."""
        if self.style != "trl":
            return []
        return [name for name in self.required if name not in _GIVEN["trl"] and name not in arguments]


def read_signature(function: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Signature:
    """Recognise a reward function that is called with `arguments` beside what it is given.

    Raises:
        ConfigError: it fits none of the styles; the message begins with `where`.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: has no signature that could be read ({error}); expected {_FORMS}") from error
    variadic = {parameter.kind for parameter in parameters} & {inspect.Parameter.VAR_KEYWORD}
    named = [p for p in parameters if p.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)]
    style = _style(tuple(parameter.name for parameter in named))
    shown = f"{where}: its signature is {inspect.signature(function)}"
    if style is None:
        raise ConfigError(f"{shown}; expected {_FORMS}")
    signature = Signature(
        style=style,
        names=tuple(parameter.name for parameter in named),
        required=tuple(parameter.name for parameter in named if parameter.default is inspect.Parameter.empty),
        takes_any=bool(variadic),
        is_async=is_async(inspect.unwrap(function)) or is_async(getattr(function, "func", function)),
    )
    positional = [p.name for p in named if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    if positional:
        raise ConfigError(f"{shown}, but arguments are given by name: take the / out of it")
    missing = [name for name in signature.required if name not in _GIVEN[style] and name not in arguments]
    if missing and style != "trl":  # there they are columns of the data, which are not known yet
        raise ConfigError(f"{shown}, and nothing gives it {', '.join(missing)}: set `arguments`, or give a default")
    unknown = [name for name in arguments if not signature.takes_any and name not in signature.names]
    if unknown:
        raise ConfigError(f"{shown}, which does not take {', '.join(unknown)} of `arguments`")
    return signature


def calls(
    signature: Signature, groups: Sequence[Sequence[Trajectory]]
) -> Iterator[tuple[list[Trajectory], dict[str, Any]]]:
    """Yield (trajectories, keyword arguments) of each call that scores the trajectories of search trees."""
    for group in groups:
        if signature.style == "trl" and group:
            yield list(group), signature.accepted(_for_trl(group))
            continue
        for trajectory in group:
            given = {"trajectory": trajectory} if signature.style == "atpo_fast" else _for_verl(trajectory)
            yield [trajectory], signature.accepted(given)


def columns_of(question: Question) -> dict[str, Any]:
    """Return what a function in TRL's style may ask for by name: the record's columns, and question and answers."""
    record = {name: value for name, value in question.record.items() if name not in ("prompt", "completion")}
    return {"question": question.text, "answers": list(question.answers)} | record


def _style(names: tuple[str, ...]) -> Style | None:
    if all(name in names for name in _VERL):
        return "verl"
    if "completions" in names:
        return "trl"
    return "atpo_fast" if "trajectory" in names else None


def _for_trl(group: Sequence[Trajectory]) -> dict[str, Any]:
    """Return TRL's arguments: conversations where the record's prompt is one, texts otherwise."""
    question = group[0].question
    chat = bool(question.messages)
    columns = {name: [value] * len(group) for name, value in columns_of(question).items()}
    return columns | {
        "prompts": [list(question.messages) if chat else question.text] * len(group),
        "completions": [[{"role": "assistant", "content": t.response}] if chat else t.response for t in group],
        "completion_ids": [t.token_ids.tolist() for t in group],
    }


def _for_verl(trajectory: Trajectory) -> dict[str, Any]:
    """Return verl's arguments; a record without a ground truth has its accepted answers, or the only one, as such."""
    question = trajectory.question
    answers: Any = list(question.answers) if len(question.answers) != 1 else question.answers[0]
    rule = question.record.get("reward_model")
    truth = rule.get("ground_truth") if isinstance(rule, dict) else None
    return {
        "data_source": question.record.get("data_source") or question.source,
        "solution_str": trajectory.response,
        "ground_truth": answers if truth is None else truth,
        "extra_info": question.record.get("extra_info") or {},
    }
