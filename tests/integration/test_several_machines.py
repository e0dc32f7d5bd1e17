"""Runs on two hosts: network namespaces with addresses of their own (docs/several_machines.md)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.network import Host, hosts, kill_all, namespaces_allowed, remote_shell
from tests.helpers.runs import ROOT, records, run, write_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow(reason="starts whole runs in namespaces of their own, as on two machines"),
    pytest.mark.skipif(not namespaces_allowed(), reason="needs root and network namespaces"),
]

EXACT = ("rollout.schedule=synchronous", "cold_start.steps=4", "train.steps=3")
SAME = ("reward/mean", "policy/loss", "policy/grad_norm", "tokens/unique", "tokens/prefilled")


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with hosts(2) as found:
        yield found


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two ranks on one machine."""
    folder = tmp_path_factory.mktemp("one_machine")
    run(write_config(folder), *EXACT, "ranks=2")
    return folder / "run"


def start_nodes(pair: list[Host], folder: Path, config: Path) -> subprocess.Popen[str]:
    """`atpo-fast train --hostfile` from the first host."""
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in pair))
    words = [sys.executable, "-m", "atpo_fast", "train", "--config", str(config), *EXACT, "--hostfile", str(hostfile)]
    words += ["--remote-shell", remote_shell(folder), "--master", f"{pair[0].address}:29517"]
    return subprocess.Popen(
        words,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


# Fails when options, folder or number of ranks do not reach the second host, when its ranks get the numbers of the
# first, when gloo listens on the loopback interface, and when one host that dies leaves the other one waiting, the exit
# code 0, or the run unable to continue.
def test_two_hosts_equal_two_ranks_and_survive_a_power_cut(pair: list[Host], tmp_path: Path, one_machine: Path) -> None:
    config = write_config(tmp_path)
    process = start_nodes(pair, tmp_path, config)
    while not (tmp_path / "run/checkpoints/step_000001").is_dir():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    kill_all(pair[1])
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 137, output[-3000:]
    assert f"{pair[1].name} ended with exit code" in output
    process = start_nodes(pair, tmp_path, config)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    assert "resumed from" in output
    ours, theirs = records(tmp_path / "run", "train"), records(one_machine, "train")
    assert ours.keys() == theirs.keys()
    for step, record in theirs.items():
        for key in SAME:
            assert ours[step][key] == pytest.approx(record[key], rel=1e-6), (step, key)
