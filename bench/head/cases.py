"""Cases of the head's operators: log-probs, the turn loss, and both fused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bench.core.case import Case, Mode

Operator = Literal["linear_logprob", "linear_turn_policy_loss", "turn_policy_loss"]

PUBLISHED = (
    (4096, 4096, 128256),
    (8192, 4096, 131072),
    (16384, 4096, 131072),
    (8192, 2048, 62080),
    (8192, 2304, 256000),
)
MAIN = (16384, 2560, 151936)  # a mini-batch of Qwen3-4B's action tokens
LARGE = (8192, 4096, 151936)  # of Qwen3-8B's
CPU_RECORD = (2048, 512, 32000)
CPU_SMALL = (1024, 128, 4096)
LOSS_TOKENS, CLIPPED, TURN_LENGTHS = (0.5, 0.25), (0.25, 0.5, 0.75), (16, 256, 1024)
TOKENS = 65536

Variant = Literal["", "chunks", "kernels"]
_PLAIN = ("variant", "")  # not in records

CANDIDATES: dict[Variant, tuple[str, ...]] = {
    "chunks": ("chunks_1664", "chunks_2560", "chunks_3328", "chunks_6144"),
    "kernels": ("specialised", "branch", "prefetch", "strips_64"),
}
"""Our own implementation with one thing changed, by what is changed: see `candidates.py`."""
LOG_PROB_PEERS = ("plain", "trl", "liger_scaled_ce", "cce", "verl", "liger_flce")
ENTROPY_PEERS = ("plain", "trl", "liger_scaled_ce", "verl")


@dataclass(frozen=True, kw_only=True)
class HeadCase(Case):
    """An operator on hidden states or log-probs, and its peers."""

    measured_by: ClassVar[str] = "bench.head.measure"
    operator: Operator
    mode: Mode
    shape: tuple[int, ...]  # (N, D, V); turn_policy_loss: (A,) packed or (B, T)
    dtype: str = "bfloat16"
    peaked: bool = True
    """Logits like a trained model's (one or a few likely tokens), not like random weights'."""
    loss_tokens: float = 1.0
    """Share of the N tokens that carry loss, in whole turns."""
    clipped: float = 0.0
    """Share of the turns that are clipped, that is without gradient."""
    turn_length: int = 64
    variant: Variant = ""
    """Of our own implementation: "chunks" of other sizes, or other "kernels" and tiles; see `candidates.py`."""
    peers: tuple[str, ...] = ("plain",)

    @property
    def bench(self) -> str:
        """Kind of the case's records: the name of the operator."""
        return f"{self.operator}_candidates" if self.variant else self.operator

    def small(self) -> HeadCase:
        """Shrink the shape; turns stay of equal lengths that divide it."""
        shape = {"turn_policy_loss": (1024,) if len(self.shape) == 1 else (4, 1024)}.get(self.operator, (128, 32, 500))
        return replace(self, shape=shape, dtype="float32", turn_length=min(self.turn_length, 16))

    @property
    def name(self) -> str:
        """Operator, mode, shape, and what differs from the defaults."""
        parts = [self.operator, self.mode, "x".join(map(str, self.shape)), self.dtype]
        if self.operator == "turn_policy_loss":
            parts.append("packed" if len(self.shape) == 1 else "padded")
        else:
            parts.append("peaked" if self.peaked else "random")
        for label, value, default in (
            ("loss", self.loss_tokens, 1),
            ("clipped", self.clipped, 0),
            ("turn", self.turn_length, 64),
        ):
            if value != default:
                parts.append(f"{label}{value:g}")
        return "-".join([*parts, *([self.variant] if self.variant else [])])

    def fields(self) -> dict[str, Any]:
        """Return what a record says of the case; `bench` already names the operator."""
        return {key: value for key, value in super().fields().items() if key != "operator" and (key, value) != _PLAIN}


def for_device(kind: str) -> list[HeadCase]:
    """List the cases of "cuda" or "cpu"."""
    return _cuda() if kind == "cuda" else _cpu()


def _cuda() -> list[HeadCase]:
    turn = HeadCase(operator="linear_turn_policy_loss", mode="gradient", shape=MAIN)
    forward = HeadCase(operator="linear_logprob", mode="forward", shape=MAIN)
    everyone = ("compiled", *LOG_PROB_PEERS, "liger_grpo", "liger_grpo_triton")
    must_show = [
        replace(turn, peers=everyone),
        replace(turn, clipped=0.5),
        replace(turn, shape=(MAIN[0] // 2, *MAIN[1:]), peers=()),
        replace(forward, peers=("compiled", *LOG_PROB_PEERS)),
        *_turn_losses(("plain", "published_loop")),
    ]
    rest = [
        replace(forward, mode="gradient", peers=("compiled", *LOG_PROB_PEERS, "quack")),
        replace(forward, mode="entropy_gradient", peers=ENTROPY_PEERS),
        *_sweeps(turn),
        replace(turn, shape=LARGE, peers=everyone),
        *(replace(turn, variant=variant, peers=CANDIDATES[variant]) for variant in CANDIDATES),
        replace(forward, variant="kernels", peers=("specialised", "branch")),
        replace(turn, peaked=False, peers=(*LOG_PROB_PEERS, "liger_grpo")),
        replace(forward, peaked=False, peers=LOG_PROB_PEERS),
        replace(forward, mode="gradient", peaked=False, peers=LOG_PROB_PEERS),
    ]
    for shape in PUBLISHED:
        rest += [
            replace(turn, shape=shape, peers=(*LOG_PROB_PEERS, "liger_grpo")),
            replace(forward, shape=shape, peers=LOG_PROB_PEERS),
            replace(forward, shape=shape, mode="gradient", peers=(*LOG_PROB_PEERS, "quack")),
        ]
    return [replace(case, quick=True) for case in must_show] + rest


def _cpu() -> list[HeadCase]:
    turn = HeadCase(
        operator="linear_turn_policy_loss", mode="gradient", shape=CPU_RECORD, dtype="float32", peaked=False
    )
    forward = replace(turn, operator="linear_logprob", mode="forward")
    small = replace(turn, shape=CPU_SMALL)
    must_show = [
        replace(turn, peers=("plain", "liger_scaled_ce", "liger_grpo")),
        replace(forward, mode="gradient", peers=("plain", "trl", "liger_scaled_ce")),
        *_turn_losses(("plain", "published_loop")),
    ]
    rest = [
        replace(turn, peaked=True),
        replace(forward, peers=("plain", "trl", "liger_scaled_ce")),
        *_sweeps(small),
        replace(small, peaked=True, peers=("plain", "trl", "liger_scaled_ce", "liger_grpo")),
        replace(small, dtype="bfloat16", peaked=True),
        *(
            replace(forward, shape=CPU_SMALL, mode=mode, dtype=dtype, peaked=True, peers=ENTROPY_PEERS[:3])
            for mode in ("forward", "gradient", "entropy_gradient")
            for dtype in ("float32", "bfloat16")
        ),
    ]
    return [replace(case, quick=True) for case in must_show] + rest


def _sweeps(base: HeadCase) -> list[HeadCase]:
    """Make the base case, and cases with one thing changed at a time."""
    return [
        base,
        *(replace(base, clipped=x) for x in CLIPPED),
        *(replace(base, loss_tokens=x) for x in LOSS_TOKENS),
        *(replace(base, turn_length=x) for x in TURN_LENGTHS),
    ]


def _turn_losses(peers: tuple[str, ...]) -> list[HeadCase]:
    base = HeadCase(operator="turn_policy_loss", mode="gradient", shape=(TOKENS,), dtype="float32", peers=peers)
    return [base, replace(base, shape=(16, TOKENS // 16)), *(replace(base, turn_length=x) for x in TURN_LENGTHS)]
