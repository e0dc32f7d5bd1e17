"""The benches' command line and report: records of small cases, and what is judged from them."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.__main__ import COMMANDS, main
from bench.cases import for_device
from bench.core.measure import Makers, side_by_side
from bench.core.records import read_records, write_record
from bench.report import report

CASES = ("linear_logprob-gradient-1024x128x4096-float32-peaked", "turn_policy_loss-gradient-16x4096-float32-padded")


def test_record_and_report_of_a_small_case(tmp_path: Path) -> None:
    """Fails if a record lacks what the report reads, an implementation does other work, or CPU numbers pass for a
    GPU's."""
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    main(["--device", "cpu", "--cases", ",".join(CASES), "--seconds", "0", "--results", str(results)])
    head, loss = (json.loads((results / "cpu" / f"{name}.json").read_text()) for name in CASES)
    assert head["rows"] == 1024 and set(head["gemm_ms"]) == {"logits", "hidden_gradient", "weight_gradient"}
    assert all(record["commit"] and record["torch"] and record["device"].startswith("CPU") for record in (head, loss))
    for record, names in ((head, ("ours", "plain")), (loss, ("ours", "plain", "published_loop"))):
        for entry in (record["implementations"][name] for name in names):
            assert 0 < entry["ms"]["p20"] <= entry["ms"]["p50"] <= entry["ms"]["p80"] and entry["samples"] == 1
            assert entry["peak_bytes"] >= entry["gradient_bytes"] > 0
            assert all(0 <= value < 1e-4 for error in entry["errors"].values() for value in error.values())
    ours, plain = (head["implementations"][name] for name in ("ours", "plain"))
    assert set(ours["errors"]) == {"logprob", "entropy", "hidden_gradient", "weight_gradient"}
    assert plain["peak_bytes"] > 3 * 1024 * 4096 * 4 > ours["peak_bytes"]
    main(["report", "--results", str(results), "--output", str(tmp_path)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "No GPU record exists yet" in text and "PASS" not in text and text.count("not measured") > 10
    assert "forward + backward, 1024 × 128 × 4096, float32, peaked logits" in text
    assert all((tmp_path / line.split("(")[1][:-1]).exists() for line in text.splitlines() if line.startswith("!["))


def test_a_time_is_of_several_warm_samples() -> None:
    """Fails if a record's time is of one sample or of a first call, or a rehearsal without seconds waits for more."""
    ran: list[str] = []
    entries, samples = {}, {}
    for name, seconds in (("measured", 1e-9), ("rehearsed", 0.0)):
        maker: Makers = {name: partial(partial, ran.append, name)}  # whose call notes that it ran
        entries[name], _, found = side_by_side(maker, lambda *_: {}, lambda _: {}, "cpu", seconds)
        samples[name] = found[name]
    assert {name: entry[name]["samples"] for name, entry in entries.items()} == {"measured": 3, "rehearsed": 1}
    assert Counter(ran) == {"measured": 4, "rehearsed": 1}  # of them one to warm up
    assert all(len(samples[name]) == entry[name]["samples"] for name, entry in entries.items())


def test_nothing_measured() -> None:
    """Fails if a goal passes, or is left out, where there are no records."""
    assert report([], Path()).count("not measured") > 20


def test_must_show_cases_come_first() -> None:
    """Fails if a short lease of a GPU would be spent on other cases, or two cases overwrite one record."""
    for kind in ("cuda", "cpu"):
        cases = for_device(kind)
        quick = [case.quick for case in cases]
        assert quick == sorted(quick, reverse=True) and quick[0]
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.quick or case.peers for case in cases if case.bench != "policy_update")


def test_cases_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --list measures something, or --quick and --cases choose other cases than they say."""
    main(["--list", "--device", "cuda"])
    assert capsys.readouterr().out.splitlines() == [case.name for case in for_device("cuda")]
    main(["--list", "--device", "cuda", "--quick", "--cases", "clipped,host"])
    quick = [case.name for case in for_device("cuda") if case.quick and re.search("clipped|host", case.name)]
    assert capsys.readouterr().out.splitlines() == quick


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a command is not there, or does not say what it does."""
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.count(f"python -m bench {name}".removesuffix(" run")) > 1  # the usage and its text


def test_records_of_devices_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if the records of a GPU overwrite another GPU's or a CPU's, or are not read again."""
    for device in ("NVIDIA H200", "NVIDIA B200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        write_record("case", "x", "cuda", tmp_path, device=device)
    write_record("case", "x", "cpu", tmp_path, device="CPU")
    names = ["cpu/case.json", "gpu/nvidia-b200-case.json", "gpu/nvidia-h200-case.json"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")) == names
    assert sorted(record["device"] for record in read_records(tmp_path)) == ["CPU", "NVIDIA B200", "NVIDIA H200"]
