"""What attention over trees and the packed update have to show."""

from __future__ import annotations

from collections.abc import Callable

from attention_cases import HEADS, ROWS
from verdicts import Goals, Record, Records, Verdict, at_least, at_most, implementation, p50, times_ours

SMALL = "qwen3-20m"
_COMPILE_MS = 250  # that a first call at another length may take longer than usual
_HOST = "host_preparation"


def _attention(found: Records) -> list[Record]:
    heads = list(HEADS["qwen3-4b"])
    wanted = {"mode": "gradient", "heads": heads, "dtype": "bfloat16"}
    return [found.find("tree_attention", row_tokens=tokens, **wanted) for tokens in ROWS]


def _each(values: list[float], digits: str = ".2f") -> str:
    return ", ".join(f"{value:{digits}}" for value in values)


def _flex(found: Records) -> Verdict:
    """Against the faster way to compile it."""
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


def _update(found: Records, model: str, overlap: float | None = None, clipped: float = 0.0) -> Record:
    rows = 4096 if model == SMALL else 65536
    wanted = {"model": model, "overlap": overlap, "clipped": clipped, "max_tokens": rows}
    on_gpu = {} if model == SMALL else {"checkpointing": "layer"}
    return found.find("policy_update", **wanted | on_gpu)


def _best(record: Record, names: Callable[[str], bool]) -> tuple[str, float]:
    """The fastest of some implementations and how many times as long as ours it takes."""
    timed = [name for name, entry in record["implementations"].items() if names(name) and "ms" in entry]
    if not timed:
        raise LookupError("no baseline")
    return min(((name, times_ours(record, name)) for name in timed), key=lambda pair: pair[1])


def best_flat(record: Record) -> tuple[str, float]:
    """Of everything that runs on written-out trajectories."""
    return _best(record, lambda name: name.startswith("flat"))


def best_full_head(record: Record) -> tuple[str, float]:
    """Of flat rows whose fused head runs on every position."""
    return _best(record, lambda name: name.endswith("full_head"))


def _against(best: Callable[[Record], tuple[str, float]], model: str, overlap: float | None, limit: float, bound: str):
    def check(found: Records) -> Verdict:
        record = _update(found, model, overlap)
        name, ratio = best(record)
        return Verdict(f"{ratio:.2f}× ({name}; bound {record['bounds'][bound]:.2f}×)", ratio >= limit)

    return check


def _of_bound(best: Callable[[Record], tuple[str, float]], overlap: float | None, bound: str):
    """On a CPU: the share of the bound that is reached."""

    def check(found: Records) -> Verdict:
        record = _update(found, SMALL, overlap)
        name, ratio = best(record)
        most = record["bounds"][bound]
        return Verdict(f"{ratio / most:.2f} ({ratio:.2f}× of {most:.2f}×; {name})", ratio >= 0.8 * most)

    return check


def _clipped(found: Records) -> Verdict:
    record = _update(found, "qwen3-4b", clipped=0.5)
    bounds, ratio = record["bounds"], times_ours(record, "none_clipped")
    kept = f"{100 * bounds['kept']:.0f} % of the tokens stay, bound of the layers {bounds['clipped']:.2f}×"
    return Verdict(f"{ratio:.2f}× ({kept})", ratio >= 1.25)


def _clipped_of_bound(found: Records) -> Verdict:
    record = _update(found, SMALL, clipped=0.5)
    most, ratio = record["bounds"]["clipped"], times_ours(record, "none_clipped")
    return Verdict(f"{ratio / most:.2f} ({ratio:.2f}× of {most:.2f}×)", ratio >= 0.8 * most)


def _mfu(found: Records) -> Verdict:
    """The best of what may be recomputed and how long rows may be."""
    wanted = {"bench": "policy_update", "model": "qwen3-1.7b", "overlap": None, "clipped": 0}
    reached = {}
    for record in found.records:
        mfu = record["implementations"].get("ours", {}).get("mfu")
        if mfu and all(record.get(key) == value for key, value in wanted.items()):
            reached[f"rows of {record['max_tokens']}, checkpointing {record['checkpointing']}"] = mfu["unique"]
    if not reached:
        raise LookupError("mfu")
    best = max(reached, key=reached.__getitem__)
    return at_least(100 * reached[best], 45, f" % ({best})", ".1f")


def _host(found: Records) -> Verdict:
    return at_most(p50(implementation(found.find(_HOST), "ours")), 150, "ms")


def _host_share(found: Records) -> Verdict:
    """Of an update of the same 64 trees, at the time a token that the published forest takes."""
    host, update = found.find(_HOST), _update(found, "qwen3-4b")
    a_token = p50(implementation(update, "ours")) / update["tokens"]["unique"]
    share = p50(implementation(host, "ours")) / (a_token * host["tokens"]["unique"])
    return Verdict(f"{100 * share:.2f} %", share < 0.01)


_ROWS = "tree attention forward + backward, rows of 16k, 32k and 64k tokens, 22-leaf trees"
GPU: Goals = {
    f"{_ROWS}: at least 1.2× compiled FlexAttention with a proper BlockMask (H200)": _flex,
    f"{_ROWS}: at least 85 % of FlashAttention's FLOP rate (causal), on visible pairs": _flash,
    f"{_ROWS}: no compile per shape": _no_compile,
    "whole update at 36 % overlap: at least 1.45× the best flat baseline (bound 1.56×)": _against(
        best_flat, "qwen3-1.7b", 0.36, 1.45, "tokens"
    ),
    "whole update at 80 % overlap: at least 4× the best flat baseline (bound 5×)": _against(
        best_flat, "qwen3-1.7b", 0.8, 4, "tokens"
    ),
    "whole update, published settings, 4B shape: at least 1.7× flat rows with a full-row fused head": _against(
        best_full_head, "qwen3-4b", None, 1.7, "full_head"
    ),
    "whole update, published settings, 0.6B shape: at least 1.9× flat rows with a full-row fused head": _against(
        best_full_head, "qwen3-0.6b", None, 1.9, "full_head"
    ),
    "whole update, half of the turns clipped: at least 1.25× faster again": _clipped,
    "whole update: MFU on unique tokens at least 45 % for the 1.7B shape": _mfu,
    "host preparation of 64 trees × 22 leaves (3,000 tokens each) at most 150 ms": _host,
    "host preparation less than 1 % of the update at 4B": _host_share,
}
_SMALL = "whole update of a 20 M-parameter model"
CPU: Goals = {
    f"{_SMALL} at 36 % overlap, best flat baseline: at least 0.8 of the bound": _of_bound(best_flat, 0.36, "tokens"),
    f"{_SMALL} at 80 % overlap, best flat baseline: at least 0.8 of the bound": _of_bound(best_flat, 0.8, "tokens"),
    f"{_SMALL}, published settings, full-row fused head: at least 0.8 of the bound": _of_bound(
        best_full_head, None, "full_head"
    ),
    f"{_SMALL}, half of the turns clipped: at least 0.8 of the bound": _clipped_of_bound,
    "host preparation of 64 trees × 22 leaves (3,000 tokens each) at most 150 ms": _host,
}
