"""A day on a GPU: its plan fits, its stages run, and what they find survives whatever goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.cases import EXPECTED, GPU_GOALS, for_device
from bench.gpu_day import runner
from bench.gpu_day.archive import Archive
from bench.gpu_day.plan import STAGES, START, TOTAL, Stage, describe, limit_of
from bench.gpu_day.runner import Clock, Outcome, Session, run_stages
from bench.gpu_day.summary import candidate_lines, summary
from bench.head.cases import MAIN, HeadCase

ROOT = Path(__file__).resolve().parents[2]
CASES = tuple(HeadCase(operator="turn_policy_loss", mode="gradient", shape=(n,), dtype="float32") for n in (16, 32, 48))
STAGE = Stage(call="a", name="head", limit=50, kind="cases", about="three cases", cases=CASES)
HIDDEN = ("deepspeed", "liger_kernel", "nvtx", "trl", "xformers", "wandb", "mcp", "fastapi", "vllm", "matplotlib")
HIDE = f"""
from functools import partial
from importlib.machinery import PathFinder
def hide(find, name, path=None, target=None):
    return None if name.partition(".")[0] in {HIDDEN!r} else find(name, path, target)
PathFinder.find_spec = partial(hide, PathFinder.find_spec)  # no function: pytest keeps it in a class
"""


class FastClock(Clock):
    """A clock on which a look at a stage takes ten seconds once it has printed something: limits pass at once."""

    def __init__(self, out: Path):
        self.seconds, self.out = 0.0, out

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += 10 * any(log.stat().st_size for log in self.out.glob("stages/*/log.txt"))
        super().sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(given: Session, stages: list[Stage]) -> list[Outcome]:
    """Run stages and return how they ended."""
    found: list[Outcome] = []
    run_stages(given, stages, found)
    return found


def session(folder: Path, said: list[str] | None = None, **more: Any) -> Session:
    """A session whose lines are kept."""
    lines = [] if said is None else said
    archive = Archive(folder, lines.append)
    shown = lambda outcomes: summary(archive.records(), outcomes)  # noqa: E731
    return Session(archive=archive, summary=shown, say=lines.append, device="cpu", **more)


def write(folder: Path, name: str, ms: float | None = 1.0, **more: Any) -> None:
    """Write a record of a case as a stage does."""
    entry = {"error": "CUDA error"} if ms is None else {"ms": {"p50": ms}, "same_work": True}
    record = {"bench": "linear_logprob", "case": name, "implementations": {"ours": entry}} | more
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    (folder / "cpu" / f"{name}.json").write_text(json.dumps(record))


def test_the_plan_fits_and_says_so() -> None:
    """Fails if limits add up to more than there is, with the starts of two machines, or the sum is not printed."""
    total = 2 * START + limit_of("ab")
    assert START == 90 and total <= TOTAL == 880
    assert f"= {total:.0f} s of 880 s" in describe()[-1]
    assert limit_of("a") <= 330 and limit_of("b") <= 400


def test_the_plan_names_what_there_is() -> None:
    """Fails for a stage whose cases nobody measures any more, or whose implementations none of them has."""
    known = {case.name: case for case in for_device("cuda")}
    for stage in STAGES:
        assert {case.name for case in stage.cases} <= known.keys(), stage.name
        offered = {name for case in stage.cases for name in known[case.name].implementations}
        assert not stage.cases or set(stage.implementations) <= offered, stage.name
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert EXPECTED.keys() <= GPU_GOALS.keys()


def test_a_stage_that_hangs_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a hanging stage takes the time of the others, or leaves a process that holds the GPU."""
    there = tmp_path / "pid"
    child = f"import os, time; open({str(there)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    code = f"""
import subprocess, sys, time
from pathlib import Path
subprocess.Popen([sys.executable, "-c", {child!r}])
while not (Path({str(there)!r}).exists() and Path({str(there)!r}).read_text()):
    time.sleep(0.01)
print("begun", flush=True)
time.sleep(1000)
"""
    codes = {"head": code, "after": "print('after')"}
    monkeypatch.setattr(runner, "command", lambda stage, *_: [sys.executable, "-c", codes[stage.name]])
    hanging, after = replace(STAGE, limit=100), replace(STAGE, name="after", cases=(), limit=1e9)
    found = run(session(tmp_path / "out", clock=FastClock(tmp_path / "out")), [hanging, after])
    assert [outcome.result for outcome in found] == ["stopped at its limit", "ok"]
    assert [outcome.last_line for outcome in found] == ["begun", "after"]
    assert not is_running(int(there.read_text()))


def test_cases_behind_one_that_breaks_the_process_run_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a sticky error of one case, or a crash, ends the cases behind it, or the case is tried again."""

    def command(stage: Stage, _: Session, folder: Path) -> list[str]:
        code = ""
        for case in stage.cases:
            code += f"print('measuring {case.name}', flush=True)\n"
            if case is CASES[1]:
                code += "import os; os.abort()\n"
            code += f"import pathlib; pathlib.Path({str(folder)!r}, 'done-{case.fields()['shape'][0]}').touch()\n"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(runner, "command", command)
    (found,) = run(session(tmp_path), [replace(STAGE, limit=1e9)])
    done = sorted(path.name for path in (tmp_path / "stages" / "head").glob("done-*"))
    assert done == ["done-16", "done-48"] and found.result.startswith("exit status -")
    log = (tmp_path / "stages" / "head" / "log.txt").read_text()
    assert [int(n) for n in re.findall(r"measuring turn_policy_loss-gradient-(\d+)", log)] == [16, 32, 48]


def test_a_stage_without_time_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a call goes on beyond its seconds, where the machine is taken away with all that is on it."""
    code = "import time; print(1, flush=True); time.sleep(1000)"
    monkeypatch.setattr(runner, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(runner, "GRACE", 0.2)
    said: list[str] = []
    two = [replace(STAGE, cases=(), limit=90), replace(STAGE, name="second", cases=())]
    found = run(session(tmp_path, said, clock=FastClock(tmp_path), seconds=60), two)
    assert found[0].result == "stopped at its limit" and found[0].seconds <= 80
    assert found[1].result.startswith("not started") and len(said) == 2


def test_what_was_found_is_not_overwritten_by_less(tmp_path: Path) -> None:
    """Fails if a later stage in which ours failed hides the time of an earlier one, or half a file ends the session."""
    archive = Archive(tmp_path, print)
    write(archive.stage_folder("first"), "one", 5.0)
    write(archive.stage_folder("second"), "one", None)
    (archive.stage_folder("third") / "cpu").mkdir()
    (archive.stage_folder("third") / "cpu" / "two.json").write_text('{"bench": "lin')
    (record,) = archive.records()
    assert record["implementations"]["ours"]["ms"]["p50"] == 5.0 and record["stage"] == "first"
    archive.renew(lambda: "summary")
    with tarfile.open(archive.file) as kept:
        assert {"summary.md", "records/cpu/one.json", "stages/second/cpu/one.json"} <= set(kept.getnames())


FULL = """
import resource, sys
from pathlib import Path
from bench.gpu_day.archive import Archive
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
said = []
archive = Archive(Path(sys.argv[1]), said.append)
for turn in range(3):
    archive.renew(lambda: "a summary that does not fit the disk", force=True)
sys.stderr.write(f"{len(said)}: {said[0]}")
"""


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """Fails if a session dies of a disk that has no room, or says so at every case."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.startswith("1: cannot write into"), done.stderr


def test_a_session_that_is_killed_leaves_its_archive(tmp_path: Path) -> None:
    """Fails if the end of a call takes what was found with it, or leaves a stage running."""
    code = "import sys, time; from bench.gpu_day import runner, __main__ as day; from pathlib import Path\n"
    code += "runner.command = lambda stage, session, folder: [sys.executable, '-c', "
    code += "'import time; print(1, flush=True); time.sleep(1000)']\n"
    code += "runner.GRACE = 0.2\n"
    code += "day.main(['a', '--out', sys.argv[1]])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment) as process:
        log = tmp_path / "stages" / "environment" / "log.txt"
        while not (log.exists() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        write(tmp_path / "stages" / "environment", "one")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 1
    with tarfile.open(tmp_path / "gpu_day.tar.gz") as kept:
        assert "records/cpu/one.json" in kept.getnames()


def test_the_summary_names_the_faster_candidate(tmp_path: Path) -> None:
    """Fails if a candidate is recommended that is slower, or that is faster because it calculates less exactly."""

    def entry(ms: float, error: float) -> dict[str, Any]:
        return {"ms": {"p50": ms}, "errors": {"logprob": {"mean": error, "max": error}}, "same_work": True}

    case = HeadCase(operator="linear_logprob", mode="forward", shape=MAIN, variant="kernels")
    entries = {"ours": entry(20, 1e-6), "specialised": entry(19, 1e-6), "branch": entry(15, 1e-3)}
    record = {"bench": case.bench, "case": case.name, "implementations": entries}
    assert "make specialised the default" in candidate_lines([record])[-1]
    del entries["specialised"]
    assert "the default stays" in candidate_lines([record])[-1]
    text = summary([record], [Outcome(STAGE, 3.0, "ok", "a | b")])
    assert "| head | 3 | ok | a / b |" in text and "not measured" in text


@pytest.mark.rehearsal
def test_the_rehearsal_runs_everything(tmp_path: Path) -> None:
    """Fails if a stage would fail on the day for a reason that is not the GPU's: an import, an argument, a case that is
    gone, a machine without git, DeepSpeed or Liger; or if the summary lacks a part."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "bin").mkdir()
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "PATH": str(tmp_path / "bin"), "BENCH_COMMIT": "abcdefg"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.gpu_day", "--rehearse", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match(r"\[[abc] \d+/\d+\]", line)]
    assert [line.split()[2].strip(":") for line in lines] == [stage.name for stage in STAGES]
    text = (tmp_path / "out" / "summary.md").read_text()
    for part in ("A rehearsal", "commit abcdefg", "**PASS**", "Candidates:", "gpu_day_ceilings", "gpu_day_profile"):
        assert part in text, part
    with tarfile.open(tmp_path / "out" / "gpu_day.tar.gz") as kept:
        assert len([name for name in kept.getnames() if name.startswith("records/cpu/")]) > 20


def test_the_page_has_every_stage() -> None:
    """Fails if docs/gpu_day.md names other stages, or other limits, than those that are run."""
    page = (ROOT / "docs" / "gpu_day.md").read_text()
    listed = re.findall(r"^\| ([abc]) \| `(\w+)` \| (\d+) s \|", page, re.MULTILINE)
    assert listed == [(stage.call, stage.name, f"{stage.limit:.0f}") for stage in STAGES]
