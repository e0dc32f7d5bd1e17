"""Where memory and time go: one update of the same trees in four ways, from the record of the bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drawing import AMBER, BLUE, GREEN, MUTED, VIOLET, Drawing

RECORD = "*policy_update-qwen3-20m-published-rows4096-float32.json"
WAYS = [
    ("ours", "trees, fused head"),
    ("flat", "flat rows, fused head"),
    ("flat_full_head", "flat rows, head everywhere"),
    ("flat_padded", "padded batch, plain logits"),
]
PARTS = [("layers", "linear layers", BLUE), ("attention", "attention", VIOLET), ("head", "LM head", AMBER)]


def read_record() -> dict[str, Any]:
    """Read the record that was taken on a CPU."""
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.rglob(RECORD)]
    (record,) = (record for record in records if record["device"].startswith("CPU"))
    return dict(record)


def draw() -> Drawing:
    """Draw memory and time of the recorded update."""
    record = read_record()
    picture = Drawing(1046, 372, "Where memory and time of an update go: trees against flat rows")
    picture.text(24, 38, "What has to be computed", size=15.5, bold=True, anchor="start")
    _work(picture, record)
    picture.text(516, 38, "Measured time", size=15.5, bold=True, anchor="start")
    times = {way: record["implementations"][way]["ms"]["p50"] / 1000 for way, _ in WAYS}
    _bars(picture, 516, 262, times, "{:.1f} s", BLUE)
    picture.text(808, 38, "Measured scratch memory", size=15.5, bold=True, anchor="start")
    scratch = {way: _scratch(record["implementations"][way]) for way, _ in WAYS}
    _bars(picture, 808, 210, scratch, "{:,.0f} MB", GREEN)
    tokens = record["tokens"]
    words = (
        f"One tree of 22 leaves at the published settings, lengths divided by {record['scale']}: {tokens['unique']:,} "
        f"unique of {tokens['flat']:,} flat tokens (overlap {record['overlap_found']:.2f})."
    )
    picture.text(24, 332, words, size=12.5, anchor="start")
    words = (
        f"A Qwen3 of {record['parameters'] / 1e6:.0f} M parameters in {record['dtype']}, one CPU core, torch "
        f"{record['torch']}; forward, loss, backward and AdamW."
    )
    picture.text(24, 352, words, size=12.5, colour=MUTED, anchor="start")
    return picture


def _scratch(run: dict[str, Any]) -> float:
    """Megabytes beyond the inputs and the gradients."""
    return (run["peak_bytes"] - run["gradient_bytes"]) / 1e6


def _work(picture: Drawing, record: dict[str, Any]) -> None:
    """FLOPs of a forward and a backward, by part."""
    flops, rows = record["flops"], record["head_rows"]
    full = flops["flat"] | {"head": flops["flat"]["head"] * record["tokens"]["flat"] / rows["flat"]}
    shown = [
        ("trees, fused head", flops["unique"]),
        ("flat rows, fused head", flops["flat"]),
        ("flat rows, head everywhere", full),
    ]
    most = max(sum(parts.values()) for _, parts in shown)
    for number, (name, parts) in enumerate(shown):
        y = 74 + 66 * number
        picture.text(24, y - 8, name, size=12.5, anchor="start")
        x = 24.0
        for part, _, colour in PARTS:
            width = 390 * parts[part] / most
            picture.box(x, y, width, 24, fill=colour, stroke="white", radius=2)
            x += width
        picture.text(x + 8, y + 17, f"{sum(parts.values()) / 1e12:.2f} TFLOP", size=12, anchor="start")
    x = 24.0
    for _, words, colour in PARTS:
        picture.box(x, 276, 13, 13, fill=colour, stroke="none", radius=2)
        picture.text(x + 19, 287, words, size=12.5, anchor="start")
        x += 40 + 7.2 * len(words)


def _bars(picture: Drawing, x: float, width: float, values: dict[str, float], form: str, colour: str) -> None:
    most = max(values.values())
    for number, (way, name) in enumerate(WAYS):
        y = 74 + 56 * number
        picture.text(x, y - 8, name, size=12.5, anchor="start")
        length = (width - 62) * values[way] / most
        picture.box(x, y, length, 22, fill=colour if way == "ours" else "#b9c2cf", stroke="none", radius=2)
        picture.text(x + length + 8, y + 16, form.format(values[way]), size=12, bold=way == "ours", anchor="start")
