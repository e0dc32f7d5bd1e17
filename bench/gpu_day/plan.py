"""The stages of the calls of a day on a GPU, with the seconds that each may take.

A call is one start of the machine. Call "a" finds out whether everything works and how fast ours is; call "b" how fast
its peers and candidates for faster kernels are; call "c", for time that is left, trains. Together with the starts of
two machines, calls a and b fit into `TOTAL` seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.attention.cases import HEADS, ROWS, STAR, WINDOWS, AttentionCase, windows_beside_full
from bench.core.case import Case
from bench.head.cases import LARGE, MAIN, TOKENS, HeadCase
from bench.update.cases import OVERLAPS, ModelCase

TOTAL, START = 880.0, 90.0  # seconds of all that must fit, and of one start of a machine
Call = Literal["a", "b", "c"]
Kind = Literal["cases", "probe", "tests", "example"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Something to run in a process of its own."""

    call: Call
    name: str
    limit: float
    """Seconds after which it is stopped."""
    kind: Kind
    """"cases" of `python -m bench`, a "probe" of `probes.py`, "tests" by pytest, an "example"."""
    about: str
    """What it is for, in a few words."""
    cases: tuple[Case, ...] = ()
    implementations: tuple[str, ...] = ()
    """Of the cases, all if none is named; those that a case does not have are left out."""
    seconds: float = 0.3
    """Seconds of samples per implementation."""
    arguments: tuple[str, ...] = ()
    """Of tests and examples."""


_TURN = HeadCase(operator="linear_turn_policy_loss", mode="gradient", shape=MAIN)
_FORWARD = replace(_TURN, operator="linear_logprob", mode="forward")
_LOSS = HeadCase(operator="turn_policy_loss", mode="gradient", shape=(TOKENS,), dtype="float32")
_LOSSES = (_LOSS, replace(_LOSS, shape=(16, TOKENS // 16)), *(replace(_LOSS, turn_length=x) for x in (16, 256, 1024)))
_ATTENTION = tuple(AttentionCase(row_tokens=tokens, heads=HEADS["qwen3-4b"]) for tokens in ROWS)
_STAR = replace(_ATTENTION[0], row_tokens=STAR, tree="star")


def _update(model: str, overlap: float | None = None, **more: Any) -> ModelCase:
    scale = 1.0 if overlap is None else OVERLAPS[overlap]
    case = ModelCase(model=f"qwen3-{model}", overlap=overlap, scale=scale, max_tokens=65536, checkpointing="layer")
    return replace(case, **more)


_FLAT = ("ours", "flat_varlen")
_GPU_TESTS = ("tests/kernels/test_shipped_tiles.py", "-m", "gpu")
_KERNEL_TESTS = ("tests/kernels", "-k", "triton and not random and not offsets_beyond")

STAGES = (
    Stage(call="a", name="environment", limit=15, kind="probe", about="versions, the GPU, its clocks and memory"),
    Stage(
        call="a", name="smoke", limit=50, kind="tests", about="every shipped tile at odd shapes, against float64",
        arguments=_GPU_TESTS,
    ),
    Stage(call="a", name="kernel_tests", limit=60, kind="tests", about="tests of the kernels", arguments=_KERNEL_TESTS),
    Stage(call="a", name="ceilings", limit=20, kind="probe", about="a copy, and products of the head's sizes"),
    Stage(
        call="a", name="head", limit=50, kind="cases", about="the fused head beside its three products",
        cases=(_TURN, _FORWARD, replace(_TURN, clipped=0.5), replace(_TURN, shape=(MAIN[0] // 2, *MAIN[1:]))),
        implementations=("ours",),
    ),
    Stage(call="a", name="profile", limit=20, kind="probe", about="the fused head, kernel by kernel"),
    Stage(
        call="a", name="turn_losses", limit=20, kind="cases", about="the loss on given log-probs",
        cases=_LOSSES, implementations=("ours", "plain"), seconds=0.1,
    ),
    Stage(
        call="a", name="attention", limit=50, kind="cases", about="attention beside a causal yardstick, over windows",
        cases=(*_ATTENTION, replace(_ATTENTION[1], mode="forward"), windows_beside_full(_ATTENTION[1])),
        implementations=("ours", "causal", *WINDOWS),
    ),
    Stage(
        call="a", name="update", limit=40, kind="cases", about="a whole update at 1.7B, published settings",
        cases=(_update("1.7b"),), implementations=_FLAT,
    ),
    Stage(call="b", name="environment_b", limit=15, kind="probe", about="versions and the GPU, again"),
    Stage(
        call="b", name="flex", limit=90, kind="cases", about="attention against FlexAttention and FlashAttention 3",
        cases=(*_ATTENTION, _STAR), implementations=("ours", "causal", "flex", "flex_flash", "causal_fa3"),
    ),
    Stage(
        call="b", name="head_peers", limit=80, kind="cases", about="the fused head against its peers",
        cases=(_TURN, replace(_TURN, shape=LARGE), _FORWARD),
        implementations=(
            "ours", "plain", "compiled", "trl", "cce", "liger_scaled_ce", "liger_grpo", "liger_grpo_triton",
        ),
    ),
    Stage(
        call="b", name="candidates", limit=65, kind="cases", about="other tiles and chunks of our kernels",
        cases=(
            replace(_TURN, variant="chunks"), replace(_TURN, variant="kernels"), replace(_FORWARD, variant="kernels"),
            replace(_ATTENTION[1], variant="kernels"),
        ),
    ),
    Stage(
        call="b", name="updates", limit=120, kind="cases", about="whole updates, trees against flat rows",
        cases=(
            _update("4b"), _update("4b", clipped=0.5), _update("1.7b", 0.36), _update("1.7b", 0.8), _update("0.6b"),
            _update("1.7b", checkpointing="mlp"),
        ),
        implementations=(*_FLAT, "flat_varlen_full_head", "none_clipped"),
    ),
    Stage(
        call="c", name="training", limit=100, kind="example", about="trains in the embedded world on the GPU's paths",
        arguments=("examples/minimal_at2po.py", "--cold-start-steps", "100", "--steps", "10"),
    ),
)  # fmt: skip


def stages(calls: Iterable[str]) -> list[Stage]:
    """List the stages of some calls in order."""
    wanted = set(calls)
    return [stage for stage in STAGES if stage.call in wanted]


def limit_of(calls: Iterable[str]) -> float:
    """Add up the limits of the stages of some calls."""
    return sum(stage.limit for stage in stages(calls))


def describe() -> list[str]:
    """Write the plan: every stage with its limit, and the sum with the starts of two machines."""
    lines = [f"{stage.call}  {stage.limit:4.0f} s  {stage.name:14s} {stage.about}" for stage in STAGES]
    parts = f"{START:.0f} + {limit_of('a'):.0f} + {START:.0f} + {limit_of('b'):.0f}"
    total = 2 * START + limit_of("ab")
    return [*lines, f"calls a and b, each with the start of a machine: {parts} = {total:.0f} s of {TOTAL:.0f} s"]
