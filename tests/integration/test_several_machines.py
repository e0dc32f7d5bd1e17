"""Runs on two hosts: network namespaces with addresses of their own (docs/several_machines.md)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from atpo_fast.config import ServerConfig
from atpo_fast.engines.server import pool as server_pool
from atpo_fast.engines.server.engine import ServerEngine
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.forked_runs import finish, start_command
from tests.helpers.network import Host, hosts, kill_all, namespaces_allowed, remote_shell
from tests.helpers.runs import ROOT, records, run, write_config
from tests.helpers.served_model import ServedModel
from tests.helpers.served_requests import request
from tests.helpers.waiting import wait_for

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
# code 0, or the run unable to continue where each node has a command of its own.
def test_two_hosts_equal_two_ranks_and_survive_a_power_cut(pair: list[Host], tmp_path: Path, one_machine: Path) -> None:
    config = write_config(tmp_path)
    process = start_nodes(pair, tmp_path, config)
    wait_for((tmp_path / "run/checkpoints/step_000001").is_dir, [process])
    kill_all(pair[1])
    output = finish(process, 137)
    assert f"{pair[1].name} ended with exit code" in output
    words = ["train", "--config", str(config), *EXACT, "--nodes=2", f"--master={pair[0].address}:29519"]
    nodes = [start_command(*words, f"--node-rank={rank}", host=host) for rank, host in enumerate(pair)]
    outputs = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "resumed from" in outputs[0]
    ours, theirs = records(tmp_path / "run", "train"), records(one_machine, "train")
    assert ours.keys() == theirs.keys()
    for step, record in theirs.items():
        for key in SAME:
            assert ours[step][key] == pytest.approx(record[key], rel=1e-6), (step, key)


# ---- a server engine on a host of its own


def small_run(served: ServedModel, server: CompletionsServer, name: str) -> list[str]:
    """Options and overrides of a small run into the folder `name`."""
    words = ["--config", str(served.config), *served.overrides(name, server), "rollout.schedule=synchronous"]
    words += ["engine.retries=50", "engine.backoff_seconds=0"]  # it often draws embedding rows without a token
    words += ["rollout.initial_chains=2", "rollout.max_turn_tokens=8", "rollout.max_response_tokens=48"]
    return [*words, "world.eval_questions=2", "engine.health_seconds=3600"]


# The third host's server draws by the seed of each request, so that every step has to equal that of two ranks on one
# host. It ends while both hosts wait for it, and comes back with the weights that it was started with. At last it ends
# for good. Fails when a host cannot reach the other one's or the server's address, when the ranks do not agree on who
# gives the server its weights, when a question or the last weights are lost with a server that restarts, and when a
# run without a server hangs or does not say which one is missing.
def test_two_hosts_train_with_a_server_on_a_third(tmp_path: Path) -> None:
    served = ServedModel(tmp_path)
    with served.start() as server:
        node = start_command("train", *small_run(served, server, "one"), "ranks=2", "train.steps=2")
        finish(node)
        assert server.called.count("collective_rpc") == 3  # in the beginning and after each step
    with hosts(3) as trio, served.start(trio[2]) as server:
        waiting = 2  # the requests after so many weights are held: those of the second step
        server.fault = lambda number: "slow" if server.called.count("collective_rpc") == waiting else None
        place = ["--nodes=2", f"--master={trio[0].address}:29518"]
        words = ["train", *place, *small_run(served, server, "two"), "engine.patience_seconds=60", "train.steps=3"]
        outputs = [tmp_path / f"node{rank}" for rank in range(2)]
        nodes = [
            start_command(*words, f"--node-rank={rank}", output=outputs[rank], host=host)
            for rank, host in enumerate(trio[:2])
        ]
        wait_for(lambda: server.held == 8, nodes)  # 2 chains of 4 questions
        server.kill()
        wait_for(lambda: all(f"{server.url} is out of use" in output.read_text() for output in outputs), nodes)
        waiting = 5  # each rank gives the server the last weights again; then those after the second step
        server.start()
        wait_for(lambda: server.held == 8, nodes)
        server.kill()
        said = [node.communicate(timeout=900)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [1, 1], said
        assert set(server.askers) == {trio[0].address, trio[1].address}
        message = rf"no server was up for 60 s \(engine.patience_seconds\): {server.url}: .*\. Check engine.urls"
        assert any(re.search(f"^error: .*{message}$", text, re.MULTILINE) for text in said), said
        assert all("is in use again" in text and "Traceback" not in text for text in said), said
    one, two = records(tmp_path / "one", "train"), records(tmp_path / "two", "train")
    assert one.keys() == two.keys() == {1, 2}
    for step, record in one.items():
        for key in SAME[:-1]:  # what the server finds in its cache depends on the order of the requests
            assert two[step][key] == pytest.approx(record[key], rel=1e-6), (step, key)
        assert two[step]["rollout/mismatch_kl"] < 1e-6


# Fails when an engine waits for an answer of a machine that has lost its power or cable, which closes no connection.
def test_a_server_whose_machine_vanishes_is_asked_again(
    pair: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "_PROBE_SECONDS", 1)
    monkeypatch.setattr(server_pool, "_PROBES", 1)
    served = ServedModel(tmp_path)
    with served.start(pair[1]) as server, ExitStack() as stack:
        server.fault = lambda number: "slow" if number == 0 else None
        config = ServerConfig(urls=[server.url], backoff_seconds=0.01, health_seconds=3600.0)
        with pair[0].entered():  # so are the engine's threads
            engine = ServerEngine(tmp_path / "other", served.tokenizer, config)
        stack.callback(engine.close)
        engine.submit([request()])
        wait_for(lambda: server.held == 1)
        pair[1].unplug()
        wait_for(lambda: not engine._pool.replicas[0].up, seconds=120.0)
        pair[1].plug_in()
        wait_for(lambda: bool(engine.poll()))
        assert server.askers == [pair[0].address] * 2
