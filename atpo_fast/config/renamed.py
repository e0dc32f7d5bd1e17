"""Keys and values that had another name before version 0.2.0. They are refused, with the new name."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "credit.k": "credit.pass_at_k",
    "data.prompt": "task.prompt",
    "rollout.cache_dtype": "engine.cache_dtype",
    "rollout.cache_tokens": "engine.cache_tokens",
    "rollout.engine": "engine.name",
    "rollout.server": "engine",
    "rollout.vllm": "engine",
    "sft": "cold_start",
    "tools.names": "tools.builtin",
    "tools.workers": "tools.calls_per_tool",
    "train.max_tokens": "train.row_tokens",
    "world.test_questions": "world.eval_questions",
}
"""Old name -> new name, of keys and of whole sections."""

OLD_SECTIONS = frozenset({"rollout.server", "rollout.vllm", "sft"})
"""Those of `RENAMED` that were sections."""

RENAMED_VALUES = {
    "engine.name": {"transformers": "paged"},
    "objective.clip": {"dual": "hard, together with objective.dual_cap=3 (a cap beside any clip)"},
}
"""Key -> old value -> new value."""

_TOGETHER_WITH = {"rollout.server": "engine.name=server", "rollout.vllm": "engine.name=vllm"}


def new_name(name: str, value: Any) -> str | None:
    """Say what an old key is called now, in words; None for a key that is not an old one."""
    old = next((old for old in RENAMED if name == old or name.startswith(f"{old}.")), None)
    if old is None:
        return None
    new = RENAMED[old] + name.removeprefix(old)
    words = f"{name} is now {new}"
    if old in _TOGETHER_WITH:
        return f"{words}, together with {_TOGETHER_WITH[old]}"
    other = new_value(new, value)
    return words if other is None else f"{words}, and its value {value} is now {other}"


def new_value(name: str, value: Any) -> str | None:
    """Return what a value of a key is called now; None for a value that is not an old one."""
    return RENAMED_VALUES.get(name, {}).get(value) if isinstance(value, str) else None
