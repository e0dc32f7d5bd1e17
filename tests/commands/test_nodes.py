"""Runs on several machines: options, hostfile, and stops that reach every node."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from atpo_fast.commands.hostfile import read_hostfile, remote_command, run_on_hosts
from atpo_fast.commands.nodes import Nodes, add_node_arguments, choose_interface, follow_input, nodes_of
from atpo_fast.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
WAITING_NODE = """#!/bin/sh
echo "$2" > {folder}/line-$1
read line
echo "$line" > {folder}/stop-$1
exit 143
"""


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_node_arguments(parser)
    return parser.parse_args(words)


def test_options_describe_the_nodes() -> None:
    assert nodes_of(parse(), 8) is None
    assert nodes_of(parse("--nodes=2", "--node-rank=1", "--master=a:7"), 8) == Nodes((8, 8), 1, "a", 7)
    assert nodes_of(parse("--nodes=8,4", "--node-rank=1", "--master=[::1]:7"), 4) == Nodes((8, 4), 1, "::1", 7)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes=2"], "needs --node-rank"),
        (["--node-rank=0"], "belong to --nodes"),
        (["--nodes=two", "--node-rank=0", "--master=a"], "expected the number of nodes"),
        (["--nodes=0", "--node-rank=0", "--master=a"], "expected the number of nodes"),
        (["--nodes=2", "--node-rank=2", "--master=a"], "it is 0 to 1"),
        (["--nodes=8,4", "--node-rank=1", "--master=a"], "gives node 1 4 ranks"),
        (["--nodes=2", "--node-rank=0", "--master=a:b"], "expected HOST or HOST:PORT"),
    ],
)
def test_options_that_do_not_fit(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        nodes_of(parse(*words), 8)


# gloo would take the address of the machine's name, which other nodes cannot reach; the user's choice stays.
def test_the_interface_that_leads_to_the_first_node() -> None:
    environment: dict[str, str] = {}
    choose_interface(environment, Nodes((1, 1), 1, "127.0.0.1"))
    assert environment == {"GLOO_SOCKET_IFNAME": "lo"}
    environment = {"GLOO_SOCKET_IFNAME": "eth7"}
    choose_interface(environment, Nodes((1, 1), 1, "127.0.0.1"))
    assert environment == {"GLOO_SOCKET_IFNAME": "eth7"}
    with pytest.raises(ConfigError, match="not reachable from node 1"):
        choose_interface({}, Nodes((1, 1), 1, "no.such.host.invalid"))


@pytest.mark.parametrize(("text", "expected"), [("a slots=x", "bad entry"), ("", "empty"), ("a slots=0", "no slots")])
def test_a_bad_hostfile(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_hostfile(str(tmp_path / "hosts"))
    with pytest.raises(ConfigError, match="no such file"):
        read_hostfile(str(tmp_path / "none"))


# Every user of a machine can read command lines.
def test_no_secret_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ATPO_DATA", "/data of all")
    line = remote_command(["train", "run_dir=it's"])
    assert "secret" not in line
    found = subprocess.run(
        ["sh", "-c", line.replace(sys.executable, "echo")], capture_output=True, text=True, check=True
    )
    assert found.stdout.endswith("-m atpo_fast train run_dir=it's\n")
    assert (
        "ATPO_DATA=/data of all"
        in subprocess.run(
            ["sh", "-c", line.split(sys.executable)[0]], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    )


# Without the stop on both inputs the second node would train on, or wait for the first for half an hour.
def test_a_signal_reaches_every_node(tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text(WAITING_NODE.format(folder=tmp_path))
    shell.chmod(0o755)

    def stop_once_both_run() -> None:
        while len(list(tmp_path.glob("line-*"))) < 2:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_both_run, daemon=True).start()
    assert run_on_hosts({"a": 2, "b": 1}, ["train", "--config", "c.yaml"], shell=str(shell)) == 143
    for number, (host, slots) in enumerate({"a": 2, "b": 1}.items()):
        assert (tmp_path / f"stop-{host}").read_text() == "stop\n"
        line = (tmp_path / f"line-{host}").read_text()
        assert f"train --nodes=2,1 --node-rank={number} --master=a:29500" in line
        assert line.endswith(f"--config c.yaml ranks={slots}\n")


# The end of the input says that whoever started the node is gone: a node that goes on would be nobody's.
def test_the_end_of_the_input_stops_a_node() -> None:
    stops: list[int] = []
    follow_input(lambda: stops.append(1), io.StringIO("hello\nstop\n"))
    assert len(stops) == 2


# An option that is renamed would be noticed on a cluster only.
def test_the_cluster_templates_fit() -> None:
    folder = ROOT / "configs/cluster"
    subprocess.run(["bash", "-n", folder / "slurm.sh"], check=True)
    job = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))[1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    parsed = parse(*[word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"] if word[0] == "-"])
    assert nodes_of(parsed, 8) == Nodes((8, 8), 1, "atpo-fast-0.atpo-fast", 29500)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert (ROOT / container["command"][container["command"].index("--config") + 1]).is_file()
    assert set(re.findall(r"--(?:nodes|node-rank|master) ", (folder / "slurm.sh").read_text())) == {
        "--nodes ",
        "--node-rank ",
        "--master ",
    }
