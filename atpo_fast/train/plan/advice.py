"""What to change so that a run fits the memory of its devices, in the order of what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atpo_fast.config import Config, ServerConfig, read_deepspeed
from atpo_fast.config.arithmetic import longest_path
from atpo_fast.train.plan.memory import PHASES, MemoryPlan

_ROOM = 0.92  # share of a device's memory to plan for; the rest is for the driver, libraries and fragmentation
_FOLDER = Path("configs/deepspeed")


@dataclass(frozen=True, slots=True)
class Advice:
    """Changes of the configuration after which a run fits, and the plan with them; `plan` is None where none do."""

    changes: tuple[str, ...]
    plan: MemoryPlan | None


def fits(plan: MemoryPlan, memory: float) -> bool:
    """Tell whether a plan fits a device of so many bytes."""
    return plan.peak <= memory * _ROOM


def advise(config: Config, plan: Callable[[Config], MemoryPlan], memory: float) -> Advice:
    """Find changes, each on top of those before it, with which a run fits a device of so many bytes.

    A change is kept where some phase of a step that is too large becomes smaller by it.
    """
    kept: dict[str, str] = {}
    found = plan(config)
    for name, value, change in _changes(config):
        if fits(found, memory):
            break
        changed = change(config)
        new = plan(changed)
        if _excess(new, memory) < _excess(found, memory):
            config, found = changed, new
            kept[name] = f"{name}={value}"
    return Advice(tuple(kept.values()), found if fits(found, memory) else None)


def _excess(plan: MemoryPlan, memory: float) -> float:
    """Add up by how much the phases of a step are too large."""
    return sum(max(0.0, plan.during(phase) - memory * _ROOM) for phase in PHASES)


def _changes(config: Config) -> Iterator[tuple[str, Any, Callable[[Config], Config]]]:
    """Yield (key, value, what sets it in a configuration), the cheapest first."""
    if config.model.gradient_checkpointing != "layer":
        yield "model.gradient_checkpointing", "layer", _setter("model", "gradient_checkpointing", "layer")
    given = read_deepspeed(config)
    stage = int(given.get("zero_optimization", {}).get("stage", 0))
    for name in ("zero1", "zero2", "zero3"):
        if int(name[-1]) > stage and not _offloads(given):
            yield from _other_file(name)
    longest = longest_path(config)
    for rows in _halved(config.train.row_tokens, max(2048, longest)):
        yield "train.row_tokens", rows, _setter("train", "row_tokens", rows)
    if not isinstance(config.engine, ServerConfig):
        for tokens in _halved(config.engine.cache_tokens, 4 * longest):
            yield "engine.cache_tokens", tokens, _setter("engine", "cache_tokens", tokens)
    for name in ("zero3_offload_optimizer", "zero3_offload"):
        if not _offloads(given) >= _offloads(_read(name)):
            yield from _other_file(name)


def _setter(section: str, key: str, value: Any) -> Callable[[Config], Config]:
    """Return what sets a key of a section."""

    def change(config: Config) -> Config:
        changed: dict[str, Any] = {section: replace(getattr(config, section), **{key: value})}
        return replace(config, **changed)

    return change


def _other_file(name: str) -> Iterator[tuple[str, Any, Callable[[Config], Config]]]:
    """Yield the change to a DeepSpeed file of this repository, where it is there."""
    path = str(_FOLDER / f"{name}.json")
    if _read(name):
        yield "deepspeed", path, lambda config: replace(config, deepspeed=path)


def _halved(number: int, least: int) -> Iterator[int]:
    """Yield a number's halves, as long as they are not below the least."""
    while number // 2 >= least:
        number //= 2
        yield number


def _read(name: str) -> dict[str, Any]:
    """Read a DeepSpeed file of this repository; empty where it is not there."""
    path = _FOLDER / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _offloads(deepspeed: dict[str, Any]) -> set[str]:
    """Return what a DeepSpeed configuration offloads, as its keys name it."""
    return {name for name in deepspeed.get("zero_optimization", {}) if name.startswith("offload_")}
