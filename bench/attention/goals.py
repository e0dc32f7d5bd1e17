"""Goals of attention over trees."""

from __future__ import annotations

from bench.attention.cases import HEADS, ROWS
from bench.core.verdicts import Goals, Record, Records, Verdict, implementation, p50, times_ours

_COMPILE_MS = 250  # that a first call at another length may take longer than usual


def _attention(found: Records) -> list[Record]:
    heads = list(HEADS["qwen3-4b"])
    wanted = {"mode": "gradient", "heads": heads, "dtype": "bfloat16"}
    return [found.find("tree_attention", row_tokens=tokens, **wanted) for tokens in ROWS]


def _each(values: list[float], digits: str = ".2f") -> str:
    return ", ".join(f"{value:{digits}}" for value in values)


def _flex(found: Records) -> Verdict:
    """Compare with the faster of the two ways to compile FlexAttention."""
    ratios = []
    for record in _attention(found):
        timed = [name for name in ("flex", "flex_static") if "ms" in record["implementations"].get(name, {})]
        if not timed:
            raise LookupError("flex")
        ratios.append(min(times_ours(record, name) for name in timed))
    return Verdict(f"{_each(ratios)}×", min(ratios) >= 1.2)


def _flash(found: Records) -> Verdict:
    shares = []
    for record in _attention(found):
        ours, flash = (implementation(record, name)["tflops"] for name in ("ours", "causal"))
        shares.append(100 * ours / flash)
    return Verdict(f"{_each(shares, '.0f')} %", min(shares) >= 85)


def _no_compile(found: Records) -> Verdict:
    entries = [implementation(record, "ours") for record in _attention(found)]
    later = [entry["other_length_ms"] - p50(entry) for entry in entries]
    return Verdict(f"first call at another length: {_each(later, '.0f')} ms more", max(later) <= _COMPILE_MS)


_ROWS = "tree attention forward + backward, rows of 16k, 32k and 64k tokens, 22-leaf trees"
_FLASH_2 = f"{_ROWS}: at least 85 % of the FLOP rate of FlashAttention 2 (causal, by PyTorch's SDPA), on visible pairs"
EXPECTED = {
    _FLASH_2: "likely at 64k, close at 16k: 260-360 TFLOP/s expected against 300-320. FlashAttention 3 has 560-600 on "
    "Hopper, of which this is 50-60 %",
}
"""What is expected of goals that nobody has measured, by arithmetic."""
GPU: Goals = {
    f"{_ROWS}: at least 1.2× compiled FlexAttention with a proper BlockMask (H200)": _flex,
    _FLASH_2: _flash,
    f"{_ROWS}: no compile per shape": _no_compile,
}
