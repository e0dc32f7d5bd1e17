"""What the adapters share: importing their packages, reading records, texts of observations and schemas of tools."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

from atpo_fast.common.errors import ConfigError


def package(name: str, install: str, submodule: str = "") -> ModuleType:
    """Import a package of another project, or a submodule of it.

    Raises:
        ConfigError: it is not installed; `install` is what to give to pip.
    """
    try:
        return importlib.import_module(submodule or name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{submodule or name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"environment.factory: its adapter needs the package {name!r}: pip install {install}"
        ) from error


def column(task: dict[str, Any], name: str) -> Any:
    """Return a column of the question's record. Raises ConfigError where it has none of this name."""
    if name not in task:
        raise ConfigError(
            f"question {task.get('id')!r}: its record has no column {name!r}, which environment.factory needs"
        )
    return task[name]


def as_text(observation: Any) -> str:
    """Return an observation as the policy reads it.

    Text is itself, messages are their contents, a record with a single text is that text, other data is JSON.
    """
    if observation is None or isinstance(observation, str):
        return observation or ""
    if hasattr(observation, "model_dump"):
        observation = observation.model_dump(mode="json")
    if isinstance(observation, dict):
        told = {k: v for k, v in observation.items() if k not in ("reward", "done", "metadata") and v is not None}
        texts = list(told.values())
        return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else json.dumps(told, default=str)
    if isinstance(observation, list | tuple) and all(_is_message(part) for part in observation):
        return "\n".join(as_text(part["content"] if isinstance(part, dict) else part.content) for part in observation)
    return str(observation)


def _is_message(part: Any) -> bool:
    return "content" in part if isinstance(part, dict) else hasattr(part, "content")


def function_schema(name: str, description: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a tool in OpenAI's form; `parameters` is a JSON schema."""
    function = {"name": name, "description": description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def small_seed(seed: int) -> int:
    """Reduce a seed to the 32 bits that NumPy's global generator takes."""
    return seed % 2**32
