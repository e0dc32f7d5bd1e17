"""The benches' runner and report: a record of a small case, what is judged from records, and the published loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atpo_kernels import turn_policy_loss

ROOT = Path(__file__).resolve().parents[2]
CASES = ("linear_logprob-gradient-1024x128x4096-float32-peaked", "turn_policy_loss-gradient-16x4096-float32-padded")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of the benches can be imported."""
    monkeypatch.syspath_prepend(ROOT / "bench")


def command(script: str, *arguments: str | Path) -> None:
    """Run one of the benches' scripts."""
    subprocess.run([sys.executable, ROOT / "bench" / script, *arguments], check=True, cwd=ROOT, capture_output=True)


def test_record_and_report_of_a_small_case(tmp_path: Path) -> None:
    """Fails if a record lacks what the report reads, an implementation does other work, or CPU numbers pass for a
    GPU's."""
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    command("run.py", "--device", "cpu", "--cases", ",".join(CASES), "--seconds", "0", "--results", results)
    head, loss = (json.loads((results / f"cpu-{name}.json").read_text()) for name in CASES)
    assert head["rows"] == 1024 and set(head["gemm_ms"]) == {"logits", "hidden_gradient", "weight_gradient"}
    assert all(record["commit"] and record["torch"] and record["device"].startswith("CPU") for record in (head, loss))
    for record, names in ((head, ("ours", "plain")), (loss, ("ours", "plain", "published_loop"))):
        for entry in (record["implementations"][name] for name in names):
            assert 0 < entry["ms"]["p20"] <= entry["ms"]["p50"] <= entry["ms"]["p80"] and entry["samples"] >= 3
            assert entry["peak_bytes"] >= entry["gradient_bytes"] > 0
            assert all(0 <= value < 1e-4 for error in entry["errors"].values() for value in error.values())
    ours, plain = (head["implementations"][name] for name in ("ours", "plain"))
    assert set(ours["errors"]) == {"logprob", "entropy", "hidden_gradient", "weight_gradient"}
    assert plain["peak_bytes"] > 3 * 1024 * 4096 * 4 > ours["peak_bytes"]
    command("report_results.py", "--results", results, "--output", tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "No GPU record exists yet" in text and "PASS" not in text and text.count("not measured") > 10
    assert "forward + backward, 1024 × 128 × 4096, float32, peaked logits" in text
    assert all((tmp_path / line.split("(")[1][:-1]).exists() for line in text.splitlines() if line.startswith("!["))


def test_must_show_cases_come_first(bench: None) -> None:
    """Fails if a short lease of a GPU would be spent on other cases, or two cases overwrite one record."""
    from cases import for_device

    for kind in ("cuda", "cpu"):
        cases = for_device(kind)
        quick = [case.quick for case in cases]
        assert quick == sorted(quick, reverse=True) and quick[0]
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.quick or case.peers for case in cases if case.bench != "policy_update")


def gpu_record(**changes: Any) -> dict[str, Any]:
    """A made-up record of the main case."""
    ours = {"ms": {"p50": 50.0}, "same_work": True, "fraction_of_gemm": 0.9, "peak_bytes": 3, "gradient_bytes": 2}
    times = {"plain": 100.0, "liger_grpo": 200.0, "quack": 40.0}
    others = {name: {"ms": {"p50": ms}, "same_work": name != "quack"} for name, ms in times.items()}
    case = {"bench": "linear_turn_policy_loss", "mode": "gradient", "shape": [16384, 2560, 151936], "dtype": "bfloat16"}
    case |= {"peaked": True, "loss_tokens": 1.0, "clipped": 0.0, "turn_length": 64}
    return case | {"implementations": {"ours": ours | changes} | others}


def test_goals_are_judged(bench: None) -> None:
    """Fails if a goal passes when missed, is judged from another case, or counts a peer that does less work."""
    from head_goals import GPU
    from verdicts import judge

    def verdicts(**changes: Any) -> list[bool | None]:
        found = judge(GPU, [gpu_record(**changes)])
        return [None if verdict is None else verdict.passed for verdict in found.values()]

    assert verdicts() == [True, True, None, True, True, None, True, None, None, None, None]
    slow = verdicts(ms={"p50": 90.0}, fraction_of_gemm=0.5, peak_bytes=2 * 10**9)
    assert slow == [False, False, None, False, False, None, False, None, None, None, None]
    assert all(v is None for v in judge(GPU, [gpu_record() | {"peaked": False}]).values())


def test_published_loop_is_the_turn_loss(bench: None) -> None:
    """Fails if the loop that we are compared with computes another loss (turns at borders, empty rows, clipping)."""
    from turn_losses import published_loop

    rng = torch.Generator().manual_seed(0)
    old, noise, advantages = torch.randn(3, 5, 40, generator=rng, dtype=torch.float64)
    mask = (torch.rand(5, 40, generator=rng) > 0.3).double()
    mask[1], mask[2] = 0, 1
    results = []
    for loss in (
        lambda new: published_loop(new, old, advantages, mask),
        lambda new: turn_policy_loss(new, old, advantages, mask=mask).loss,
    ):
        logprob = (old + 0.01 * noise).requires_grad_()
        value = loss(logprob)
        results += [value, torch.autograd.grad(value, logprob)[0]]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])
