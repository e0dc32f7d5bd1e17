"""The benches of attention: records, and what is judged from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.attention.cases import HEADS, ROWS, AttentionCase
from bench.attention.goals import GPU
from bench.attention.report import SECTION
from bench.core.verdicts import judge


def test_attention_records() -> None:
    """Fails if an implementation attends over other keys, or a record lacks what the report reads."""
    for mode in ("forward", "gradient"):
        peers = ("sdpa", "causal", "window_128")
        small = AttentionCase(row_tokens=300, heads=(4, 2, 16), dtype="float32", mode=mode, peers=peers)
        record = small.measure("cpu", 0.0)
        assert record["tokens"]["unique"] <= 300
        for entry in record["implementations"].values():
            assert all(value < 1e-5 for error in entry["errors"].values() for value in error.values())
            assert entry["tflops"] > 0 and entry["host_ms"] > 0
        assert len(SECTION.case_table(small.fields() | record | {"bench": "tree_attention", "commit": "x"})) > 5


def test_goals_of_attention_are_judged() -> None:
    """Fails if one of the lengths may miss a goal, or the slower FlexAttention counts."""
    base = AttentionCase(row_tokens=ROWS[0], heads=HEADS["qwen3-4b"])

    def record(tokens: int, flex_static: float = 25.0, rate: float = 400.0, later: float = 20.0) -> dict[str, Any]:
        times = {"ours": 20.0, "flex": 30.0, "flex_static": flex_static, "causal": 90.0}
        entries: dict[str, Any] = {name: {"ms": {"p50": ms}, "tflops": 450.0} for name, ms in times.items()}
        entries["ours"] |= {"tflops": rate, "other_length_ms": later}
        fields = replace(base, row_tokens=tokens).fields() | {"heads": list(base.heads)}
        return {"bench": "tree_attention", **fields, "implementations": entries}

    def verdicts(**last: float) -> list[bool | None]:
        records = [*map(record, ROWS[:2]), record(ROWS[2], **last)]
        return [None if v is None else v.passed for v in judge(GPU, records).values()][:3]

    assert verdicts() == [True, True, True]
    assert verdicts(flex_static=22.0, rate=380.0, later=2000.0) == [False, False, False]
    assert all(verdict is None for verdict in judge(GPU, [record(ROWS[0])]).values())
