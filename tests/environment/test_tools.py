"""Tags, tools and their running: what a tool may do wrong must end in an observation."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from atpo_fast.config import ToolsConfig
from atpo_fast.data.questions import Passage
from atpo_fast.environment import (
    CALL_LIMIT_NOTICE,
    BM25Search,
    HTTPSearch,
    ToolBox,
    ToolCall,
    format_result,
    make_toolbox,
    parse_call,
)

BOTH = ("search", "python")

# ---- tags


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> x </think><search> a b\n</search>", ToolCall("search", "a b")),  # stripped
        ("<search>a</search> <python>1</python>", ToolCall("python", "1")),  # the one that closes last
        ("<python>1</python> <search>a</search>", ToolCall("search", "a")),  # whatever the order of the tools
        ("<search>a<search>b</search>", ToolCall("search", "b")),  # the last opening tag
        ("<python>print('<search>a</search>')</python>", ToolCall("python", "print('<search>a</search>')")),
        ("<search>a</search> and more", ToolCall("search", "a")),  # a closing token may carry more characters
        ("<search>a", None),
        ("no call", None),
        ("<answer>a</answer>", None),  # not a tool
        ("", None),
    ],
)
def test_parse_call(text: str, expected: ToolCall | None) -> None:
    assert parse_call(text, BOTH) == expected


@pytest.mark.parametrize("text", ["<search></search>", "<search> \n </search>", "a</search>", "</search><search>"])
def test_calls_that_cannot_run_say_why(text: str) -> None:
    # Fails if an empty or unmatched call reaches a tool, or is dropped without an observation.
    call = parse_call(text, BOTH)
    assert call is not None and call.tool == "search" and call.argument == ""
    assert call.problem.startswith("Tool(search) was not called")


def test_an_unmatched_call_does_not_take_the_pair_before_it() -> None:
    call = parse_call("<python>1</python></search>", BOTH)
    assert call is not None and call.tool == "search" and call.problem


def test_parse_without_tools() -> None:
    assert parse_call("<search>a</search>", ()) is None


def test_published_texts() -> None:
    assert format_result("a\nb") == " <result>\na\nb\n</result>"
    assert CALL_LIMIT_NOTICE == (
        " I have reached the tool call limit and cannot make further tool calls. Let me provide the final answer based "
        "on the information I have gathered so far. \n\n"
    )


# ---- the tool box


class Flaky:
    """Raises, then answers nothing, then answers; counts its calls."""

    name = "flaky"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, argument: str) -> str:
        self.calls += 1
        if self.calls == 1:
            raise OSError("broken\npipe")
        return "" if self.calls == 2 else f"got {argument}"


class Batch:
    """Answers in batches; a bad argument breaks the whole batch."""

    name = "batch"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def run_many(self, arguments: list[str]) -> list[str]:
        self.batches.append(arguments)
        if "bad" in arguments:
            raise ValueError("bad argument")
        return [argument.upper() for argument in arguments]

    def __call__(self, argument: str) -> str:
        return self.run_many([argument])[0]


def echo(argument: str) -> str:
    return argument


def hang(argument: str) -> str:
    threading.Event().wait()
    return argument


def leave(argument: str) -> str:
    sys.exit(3)


def test_retries_until_an_answer_comes() -> None:
    # Fails if an exception or an empty answer is not tried again.
    assert ToolBox([Flaky()], retries=2).run([ToolCall("flaky", "x")])[0].text == "got x"


def test_total_failure_is_told() -> None:
    empty = ToolBox([Flaky()], retries=1).run([ToolCall("flaky", "x")])[0]
    assert (empty.text, empty.ok) == ("Tool(flaky) returned empty output.", False)
    raised = ToolBox([Flaky()], retries=0).run([ToolCall("flaky", "x")])[0]
    assert (raised.text, raised.ok) == ("Tool(flaky) failed: OSError: broken pipe", False)


def test_a_hanging_tool_hangs_nothing() -> None:
    # Fails (by running for ever) if a try is waited for without a limit.
    results = ToolBox([hang, echo], retries=1, timeouts={"hang": 0.05}, workers=1).run(
        [ToolCall("hang", "x"), ToolCall("echo", "y")]
    )
    assert results[0].text == "Tool(hang) failed: TimeoutError: no answer within 0.05 seconds"
    assert results[1].text == "y" and results[1].ok


@pytest.fixture(scope="module")
def said_alone() -> list[str]:
    """Import the tools in a fresh interpreter, let one hang there, and end: heavy modules, and whether it answered."""
    code = (
        "import sys, threading\n"
        "from atpo_fast.environment import ToolBox, ToolCall\n"
        "def hang(argument: str) -> str:\n    threading.Event().wait()\n    return ''\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
        "print(ToolBox([hang], retries=0, timeout_seconds=0.05).run([ToolCall('hang', 'x')])[0].ok)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()


def test_a_hanging_tool_does_not_block_exit(said_alone: list[str]) -> None:
    # Fails (by time-out) if tries run in threads that the interpreter joins at its end.
    assert said_alone[1:] == ["False"]


def test_a_tool_that_exits_is_a_failure() -> None:
    assert (
        ToolBox([leave], retries=0).run([ToolCall("leave", "x")])[0].text
        == "Tool(leave) failed: RuntimeError: SystemExit: 3"
    )


def test_ten_megabytes_are_cut() -> None:
    toolbox = ToolBox([echo], max_chars=1000)
    assert toolbox.run([ToolCall("echo", "x" * 10_000_000)])[0].text == "x" * 1000


def test_calls_run_side_by_side() -> None:
    # Four calls that wait for each other: one after another they would all time out.
    barrier = threading.Barrier(4)

    def meet(argument: str) -> str:
        barrier.wait(timeout=120)
        return argument

    results = ToolBox([meet], retries=0, timeout_seconds=240, workers=4).run(
        [ToolCall("meet", str(i)) for i in range(4)]
    )
    assert [result.text for result in results] == ["0", "1", "2", "3"]


def test_identical_calls_run_once_and_order_is_kept() -> None:
    flaky = Flaky()
    calls = [ToolCall("flaky", "x"), ToolCall("echo", "y"), ToolCall("flaky", "x")]
    results = ToolBox([flaky, echo], retries=2).run(calls)
    assert [result.text for result in results] == ["got x", "y", "got x"]
    assert flaky.calls == 3  # twice a failure, once an answer: not six


def test_batches_and_a_bad_call_among_them() -> None:
    # Fails if one bad argument spoils the answers of its whole batch.
    tool = Batch()
    assert [r.text for r in ToolBox([tool]).run([ToolCall("batch", "a"), ToolCall("batch", "b")])] == ["A", "B"]
    assert tool.batches == [["a", "b"]]
    results = ToolBox([Batch()], retries=1).run([ToolCall("batch", "a"), ToolCall("batch", "bad")])
    assert [result.text for result in results] == ["A", "Tool(batch) failed: ValueError: bad argument"]


def test_bad_calls_are_answered() -> None:
    results = ToolBox([echo]).run([ToolCall("nothing", "x"), ToolCall("echo", "", "No.")])
    assert [result.text for result in results] == ["Tool(nothing) does not exist. Tools: echo.", "No."]
    assert ToolBox([]).run([]) == []


def test_the_tools_are_imported_fast(said_alone: list[str]) -> None:
    """Fails if importing the tools imports transformers or torch, which takes seconds."""
    assert said_alone[0] == "[]"


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="two tools are called 'echo'"):
        ToolBox([echo, echo])
    with pytest.raises(ValueError, match="cannot be a tag"):
        ToolBox([lambda argument: argument])


# ---- search

PASSAGES = [
    Passage(id="0", title="e17", text="The r2 of e17 is e5 ."),
    Passage(id="1", title="e5", text="The r1 of e5 is e17 ."),
    Passage(id="2", title="e9", text="The r2 of e9 is e31 ."),
    Passage(id="3", title="e9 again", text="The r2 of e9 is e31 ."),
]


def test_bm25_finds_and_formats() -> None:
    search = BM25Search(PASSAGES, top_k=2)
    assert search('r1 of "e5"').splitlines() == [
        'Page 1: "e5"',
        "The r1 of e5 is e17 .",
        'Page 2: "e17"',
        "The r2 of e17 is e5 .",
    ]
    # Passages without a word of the query are no hits, so there are fewer than top_k.
    assert search("e31 again").startswith('Page 1: "e9 again"')
    assert "Page 2" not in search("again")


@pytest.mark.parametrize("query", ["", "zebra", "the of is", '""', "?!"])  # nothing known, only stop words, no words
def test_bm25_without_hits(query: str) -> None:
    assert BM25Search(PASSAGES)(query) == "No search results found."


def test_bm25_is_deterministic_and_batched_alike() -> None:
    # 299 passages with equal scores, a better one last: fails if ties follow the sorting instead of the corpus.
    passages = [Passage(id=str(i), title=f"t{i}", text="same words" + " same" * (i == 299)) for i in range(300)]
    search = BM25Search(passages, top_k=3)
    pages = [line for line in search("same").splitlines() if line.startswith("Page")]
    assert pages == ['Page 1: "t299"', 'Page 2: "t0"', 'Page 3: "t1"']
    queries = ["t7 same", "t250", "words"]
    assert search.run_many(queries) == [search(query) for query in queries]


def test_bm25_drops_duplicates_cuts_and_limits() -> None:
    same = [Passage(id=str(i), title="t", text="word") for i in range(5)]
    other = [Passage(id=str(i), title=f"t{i}", text="word " * 100) for i in range(30)]
    assert BM25Search(same, top_k=5)("word") == 'Page 1: "t"\nword'
    pages = BM25Search(other, top_k=30, passage_chars=20)("word").split("Page ")[1:]
    assert len(pages) == 10  # the published limit
    assert all(len(page.split(": ", 1)[1].rstrip("\n")) <= 20 for page in pages)


def test_bm25_needs_passages() -> None:
    with pytest.raises(ValueError, match="corpus_files"):
        BM25Search([])


class _Retriever(BaseHTTPRequestHandler):
    """The published protocol; the query `bare` is answered without scores, `rude` with an error."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if "rude" in body["queries"]:
            return self.send_error(500)
        documents = [{"id": "1", "contents": '"A"\nfirst'}, {"title": "B", "text": "second"}]
        hits: list[Any] = [
            documents if q == "bare" else [{"document": d, "score": 1.0} for d in documents] for q in body["queries"]
        ]
        answer = json.dumps({"wrong": 1} if "odd" in body["queries"] else {"result": hits}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def retriever() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Retriever)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/retrieve"
    server.shutdown()
    server.server_close()


def test_http_search_speaks_the_protocol(retriever: str) -> None:
    search = HTTPSearch(retriever, top_k=2)
    expected = 'Page 1: "A"\nfirst\nPage 2: "B"\nsecond'
    _Retriever.bodies.clear()
    assert search.run_many(['who "is" A', "bare"]) == [expected, expected]
    assert _Retriever.bodies == [{"queries": ["who is A", "bare"], "topk": 2, "return_scores": True}]


def test_http_search_goes_past_the_proxies(retriever: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a proxy in the environment is asked for a server of the local network."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert HTTPSearch(retriever)("fine").startswith("Page 1:")


def test_http_errors_become_observations(retriever: str) -> None:
    toolbox = ToolBox(
        [
            HTTPSearch(retriever),
        ],
        retries=1,
    )
    texts = [toolbox.run([ToolCall("search", query)])[0].text for query in ("rude", "odd", "fine")]
    assert texts[0].startswith("Tool(search) failed: ConnectionError: retrieval server")
    assert texts[1].startswith("Tool(search) failed: ValueError: retrieval server")
    assert texts[2].startswith("Page 1:")


def test_http_server_that_is_not_there() -> None:
    toolbox = ToolBox([HTTPSearch("http://127.0.0.1:9/retrieve")], retries=0)
    assert "ConnectionError" in toolbox.run([ToolCall("search", "x")])[0].text


# ---- the configured tools


def test_make_toolbox() -> None:
    config = ToolsConfig(builtin=["search", "python"], top_k=1)
    toolbox = make_toolbox(config, PASSAGES)
    assert toolbox.names == ("search", "python")
    results = toolbox.run([ToolCall("search", "r1 e5"), ToolCall("python", "6 * 7")])
    assert [result.text for result in results] == ['Page 1: "e5"\nThe r1 of e5 is e17 .', "42"]
    with pytest.raises(ValueError, match="passages"):
        make_toolbox(ToolsConfig(), [])
    assert make_toolbox(ToolsConfig(search_backend="http"), []).names == ("search",)
