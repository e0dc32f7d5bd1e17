"""The command line as a user meets it: help, dry runs, faults, exit codes, and what reaches the run's processes."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from atpo_fast.commands import launcher
from atpo_fast.commands.cli import LAUNCHED, main
from atpo_fast.commands.doctor import Environment, Requirement, find_problems, inspect_environment, render
from atpo_fast.commands.model_folder import find_model, model_to_use, newest_model
from atpo_fast.common.manifest import write_manifest
from atpo_fast.config import Config, ConfigError, load_config
from atpo_fast.train.__main__ import main as launched
from atpo_kernels.hosts.check import Host
from tests.helpers.forked_launch import TWO_CPU_RANKS, launch_in_fork, variables
from tests.helpers.forked_runs import ForkedProcess, finish
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "configs/quickstart.yaml"


def run_cli(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`atpo-fast` from the repository root, as the same interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "atpo_fast", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The same in this process, which has imported what it needs; a traceback of the program fails the test."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # argparse's
            assert isinstance(ended.code, int)
            code = ended.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


# --- help and dry runs -------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_each_has_an_example(cli: Cli) -> None:
    # Fails if a verb has no help of its own or an example that does not start with it.
    listed = run_cli("--help")
    assert listed.returncode == 0
    for verb in ("cold-start", "train", "eval", "rollout", "report", "retriever", "export", "env"):
        assert re.search(rf"\n    {verb}\s", listed.stdout)
        alone = cli(verb, "--help")
        assert alone.returncode == 0
        assert f"example: atpo-fast {verb}" in alone.stdout


@pytest.mark.parametrize("verb", ["train", "cold-start", "sft"])  # the last is an old spelling
def test_dry_run_prints_what_would_run_and_starts_nothing(cli: Cli, verb: str, tmp_path: Path) -> None:
    # Fails if overrides behind an option are lost, or if the run folder is touched.
    overrides = [f"run_dir={tmp_path / 'run'}", "train.questions_per_step=64", "train.questions_per_minibatch=8"]
    tree = ["rollout.initial_chains=10", "rollout.expansion_rounds=2", "rollout.expansions_per_round=6"]
    done = cli(verb, *overrides, "--config", QUICKSTART, *tree[:2], "--dry-run", *tree[2:])
    assert done.returncode == 0, done.stderr
    assert "64 questions × 22 leaves = 1408 trajectories, 8 mini-batches of 176" in done.stdout
    assert not (tmp_path / "run").exists()
    resolved, _, _ = done.stdout.partition("\n\n")
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_config(tmp_path / "resolved.yaml") == load_config(ROOT / QUICKSTART, [*overrides, *tree])


def test_dry_run_and_help_do_not_import_torch() -> None:
    # Fails if a heavy import creeps into the command line: help would take seconds.
    code = (
        "import sys; from atpo_fast.commands.cli import main;"
        f"assert main(['eval', '--config', '{QUICKSTART}', '--dry-run']) == 0;"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("verb", ["train", "cold-start", "sft", "eval", "rollout"])
def test_the_launched_process_knows_every_verb_and_its_options(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Fails if a process does not understand what the command line, or `deepspeed --module` by hand, starts it with.
    monkeypatch.setattr(sys, "argv", ["atpo_fast.train", "--local_rank=0", "--verb", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        launched()
    help_text = capsys.readouterr().out
    assert ended.value.code == 0 and "--config" in help_text
    assert ("--split" in help_text) == (verb == "rollout")


def test_options_reach_the_launched_processes() -> None:
    # Fails if an option of a verb is lost between the command and its processes.
    (rollout,) = (verb for verb in LAUNCHED if verb.name == "rollout")
    parser = argparse.ArgumentParser()
    rollout.add_options(parser)
    words = ["--out=trees.jsonl", "--questions=all", "--split=eval"]
    assert rollout.options(parser.parse_args(words)) == words
    assert rollout.options(parser.parse_args([])) == []


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", QUICKSTART, "rollout.temprature=1"], "did you mean rollout.temperature?"),
        (["eval", "--config", QUICKSTART, "train.steps=0"], "train.steps=0"),
        (["cold-start", "--config", "configs/none.yaml"], "configs/none.yaml"),
        (["train", "--config", QUICKSTART, "deepspeed=none.json"], "deepspeed=none.json"),
        (["train"], "--config"),
        (["train", "--config", QUICKSTART, "--steps", "3"], "--steps"),
        (["fly"], "fly"),
        (["env", "seed=1"], "seed=1"),
        (["report", "no/such/run"], "no/such/run"),
        (["export", "no/such/run", "target"], "no/such/run"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(cli: Cli, arguments: list[str], message: str) -> None:
    # Fails if a fault shows as a traceback, goes to stdout, or ends with another code.
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- export ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with two checkpoints and a cold start, each with a file that says where it came from."""
    for part in ("checkpoints/step_000009/hf", "checkpoints/step_000010/hf", "cold_start"):
        folder = tmp_path / "run" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(part)
        (folder / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "run"


def test_export_copies_the_newest_or_the_named_checkpoint(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    # Fails if the oldest checkpoint or the cold start is taken, or DeepSpeed's files come along.
    assert cli("export", str(run_folder), str(tmp_path / "a")).returncode == 0
    assert (tmp_path / "a/config.json").read_text() == "checkpoints/step_000010/hf"
    assert cli("export", str(run_folder / "checkpoints/step_000009"), str(tmp_path / "b")).returncode == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "b/config.json").read_text() == "checkpoints/step_000009/hf"


def test_one_definition_of_the_newest_model(run_folder: Path, tmp_path: Path) -> None:
    # Fails if evaluation and export mean different models by the same folder.
    newest = run_folder / "checkpoints/step_000010/hf"
    assert [find_model(folder) for folder in (run_folder, newest.parent, newest)] == [newest] * 3
    assert newest_model(run_folder) == newest
    write_manifest(newest.parent)
    assert find_model(run_folder) == newest
    (newest / "model.safetensors").write_bytes(b"other")  # a damaged one: another model would answer
    assert newest_model(run_folder) == run_folder / "checkpoints/step_000009/hf"
    (newest.parent / "manifest.json").unlink()
    (newest / "model.safetensors").unlink()  # no model any more
    assert newest_model(run_folder) == run_folder / "checkpoints/step_000009/hf"
    assert find_model(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"has no trained model; set model\.path or train first"):
        newest_model(tmp_path)


def test_the_trained_model_answers_unless_another_is_asked_for(run_folder: Path, tmp_path: Path) -> None:
    # Fails if `eval` with the configuration of a trained run answers with the model that the run has started from.
    newest = run_folder / "checkpoints/step_000010/hf"
    assert model_to_use(run_folder, "given", []) == (newest, False)
    assert model_to_use(run_folder, "given", ["seed=1", "model.path=given"]) == (Path("given"), True)
    assert model_to_use(tmp_path / "new", "given", []) == (Path("given"), True)
    with pytest.raises(FileNotFoundError, match=r"has no trained model"):
        model_to_use(tmp_path / "new", None, [])


def test_export_never_overwrites(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("keep")
    done = cli("export", str(run_folder), str(target))
    assert done.returncode == 2 and "not an empty folder" in done.stderr
    assert [p.name for p in target.iterdir()] == ["notes.txt"]


# --- launching ---------------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
here = os.environ["RECORD"]
rank = os.environ["RANK"]
def stop(number, frame):
    open(f"{here}/stopped_{rank}_{number}", "w").close()
    time.sleep(0.3)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
names = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "WORLD_SIZE", "PATH")
with open(f"{here}/env_{rank}.partial", "w") as file:
    file.write("\\n".join([*(os.environ[name] for name in names), *sys.argv[1:]]))
os.rename(f"{here}/env_{rank}.partial", f"{here}/env_{rank}")
if "wait=1" in sys.argv:
    time.sleep(1000)
sys.exit(int(rank) * 3 if "fail=1" in sys.argv else 0)
"""


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A program in place of training, started by the real launcher, that writes what it sees into this folder."""
    package = tmp_path / "package" / "atpo_fast" / "train"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "__main__.py").write_text(RANK)
    return tmp_path


def test_ranks_get_their_arguments_and_environment(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if overrides, the number of ranks, the CPU accelerator or the path to ninja do not arrive.
    for name, value in variables(record).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(record / "package")
    assert launcher.launch("train", "c.yaml", ["seed=1"], TWO_CPU_RANKS) == 0
    for rank in (0, 1):
        accelerator, threads, world, path, *arguments = (record / f"env_{rank}").read_text().split("\n")
        assert (accelerator, world) == ("cpu", "2")
        assert int(threads) == max(1, launcher.usable_cores() // 2)
        assert path.split(os.pathsep)[0] == os.path.dirname(sys.executable)
        assert arguments[-5:] == ["--verb", "train", "--config", "c.yaml", "seed=1"]


def test_the_exit_code_of_a_failed_rank_comes_back(record: Path) -> None:
    finish(ForkedProcess(launch_in_fork, record, "fail=1"), code=3)


def test_a_signal_is_read_from_the_launchers_exit_code() -> None:
    # Fails if 247 comes back, of which nobody knows that a rank was killed, or a rank's own exit code is taken for one.
    assert [launcher.signal_of(code) for code in (-9, 256 - 9, 256 - 15)] == [9, 9, 15]
    assert [launcher.signal_of(code) for code in (0, 1, 2, 3, 130, 143)] == [None] * 6


LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv[1]); from atpo_fast.commands import launcher;"
    "sys.exit(launcher.launch('train', 'c.yaml', ['wait=1'], launcher.Placement('cpu', ['0', '1'])))"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_ranks_stop_with_the_command(record: Path, number: signal.Signals) -> None:
    # SIGTERM, SIGINT: fails if ranks are not asked exactly once (they save, and stop at once at the second signal), or
    # the exit code hides what happened. SIGKILL: fails if ranks run on as orphans and keep writing the run folder.
    # The last is the command as it is started; the others are forks.
    command: Any = (
        subprocess.Popen([sys.executable, "-c", LAUNCH, str(ROOT)], cwd=record, env=os.environ | variables(record))
        if number == signal.SIGKILL
        else ForkedProcess(launch_in_fork, record, "wait=1")
    )
    ranks: list[psutil.Process] = []
    try:
        wait_for(lambda: (record / "env_0").exists() and (record / "env_1").exists(), seconds=300)
        started = psutil.Process(command.pid).children(recursive=True)
        ranks += [process for process in started if "--local_rank" in " ".join(process.cmdline())]
        assert len(ranks) == 2
        command.send_signal(number)
        command.communicate(timeout=300)
        code = command.returncode
        wait_for(lambda: not any(_runs(rank) for rank in ranks), seconds=300)
    finally:  # leave nothing behind when the test fails
        if command.poll() is None:
            command.send_signal(signal.SIGKILL)
        for rank in ranks:
            if _runs(rank):
                rank.kill()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    stops = sorted(path.name for path in record.glob("stopped_*"))
    assert stops == [f"stopped_{rank}_{int(signal.SIGTERM)}" for rank in (0, 1)]


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_placement_on_the_cpu() -> None:
    # Fails if ranks=0 ("one per GPU") means none on a machine without GPUs.
    assert launcher.place(Config(device="cpu", ranks=0)) == launcher.Placement("cpu", ["0"])
    assert launcher.place(Config(device="cpu", ranks=3)).accelerators == ["0", "1", "2"]


def test_placement_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if a user's CUDA_VISIBLE_DEVICES is replaced by GPUs 0, 1, ..., or missing GPUs are not noticed.
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    assert launcher.place(Config(ranks=0)) == launcher.Placement("cuda", ["5", "GPU-7f"])
    assert launcher.place(Config(ranks=1)) == launcher.Placement("cuda", ["5"])
    with pytest.raises(ConfigError, match="ranks=3"):
        launcher.place(Config(ranks=3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda"):
        launcher.place(Config(device="cuda"))


# --- env ---------------------------------------------------------------------------------------------------------

TORCH = Requirement("torch", ">=2.11,<2.14", optional=False)
NUMPY = Requirement("numpy", "<2.4", optional=False)
FINE = {"torch": "2.13.0+cpu", "numpy": "2.3.5"}


def machine(**changes: Any) -> Environment:
    """An environment in which everything fits, but for `changes`."""
    whole = {"versions": FINE, "requirements": [TORCH, NUMPY], "ninja": "/bin/ninja", "compiler": "/bin/g++"}
    return Environment(**{**whole, **changes})


def test_a_fitting_environment_has_no_problem() -> None:
    # Fails if the +cpu label of a version puts it out of range, or an optional package is demanded.
    wanted = [TORCH, NUMPY, Requirement("vllm", "<0.33", optional=True)]
    assert list(find_problems(machine(requirements=wanted))) == []
    assert "everything fits together" in render(machine(), [])


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"versions": {**FINE, "torch": "2.14.0"}}, "torch 2.14.0 is out of range", "pip install 'torch>=2.11,<2.14'"),
        ({"versions": {**FINE, "numpy": "2.4.0"}}, "numpy 2.4.0 is out of range", "numpy<2.4"),
        ({"versions": {"torch": "2.13.0"}}, "numpy is not installed", "numpy<2.4"),
        (
            {"versions": {**FINE, "vllm": "0.24.0"}, "companions": {"vllm": [Requirement("torch", "==2.11.0", False)]}},
            "vllm 0.24.0 wants torch==2.11.0, but torch 2.13.0+cpu",
            "uninstall -y vllm",
        ),
        (
            {"versions": {**FINE, "torchvision": "0.28.0"}, "broken": {"torchvision": "RuntimeError: no operator"}},
            "torchvision 0.28.0 cannot be imported (RuntimeError: no operator)",
            "pip uninstall -y torchvision torchaudio torchcodec",
        ),
        (
            {"versions": {**FINE, "triton": "3.7"}, "broken": {"triton": "ImportError"}},
            "triton 3.7",
            "reinstall triton",
        ),
        ({"nvidia_driver": True}, "(a CPU build) sees no GPU", "CUDA build"),
        ({"ds_accelerator": "cuda"}, "DS_ACCELERATOR=cuda", "unset"),
        ({"ds_accelerator": "cpu", "gpus": ["H200"]}, "hides the GPUs", "unset"),
        ({"kernels_shadow": "/x/kernels/__init__.py"}, "/x/kernels/__init__.py", "rename"),
        ({"ninja": None}, "ninja is not on PATH", "pip install ninja"),
        ({"compiler": None}, "no C++ compiler", "g++"),
        ({"requirements": []}, "not installed, so versions cannot be checked", "pip install -e ."),
        (
            {"hosts": [Host("verl", "0.9.1", "0.9.1", "ValueError: Unsupported loss mode: at2po")]},
            "verl 0.9.1 does not have the adapter of atpo_kernels (ValueError: Unsupported loss mode: at2po)",
            "pip install ./kernels",
        ),
    ],
)
def test_each_bad_combination_is_named_with_its_remedy(changes: dict[str, Any], what: str, remedy: str) -> None:
    # Fails if a check is lost; exactly one problem each, so that none cries wolf about another.
    (problem,) = find_problems(machine(**changes))
    assert what in problem.what and remedy in problem.remedy
    assert problem.what in render(machine(**changes), [problem])


def test_the_report_of_this_machine(cli: Cli) -> None:
    # Fails if a real look at the machine raises; the exit code is 1 exactly when something is bad.
    found = inspect_environment()
    assert found.versions["torch"] and found.cores >= 1
    done = cli("env")
    assert "torch" in done.stdout and "ninja" in done.stdout
    assert done.returncode == (1 if "BAD" in done.stdout else 0)


def test_the_report_works_without_any_package(tmp_path: Path) -> None:
    # Fails if the report needs what it is meant to miss: here only its own few imports are there.
    import pydantic
    import yaml

    needed = {Path(str(module.__file__)).resolve().parent.parent for module in (pydantic, yaml, psutil)}
    names = (
        "pydantic",
        "pydantic_core",
        "yaml",
        "psutil",
        "typing_extensions.py",
        "annotated_types",
        "typing_inspection",
    )
    for home in needed:
        for name in names:
            if (home / name).exists() and not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(home / name)
    code = "import sys; from atpo_fast.commands.cli import main; sys.exit(main(['env']))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{tmp_path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "versions cannot be checked" in done.stdout
