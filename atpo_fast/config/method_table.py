"""The table of the methods, for `atpo-fast methods` and the documentation: one row each, from what the method sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from atpo_fast.common.presets import PRESETS
from atpo_fast.config.methods import METHODS, Method

HEADINGS = ("method", "rollout", "credit", "ratio", "clip", "average", "KL", "further")


def method_rows() -> list[tuple[str, ...]]:
    """Return a row of cells for each method, in the order of `HEADINGS`."""
    return [_row(method) for method in METHODS.values()]


def _row(method: Method) -> tuple[str, ...]:
    preset = PRESETS[method.objective]
    kl = f"{preset['kl']} {preset['kl_coef']:g}" if "kl" in preset else "-"
    return (
        method.name,
        method.rollout,
        method.credit,
        preset["level"],
        _clip(preset),
        preset["aggregation"],
        kl,
        ", ".join(_further(method, preset)) or "-",
    )


def _clip(preset: Mapping[str, Any]) -> str:
    """Say how the ratio is bounded."""
    if preset["clip"] == "sapo":
        return f"sapo {preset['sapo_tau_pos']:g}/{preset['sapo_tau_neg']:g}"
    below = "-" if preset["clip"] == "cispo" else f"{preset['clip_low']:g}"
    cap = f", dual {preset['dual_cap']:g}" if "dual_cap" in preset else ""
    return f"{preset['clip']} {below}/{preset['clip_high']:g}{cap}"


def _further(method: Method, preset: Mapping[str, Any]) -> Iterator[str]:
    """Yield what else a method sets."""
    for name in ("entropy_advantage", "entropy_coef"):
        if name in preset:
            yield f"{name}={preset[name]:g}"
    for name, value in method.more.items():
        yield f"{name}={value}"
