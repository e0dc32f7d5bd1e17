"""The plan of a training in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from atpo_fast.common.errors import AtpoError, InputError
from atpo_fast.config import Config
from atpo_fast.train.plan.advice import advise, fits
from atpo_fast.train.plan.memory import PHASES, MemoryPlan, plan_memory, row_token_bytes, trained_parameters
from atpo_fast.train.plan.records import read_measured, step_time
from atpo_fast.train.plan.sizes import ModelSize, model_size
from atpo_fast.train.plan.times import duration, time_line


def cost_lines(config: Config) -> list[str]:
    """Say in three lines what `train` will take; in one, why, where the model's size cannot be told."""
    try:
        size = model_size(config)
    except (AtpoError, OSError, ValueError) as error:
        return [f"time and memory: unknown, because {str(error).splitlines()[0]}"]
    on_gpu = plans_for_gpu(config)
    dtype = dtype_of(config, on_gpu=on_gpu)
    plan = plan_memory(config, size, ranks=config.ranks, dtype=dtype, on_gpu=on_gpu)
    return [
        _model_line(config, size, dtype),
        f"memory of a rank: about {_gb(plan.peak)} in the phase {plan.peak_phase}; `atpo-fast plan` says of what",
        time_line(config, size, dtype=dtype, on_gpu=on_gpu),
    ]


def plan_lines(config: Config, *, ranks: int, memory: float | None, like: Path | None) -> list[str]:
    """Say what a training takes, by component and phase; with the `memory` of a device, whether and how it fits.

    Raises what finding the model raises, and InputError where `like` holds no earlier run.
    """
    size, on_gpu = model_size(config), memory is not None or plans_for_gpu(config)
    dtype = dtype_of(config, on_gpu=on_gpu)
    plan_of = partial(plan_memory, size=size, ranks=ranks, dtype=dtype, on_gpu=on_gpu)
    plan = plan_of(config)
    lines = [_model_line(config, size, dtype), "", *_table(plan, ranks), "", _row_line(config, size, dtype)]
    if like is not None:
        lines.append(_step_line(config, size, ranks, like))
    else:
        lines.append(time_line(config, size, dtype=dtype, on_gpu=on_gpu))
    return lines if memory is None else [*lines, "", *_fit_lines(config, plan_of, memory)]


def _fit_lines(config: Config, plan_of: Callable[[Config], MemoryPlan], memory: float) -> list[str]:
    """Say whether a rank fits a device of so many bytes, what does not, and what to change."""
    plan = plan_of(config)
    if fits(plan, memory):
        return [f"fits {_gb(memory)} a device: {plan.peak / memory:.0%} in the phase {plan.peak_phase}"]
    lines = [f"does NOT fit {_gb(memory)} a device: {_gb(plan.peak)} in the phase {plan.peak_phase}"]
    alone = [part.name for part in plan.components if part.bytes > memory and not part.on_host]
    lines += [f"  too large by itself: {name}" for name in alone]
    advice = advise(config, plan_of, memory)
    changes = " ".join(advice.changes)
    if advice.plan is None:
        tried = f", {changes} included" if changes else ""
        return [*lines, f"no change known here makes it fit{tried}: take more ranks or larger devices"]
    host = max(advice.plan.during(phase, on_host=True) for phase in PHASES)
    return [*lines, f"fits with: {changes}", f"  then {_gb(advice.plan.peak)} a device, {_gb(host)} of the host a rank"]


def plans_for_gpu(config: Config) -> bool:
    """Tell whether the run would use a GPU here."""
    import torch

    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def dtype_of(config: Config, *, on_gpu: bool) -> str:
    """Return the dtype of the model, with `auto` decided."""
    from atpo_fast.policy.model import fast_dtype

    return fast_dtype(cuda=on_gpu) if config.model.dtype == "auto" else config.model.dtype


def parse_memory(text: str) -> float:
    """Read a size such as `80G` (1e9 bytes), `141GB` or `80GiB`. Raises InputError for other text."""
    units = {"GiB": 2**30, "Gi": 2**30, "GB": 1e9, "G": 1e9, "MB": 1e6, "M": 1e6}
    unit = next((unit for unit in units if text.endswith(unit)), None)
    try:
        number = float(text.removesuffix(unit or ""))
        if unit is None or not number > 0:
            raise ValueError
    except ValueError:
        raise InputError(f"--memory={text}: give the memory of a device such as 80G, 141GB or 80GiB") from None
    return number * units[unit]


def _model_line(config: Config, size: ModelSize, dtype: str) -> str:
    rank, trained = config.model.lora.rank, trained_parameters(config, size)
    adapters = f"; trained: LoRA of rank {rank}, up to {trained / 1e6:,.1f} M" if rank else ""
    return f"model: {size.parameters / 1e6:,.1f} M parameters, {dtype}{adapters}"


def _table(plan: MemoryPlan, ranks: int) -> list[str]:
    """Lay out the components by phase, in GB, or in MB where that is enough."""
    unit, scale = ("GB", 1e9) if plan.peak >= 1e10 else ("MB", 1e6)
    labels = [f"{part.name} (host)" if part.on_host else part.name for part in plan.components]
    rows = [
        [_cell(part.bytes / scale) if phase in part.phases else "-" for phase in PHASES] for part in plan.components
    ]
    for label, on_host in (("in all", False), ("in all (host)", True)):
        sums = [plan.during(phase, on_host=on_host) for phase in PHASES]
        if any(sums):
            labels.append(label)
            rows.append([_cell(total / scale) for total in sums])
    head = f"{unit} of each of {max(1, ranks)} ranks"
    first, widths = max(map(len, [head, *labels])), [max(len(phase), 8) for phase in PHASES]
    return [
        name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in zip([head, *labels], [list(PHASES), *rows], strict=True)
    ]


def _cell(number: float) -> str:
    return f"{number:,.1f}"


def _row_line(config: Config, size: ModelSize, dtype: str) -> str:
    token = sum(row_token_bytes(config, size, 2 if dtype == "bfloat16" else 4))
    return f"rows: {config.train.row_tokens} tokens at most, {token / 1e6:.2f} MB of activations a token"


def _step_line(config: Config, size: ModelSize, ranks: int, like: Path) -> str:
    """Say how long a step takes by the record of an earlier run."""
    measured = read_measured(like)
    step = step_time(measured, config, size, max(1, ranks))
    return (
        f"a step: {duration(step.seconds)} (roll-out {duration(step.rollout)}, update {duration(step.update)}), "
        f"{step.trained:,.0f} tokens trained and {step.decoded:,.0f} generated; all {config.train.steps} steps "
        f"{duration(step.seconds * config.train.steps)}. From {measured.steps} steps of {like}, on devices like its"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
