"""A training of 500 steps on two ranks, undisturbed, and beside it under faults that are drawn from a seed.

    python -m bench soak [--steps 500] [--times 3] [--seed 0] [--folder runs/soak]

Faults: searches that fail, a killed rank, kill -9 of the whole job, a full disk, a corrupt checkpoint, a search server
that dies and comes back, each several times. The training is started again by a loop, as a launcher does. Shown must
be: it finishes; every step has one record; EM on the held-out questions differs from the undisturbed run's by no more
than chance; memory, threads and handles do not grow. Writes bench/results/cpu/soak.json and the plot beside it; ends
with 1 where something does not hold.

The disk can only be filled where the run folder has one of its own: a file system in memory, which is mounted in a
namespace of this command (`unshare`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from atpo_fast.config import load_config
from atpo_fast.data.questions import Passage
from atpo_fast.evaluation.answers import read_answers
from atpo_fast.evaluation.compare import compare
from atpo_fast.telemetry.run_logger import METRICS_FILE, read_metrics
from atpo_fast.world import make_world
from bench.core.plots import draw
from bench.core.records import RESULTS, commit, device_name, write_record
from bench.soak.faults import KINDS, Fault, Injector, schedule
from bench.soak.job import ROOT
from bench.soak.plots import figure
from bench.soak.search_server import SearchServer
from bench.soak.supervisor import Lived, Supervisor
from bench.soak.watch import QUANTITIES, Sample, growth, thinned

CONFIG = ROOT / "bench/soak/soak.yaml"
_DISK_SIZE = "96m"
_WARM_UP = 10  # steps of a life that are not looked at for growth
_RISE = 0.05  # largest rise of a fitted line over the training, as a share of the mean


def main(arguments: list[str] | None = None) -> None:
    """Run both trainings, or what is missing of them, judge them, and write record and plot."""
    options = _parse(arguments)
    if options.disk is None and "disk full" in options.kinds:
        _enter_namespace(options.folder, arguments)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(str(CONFIG), [f"train.steps={options.steps}"])
    margin = 2 * config.train.save_every + 1  # two checkpoints are there before the first fault
    faults = schedule(options.kinds, options.times, options.steps, margin, random.Random(options.seed))
    _make_start(folder / "start")
    passages = make_world(config.world).passages
    with ThreadPoolExecutor(2) as pool:  # side by side, so that other work on this machine slows both alike
        follow = partial(_follow, folder, options.steps, passages, options.seed)
        running = {
            "quiet": pool.submit(follow, "quiet", [], folder),
            "faulty": pool.submit(follow, "faulty", faults, options.disk or folder),
        }
        runs = {name: future.result() for name, future in running.items()}
    shown = judge(runs, options.steps)
    fields = {"steps": options.steps, "ranks": config.ranks, "seed": options.seed, "shown": shown, "runs": runs}
    write_record("soak", "soak", "cpu", options.results, device=device_name("cpu"), **fields)
    draw({"run": lambda: figure(runs)}, options.results / "plots", "soak")
    print(table(shown))
    sys.exit(not all(found["holds"] for found in shown.values()))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="steps of RL of each training (default: 500)")
    parser.add_argument("--times", type=int, default=3, help="number of times that each fault strikes (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="faults (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="folder of both trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record and the plot")
    parser.add_argument("--disk", type=Path, help="a file system of its own for the training under faults")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    return options


def _enter_namespace(folder: Path, arguments: Sequence[str] | None) -> None:
    """Become this command once more, in a namespace in which a small file system is mounted."""
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, "-m", "bench", "soak", *(sys.argv[2:] if arguments is None else arguments)]
    mount = f'mount -t tmpfs -o size={_DISK_SIZE} tmpfs "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk), *again]
    try:
        os.execvp(command[0], [*command, "--disk", str(disk)])
    except OSError as error:
        sys.exit(
            f"a disk that can be filled needs `unshare` ({error}); leave the fault out with --kinds, or give --disk"
        )


def _make_start(folder: Path) -> None:
    """Make the model that both trainings start from, unless it is there."""
    if (folder / "cold_start").is_dir():
        return
    command = [sys.executable, "-m", "atpo_fast", "cold-start", "--config", str(CONFIG), f"run_dir={folder}"]
    subprocess.run([*command, "tools.search_backend=bm25"], check=True, cwd=ROOT)


def _follow(
    home: Path, steps: int, passages: Sequence[Passage], seed: int, name: str, faults: Sequence[Fault], disk: Path
) -> dict[str, Any]:
    """Run a training to its end unless its findings are there; returns what its record holds."""
    kept = home / name / "findings.json"
    if kept.exists():
        print(f"{kept} is there; delete it to run this training again")
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    shutil.rmtree(kept.parent, ignore_errors=True)
    folder = disk / "run" if disk != home else home / name / "run"
    with SearchServer(home / name / "server", passages, seed) as server:
        words = ["train", "--config", str(CONFIG), f"train.steps={steps}", f"run_dir={folder}"]
        words += [f"model.path={home / 'start/cold_start'}", f"tools.search_url={server.url}"]
        injector = Injector(server, disk, random.Random(seed + 1))
        tell = partial(_tell, name)
        lived = Supervisor(words, folder, home / name / "output", faults, injector, tell).run()
    for end in lived.ends:
        end["said"] = end["said"].replace(f"{home}/", "")
    if folder != home / name / "run":
        shutil.copytree(folder, home / name / "run")
    found = findings(lived, home / name / "run") | {"commit": commit()}
    kept.write_text(json.dumps(found))
    return found


def findings(lived: Lived, folder: Path) -> dict[str, Any]:
    """Return what the record holds of a training: faults, ends, metrics by step, memory, and its last answers."""
    records = read_metrics(folder / METRICS_FILE)
    train = [record for record in records if record["phase"] == "train"]
    answers = sorted((folder / "eval").glob("step_*.jsonl"))[-1]
    return {
        "faults": lived.faults,
        "ends": lived.ends,
        "left_over": lived.left_over,
        "recorded_steps": [record["step"] for record in train],
        "em": [round(record["reward/em"], 4) for record in train],
        "evaluations": {str(record["step"]): record["eval/em"] for record in records if record["phase"] == "eval"},
        "searches": _sum(train, "tool/search/calls"),
        "failed_searches": _sum(train, "tool/search/failures"),
        "answers": str(answers),
        "samples": thinned(lived.samples, 5),
    }


def judge(runs: dict[str, dict[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """Say of each thing that must be shown what was found, and whether it holds."""
    quiet, faulty = runs["quiet"], runs["faulty"]
    _, before = read_answers(Path(quiet.pop("answers")))
    _, after = read_answers(Path(faulty.pop("answers")))
    em = compare(before, after).all.em
    codes = Counter(end["code"] for end in faulty["ends"])
    shown: dict[str, dict[str, Any]] = {
        "it finishes": {"found": f"exit codes {dict(codes)}", "holds": faulty["ends"][-1]["code"] == 0},
        "no process is left": {"found": faulty["left_over"], "holds": not faulty["left_over"]},
        "one record for each step": {
            "found": f"{len(faulty['recorded_steps'])} records, {len(set(faulty['recorded_steps']))} steps of {steps}",
            "holds": faulty["recorded_steps"] == list(range(1, steps + 1)) == quiet["recorded_steps"],
        },
        "EM within noise": {
            "found": f"{em.first:.3f} quiet, {em.second:.3f} under faults, difference {em.difference.mean:+.3f} "
            f"({em.difference.low:+.3f} to {em.difference.high:+.3f}), p = {em.p_value:.2f} ({em.test})",
            "holds": em.difference.low <= 0 <= em.difference.high,
        },
    }
    for name, quantity in QUANTITIES.items():
        rises = {
            f"{run}, {process}": line["rise"] / line["mean"]
            for run, found in runs.items()
            for process, line in growth([Sample(**sample) for sample in found["samples"]], name, _WARM_UP).items()
        }
        worst = max(rises, key=rises.__getitem__)
        found = f"the floor rises by at most {rises[worst]:+.1%} of its mean ({worst})"
        shown[f"flat: {quantity}"] = {"found": found, "holds": rises[worst] <= _RISE}
    return shown


def table(shown: dict[str, dict[str, Any]]) -> str:
    """Write a line for each thing that must be shown, in Markdown."""
    lines = ["| must be shown | found | |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {what} | {f['found']} | {'yes' if f['holds'] else 'NO'} |" for what, f in shown.items()]
    )


def _tell(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


def _sum(records: Sequence[dict[str, Any]], key: str) -> float:
    return sum(float(record.get(key, 0.0)) for record in records)


if __name__ == "__main__":
    main()
