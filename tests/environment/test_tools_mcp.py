"""Tools of MCP servers: a small one of the package `mcp`, and one that starts faster (`written_mcp_server.py`)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_fast.config import ConfigError, MCPServerConfig, ToolsConfig, load_config
from atpo_fast.environment import ToolBox, ToolCall, make_toolbox
from atpo_fast.environment.mcp_tools import MCPServer

pytest.importorskip("mcp", reason="the extra mcp is not installed")

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
COMMAND = [sys.executable, str(HELPERS / "mcp_server.py")]
WRITTEN = [sys.executable, str(HELPERS / "written_mcp_server.py")]
ALL = ["add", "shout", "fail", "die", "process_id", "wait"]


def ask(toolbox: ToolBox, tool: str, argument: str) -> str:
    return toolbox.run([ToolCall(tool, argument)])[0].text


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def toolbox() -> Iterator[ToolBox]:
    server = MCPServer(MCPServerConfig(command=WRITTEN), timeout_seconds=120)
    with ToolBox(server.tools, retries=0, timeout_seconds=120) as toolbox:
        yield toolbox


@pytest.fixture(scope="module")
def lasting() -> Iterator[ToolBox]:
    """Tools of one server for the tests that leave it as it was."""
    server = MCPServer(MCPServerConfig(command=COMMAND), timeout_seconds=120)
    with ToolBox(server.tools, retries=0, timeout_seconds=120, timeouts={"wait": 0.1}) as toolbox:
        yield toolbox


def test_tools_of_a_server(lasting: ToolBox) -> None:
    """Fails if tools, schemas, arguments or answers do not come through."""
    assert lasting.names == tuple(ALL)
    add = lasting.schemas()[0]["function"]
    assert add["description"] == "Adds two numbers." and add["parameters"]["required"] == ["a"]
    assert ask(lasting, "add", '{"a": 2, "b": 3}') == "2 + 3 = 5"
    assert ask(lasting, "add", '{"a": 2}') == "2 + 1 = 3"
    assert ask(lasting, "shout", "hello") == ask(lasting, "shout", '{"text": "hello"}') == "HELLO"
    results = lasting.run([ToolCall("add", f'{{"a": {i}}}') for i in range(50)])
    assert [result.text for result in results] == [f"{i} + 1 = {i + 1}" for i in range(50)]


def test_failures_of_its_tools(lasting: ToolBox) -> None:
    assert ask(lasting, "add", '{"a": "x"}').startswith("Tool(add) was not called: a: 'x' is not of type 'integer'.")
    assert ask(lasting, "fail", "this").startswith("Tool(fail) failed: ")
    assert ask(lasting, "shout", "still there") == "STILL THERE"


def test_a_slow_tool_holds_up_nothing(lasting: ToolBox) -> None:
    """Fails if a time-out ends the connection."""
    assert "TimeoutError" in ask(lasting, "wait", '{"seconds": 1, "then": "x"}')
    assert ask(lasting, "shout", "fine") == "FINE"


def test_a_server_that_dies_is_started_again_once(toolbox: ToolBox, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if one crash costs all later calls, or a server that always crashes is started without end."""
    first = ask(toolbox, "process_id", "x")
    with caplog.at_level(logging.WARNING):
        assert ask(toolbox, "die", "x") == "Tool(die) failed: ConnectionError: the MCP server died during the call"
        second = ask(toolbox, "process_id", "x")
    assert second.isdigit() and second != first
    assert "died and is started again" in caplog.text
    assert "died during the call" in ask(toolbox, "die", "y")
    assert ask(toolbox, "process_id", "x") == (
        "Tool(process_id) failed: ConnectionError: the MCP server died again soon after it was started again"
    )


def test_the_server_ends_with_the_tool_box() -> None:
    """Fails if a run leaves servers behind."""
    server = MCPServer(MCPServerConfig(command=WRITTEN), timeout_seconds=120)
    with ToolBox(server.tools) as toolbox:
        process = int(ask(toolbox, "process_id", "x"))
        assert alive(process)
    for _ in range(12_000):
        if not alive(process):
            return
        time.sleep(0.01)
    pytest.fail("the server is still running")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MCPServerConfig(command=["/no/such/program"]), "No such file"),
        (MCPServerConfig(command=["true"]), "MCP server true cannot be used"),
        (MCPServerConfig(url="http://127.0.0.1:9/mcp"), "MCP server http://127.0.0.1:9/mcp cannot be used"),
    ],
)
def test_servers_that_cannot_be_used(config: MCPServerConfig, message: str) -> None:
    with pytest.raises(ConnectionError, match=message):
        MCPServer(config, timeout_seconds=120)


def test_tools_that_are_not_offered() -> None:
    with pytest.raises(ValueError, match="no tools subtract; it offers add, shout"):
        MCPServer(MCPServerConfig(command=WRITTEN, tools=["add", "subtract"]), timeout_seconds=120)


def test_over_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, "--http", str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(12_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        config = MCPServerConfig(url=f"http://127.0.0.1:{port}/mcp", tools=["add"], prefix="my_")
        server = MCPServer(config, timeout_seconds=120)
        with ToolBox(server.tools, retries=0) as toolbox:
            assert toolbox.names == ("my_add",)
            assert ask(toolbox, "my_add", '{"a": 1}') == "1 + 1 = 2"
            process.kill()
            process.wait()
            assert "the MCP server" in ask(toolbox, "my_add", '{"a": 2}')
    finally:
        process.kill()
        process.wait()


def test_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"tools:\n  builtin: []\n  mcp:\n    - command: {WRITTEN}\n      tools: [shout, process.id]\n")
    config = load_config(path).tools
    assert config.mcp == [MCPServerConfig(command=WRITTEN, tools=["shout", "process.id"])]
    with make_toolbox(config, []) as toolbox:
        assert toolbox.names == ("shout", "process_id")
        assert ask(toolbox, "shout", "x") == "X"
    path.write_text("tools:\n  mcp:\n    - tools: [shout]\n")
    with pytest.raises(ConfigError, match="either a command or a url"):
        load_config(path)


def test_a_server_is_closed_when_another_tool_cannot_be_made() -> None:
    """Fails if a configuration error leaves a server running."""
    before = set(os.listdir("/proc"))
    twice = MCPServerConfig(command=WRITTEN, tools=["add"])
    with pytest.raises(ValueError, match="two tools are called 'add'"):
        make_toolbox(ToolsConfig(builtin=[], mcp=[twice, twice]), [])
    started = [p for p in set(os.listdir("/proc")) - before if p.isdigit() and alive(int(p))]
    servers = []
    for process in started:
        with contextlib.suppress(OSError):
            if WRITTEN[1] in Path(f"/proc/{process}/cmdline").read_text():
                servers.append(process)
    assert not servers
