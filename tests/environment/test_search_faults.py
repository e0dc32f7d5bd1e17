"""A search server that misbehaves: the rollout goes on, every question is accounted for, and nothing leaks."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from atpo_fast.common.errors import ToolFailureError
from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.environment import (
    HTTPSearch,
    ToolBox,
    ToolCall,
    ToolCounts,
    ToolError,
    ToolWatch,
    check_tools,
)
from atpo_fast.rollout import TreeSearch
from tests.helpers.scripted_engine import TOKENIZER, ScriptedEngine, questions, roll_out, search_then_answer

HIT = {"result": [[{"document": {"id": "1", "contents": "one two"}, "score": 1.0}]]}
TEN_MB = {"result": [[{"document": {"contents": "two " * 2_500_000}, "score": 1.0}]]}
ANSWERS: dict[str, bytes] = {
    "fine": json.dumps(HIT).encode(),
    "malformed": b'{"result": [[{"document"',
    "no JSON": b"<html>busy</html>",
    "other JSON": b'["no", "protocol"]',
    "hits of another kind": b'{"result": [["one", 2]]}',
    "no hits": b'{"result": [[]]}',
    "nothing": b"",
    "10 MB": json.dumps(TEN_MB).encode(),
    "not UTF-8": b'{"result": [[{"document": {"contents": "\xff\xfe one"}, "score": 1.0}]]}',
    "other bytes": b"\xff\xfe\x00\x80",
}
FAILING = ("malformed", "no JSON", "other JSON", "hits of another kind", "nothing", "other bytes", "500", "cut", "slow")


class _Handler(BaseHTTPRequestHandler):
    """Answers as the server's `mode` says."""

    server: _Server

    def do_POST(self) -> None:
        mode, body = self.server.next_mode(), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "500":
            return self.send_error(500)
        if mode == "slow":
            self.server.release.wait(600)
        answer = json.dumps(self.server.own).encode() if self.server.own else ANSWERS.get(mode, ANSWERS["fine"])
        if mode not in FAILING and mode != "not UTF-8" and len(body["queries"]) > 1:
            found = json.loads(answer)["result"]
            answer = json.dumps({"result": found * len(body["queries"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer[: len(answer) // 2] if mode == "cut" else answer)
        if mode == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    mode = "fine"
    faults = 0  # so many requests fail first
    own: Any = None  # an answer in place of the mode's
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.release = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/retrieve"

    def next_mode(self) -> str:
        """How the next request is answered."""
        self.faults -= 1
        return "500" if self.faults >= 0 else self.mode

    def handle_error(self, request: object, client_address: object) -> None: ...


@pytest.fixture
def server() -> Iterator[_Server]:
    found = _Server()
    yield found
    found.release.set()
    found.shutdown()
    found.server_close()


def make_toolbox(url: str, retries: int = 1, timeout_seconds: float = 120.0) -> ToolBox:
    search = HTTPSearch(url, timeout_seconds=timeout_seconds)
    limit = 2 * timeout_seconds
    return ToolBox([search], retries=retries, timeout_seconds=limit, backoff_seconds=0.001, max_chars=2000)


def patience(mode: str) -> float:
    """How long to wait for an answer in this mode: short only where none will come."""
    return 0.1 if mode == "slow" else 120.0


@pytest.mark.parametrize("mode", [*ANSWERS, "500", "cut", "slow", "down"])
@pytest.mark.parametrize("schedule", ["streaming", "synchronous"])
def test_the_rollout_goes_on(server: _Server, mode: str, schedule: Literal["streaming", "synchronous"]) -> None:
    """Fails if a fault of the server ends the rollout, loses a question, or its text is not an observation."""
    server.mode = mode
    url = "http://127.0.0.1:9/retrieve" if mode == "down" else server.url
    config = RolloutConfig(initial_chains=2, expansion_rounds=1, expansions_per_round=1, schedule=schedule)
    tools = ToolsConfig(call_limit=2, max_result_tokens=64)
    with make_toolbox(url, timeout_seconds=patience(mode)) as toolbox:
        search = TreeSearch(ScriptedEngine(search_then_answer), TOKENIZER, toolbox, config, tools)
        asked = questions(3)
        trees = roll_out(search, asked)
    assert [tree.question_id for tree in trees] == [question.id for question in asked]
    for tree in trees:
        assert all(tree.turns[leaf].finish_reason == "eos" for leaf in tree.leaves)
        assert all(len(turn.observation_ids) <= 64 for turn in tree.turns[1:])
    assert search.counters.tool_calls > 0
    failed = mode in FAILING or mode == "down"
    assert search.counters.failed_tool_calls == (search.counters.tool_calls if failed else 0)


@pytest.mark.parametrize("mode", [*FAILING, "down"])
def test_the_answer_tells_what_went_wrong(server: _Server, mode: str) -> None:
    """Fails if a fault is taken for a result, or raises out of the tools."""
    server.mode = mode
    url = "http://127.0.0.1:9/retrieve" if mode == "down" else server.url
    with make_toolbox(url, timeout_seconds=patience(mode)) as toolbox:
        (result,) = toolbox.run([ToolCall("search", "one")])
    assert not result.ok and result.text.startswith("Tool(search) failed: ") and len(result.text) < 400


@pytest.mark.parametrize(
    ("hit", "expected"),
    [
        ({"document": {"id": "1", "content": "one"}}, "one"),
        ({"document": {"passage": "one", "title": "T"}, "score": 1.0}, '"T"\none'),
        ({"document": {"contents": None, "text": "one"}}, "one"),
        ({"document": {"metadata": {"text": "one"}, "id": 3}}, "one"),
        ({"_source": {"title": "T", "body": "one"}, "_score": 2.0}, '"T"\none'),
        ({"text": "beside", "document": {"contents": "one"}}, "one"),
        ({"document": "one"}, "one"),
        ("one", "one"),
        ({"page_content": "one", "metadata": {"source": "x"}}, "one"),
        ({"document": {"title": "T", "text": ["one", "two"]}}, '"T"\none two'),
    ],
)
def test_common_names_of_a_hit_s_text(server: _Server, hit: Any, expected: str) -> None:
    """Fails if a server that names its text otherwise is taken for one that finds nothing."""
    server.own = {"result": [[hit, hit, {"document": {"id": 2, "contents": None}}]]}
    with HTTPSearch(server.url) as search:
        assert search("x") == f"Page 1: {expected}"


@pytest.mark.parametrize(
    ("hits", "words"),
    [
        (
            [{"document": {"id": "1", "contents": None}}],
            "found the fields document.id, document.contents (null); expec",
        ),
        ([{"document": {"id": "1", "abstract": "one"}}], "document.abstract; expected one of contents, text, content"),
        ([{}], "a dict without fields"),
        (["one", 3], "a hit must be an object or a text, not int"),
        ({"documents": []}, "expected a list of hits for each query, not dict"),
        (None, "expected a list of hits for each query, not NoneType"),
    ],
)
def test_hits_without_text_are_a_failure(server: _Server, hits: Any, words: str) -> None:
    """Fails if hits whose text is not found are answered with "No search results found."."""
    server.own = {"result": [hits]}
    with HTTPSearch(server.url) as search, pytest.raises(ValueError, match=re.escape(words)) as error:
        search("x")
    assert server.url in str(error.value)


def test_a_server_that_comes_back_is_used_again(server: _Server) -> None:
    """Fails if one fault puts a tool out of use."""
    with make_toolbox(server.url, retries=0) as toolbox:
        for mode, ok in (("500", False), ("fine", True), ("malformed", False), ("fine", True)):
            server.mode = mode
            assert toolbox.run([ToolCall("search", "one")])[0].ok == ok


def test_a_retry_hides_a_transient_error(server: _Server) -> None:
    """Fails if a call is answered by its first failure although tries are left."""
    server.faults = 3
    with make_toolbox(server.url, retries=3) as toolbox:
        (result,) = toolbox.run([ToolCall("search", "one")])
    assert result.ok and result.text == "Page 1: one two"


DEAD = "http://127.0.0.1:9/retrieve"


def test_what_became_of_the_calls_is_counted(server: _Server, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a failure is not counted as what it was, or a roll-out with many of them passes in silence."""
    with make_toolbox(server.url, retries=0, timeout_seconds=0.2) as toolbox:
        watch = ToolWatch(toolbox.counts, toolbox.last_failures)
        for number, mode in enumerate(("fine", "500", "slow", "fine", "malformed", "fine", "no hits")):
            server.mode = mode
            toolbox.run([ToolCall("search", str(number))])
        toolbox.run([ToolCall("search", "", problem="nothing to run"), ToolCall("unknown", "x")])
        assert toolbox.counts == {"search": ToolCounts(calls=7, failures=3, timeouts=1)}
        watch.settle()
        (line,) = caplog.messages
        assert line.startswith("tool 'search': 3 of 7 calls failed (1 timed out); last: Tool(search) failed: ")
        server.mode = "fine"
        toolbox.run([ToolCall("search", "once more")])
        caplog.clear()
        watch.settle()
        assert not caplog.messages


def test_a_tool_s_refusals_say_nothing_against_it() -> None:
    """Fails if a policy that writes bad calls ends the run."""

    def refuse(text: str) -> str:
        raise ToolError("not like this")

    def nothing(text: str) -> str:
        return ""

    with ToolBox([refuse, nothing], retries=0) as toolbox:
        watch = ToolWatch(toolbox.counts, toolbox.last_failures)
        toolbox.run([ToolCall("refuse", str(number)) for number in range(9)])
        watch.settle()
        assert toolbox.counts["refuse"] == ToolCounts(calls=9, refused=9)
        toolbox.run([ToolCall("nothing", str(number)) for number in range(4)])
        assert toolbox.counts["nothing"] == ToolCounts(calls=4, failures=4, empty=4)
        with pytest.raises(ToolFailureError, match=r"no call of 'nothing' was answered, 4 in a row; last: .*empty"):
            watch.settle()


def test_a_tool_that_answers_nothing_ends_the_run() -> None:
    """Fails if a dead server lets a run go on, one failed call ends it, or the message does not help."""
    with make_toolbox(DEAD, retries=0) as toolbox:
        watch = ToolWatch(toolbox.counts, toolbox.last_failures)
        toolbox.run([ToolCall("search", "a"), ToolCall("search", "b")])
        watch.settle()
        watch.settle()  # nothing was called
        toolbox.run([ToolCall("search", "a"), ToolCall("search", "b")])
        words = rf"no call of 'search' was answered, 4 in a row; last: Tool\(search\) failed: .*{DEAD}.* goes on from"
        with pytest.raises(ToolFailureError, match=words):
            watch.settle()


def test_a_dead_server_is_found_when_a_run_starts(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if nobody at tools.search_url is noticed, the message does not help, or a cache cannot do without it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:10")  # is not asked
    check_tools(ToolsConfig(search_backend="http", search_url=server.url))
    check_tools(ToolsConfig(search_url=DEAD))
    check_tools(ToolsConfig(builtin=["python"], search_backend="http", search_url=DEAD))
    words = rf"retrieval server {DEAD}: .*http_proxy of the environment are not used.*atpo-fast retriever.*search_url"
    with pytest.raises(ToolFailureError, match=words):
        check_tools(ToolsConfig(search_backend="http", search_url=DEAD))
    server.own = {"result": [[{"document": {"abstract": "one"}}]]}
    with pytest.raises(ToolFailureError, match=r"document\.abstract; expected one of contents"):
        check_tools(ToolsConfig(search_backend="http", search_url=server.url))
    assert not caplog.messages
    check_tools(ToolsConfig(search_backend="http", search_url=DEAD, cache=str(tmp_path / "cache.sqlite")))
    assert f"retrieval server {DEAD}" in caplog.messages[0] and "the cache of results" in caplog.messages[0]


def _held() -> tuple[int, int]:
    """(threads, open files) of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_many_calls_leave_nothing(server: _Server) -> None:
    """Fails if a failed request keeps its socket or its thread, be it one of twelve of a kind."""
    with make_toolbox(server.url, retries=0) as toolbox:
        toolbox.run([ToolCall("search", "warm up")])
        before = _held()
        for number in range(300):
            server.mode = ("500", "malformed", "fine", "cut", "nothing")[number % 5]
            toolbox.run([ToolCall("search", str(number))])
        deadline = time.monotonic() + 120
        while any(now > then + 4 for now, then in zip(_held(), before, strict=True)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(now <= then + 4 for now, then in zip(_held(), before, strict=True))
