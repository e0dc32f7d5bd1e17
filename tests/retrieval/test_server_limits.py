"""The retrieval server under requests that take too much: each is refused in words, and others are answered."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.common.errors import ConfigError
from atpo_fast.config.retrieval import MAX_QUERY_CHARS, BM25Settings, ServerLimits
from atpo_fast.environment.search import HTTPSearch, clean_query
from atpo_fast.retrieval import Retriever, build_index, open_index
from atpo_fast.retrieval.batching import Batcher
from tests.helpers.retrieval_cases import random_rows, write_corpus
from tests.helpers.retrieval_server import Running

ROWS = random_rows(50)
LIMITS = ServerLimits(
    body_bytes=4000, held_bytes=6000, queries=5, query_chars=100, hits=20, read_seconds=0.3, answer_seconds=600
)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("limits")
    build_index(folder / "i", [write_corpus(folder / "c.jsonl", ROWS)], BM25Settings())
    return open_index(folder / "i")


@pytest.fixture(scope="module")
def server(retriever: Retriever) -> Running:
    return Running(retriever, topk=2, limits=LIMITS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"queries": ["w1"] * 6}, "a request may have 5 queries, not 6"),
        ({"queries": ["w1", "w" * 101]}, "a query may have 100 characters, not 101"),
        ({"query": "w" * 101}, "a query may have 100 characters, not 101"),
        ({"queries": ["w1"] * 5, "topk": 5}, "a request may have 20 hits, not 5 queries times topk=5"),
        (b" " * 5000, "the body may have 4,000 bytes"),
        (b"[" * 4000, None),  # nested deeper than a parser wants to go
        (b'{"queries": ["\xff"]}', None),
        (b'{"queries": ["\\ud800"]}', None),  # half a character
        (b'{"queries": ["w1"], "topk": ' + b"9" * 3000 + b"}", None),
    ],
)
def test_what_is_too_much_is_refused(server: Running, body: Any, words: str | None) -> None:
    """Fails if a limit is not kept, if a refusal does not say which, or if the server does not answer after it."""
    status, answer = server.post(body)
    assert status == (422 if words is None else 413)
    assert words is None or answer == {"detail": words}
    assert server.post({"queries": ["w1"] * 5, "topk": 4})[0] == 200


def test_a_single_query_as_skyrl_gym_posts_it(server: Running) -> None:
    """Fails if `query` is not the same request as `queries` with one entry."""
    for scores in (True, False):
        one = server.post({"query": "w3 w1", "topk": 2, "return_scores": scores})
        assert one[0] == 200 and one == server.post({"queries": ["w3 w1"], "topk": 2, "return_scores": scores})


def read_to_the_end(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    connection.settimeout(120)
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /retr", b""),
        (b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he", b"HTTP/1.1 200"),
    ],
    ids=["nothing", "half a head", "half a body", "half a second request"],
)
def test_half_sent_requests_are_dropped(server: Running, sent: bytes, answer: bytes) -> None:
    """Fails (by never ending) if a client that stops sending keeps its connection for ever."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(sent)
        assert read_to_the_end(connection).startswith(answer)


def test_bodies_of_all_requests_are_bounded(server: Running) -> None:
    """Fails if many clients together can make the server hold more than it may."""
    head = b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 3900\r\n\r\n" + b" " * 3800
    connections = [socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) for _ in range(3)]
    for connection in connections:
        connection.sendall(head)
    answers = [read_to_the_end(connection)[:12] for connection in connections]
    assert b"HTTP/1.1 503" in answers
    assert server.post({"queries": ["w1"]})[0] == 200  # nothing is held any more


def test_a_token(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server with a token answers without it, or our client does not send it, or prints it."""
    url = Running(retriever, token="correct horse").url
    monkeypatch.setenv("SEARCH_TOKEN", "correct horse")
    monkeypatch.setenv("OTHER_TOKEN", "battery staple")
    assert HTTPSearch(f"{url}/retrieve", token_variable="SEARCH_TOKEN")("w3").startswith("Page 1:")
    for variable in ("OTHER_TOKEN", None):
        with pytest.raises(ConnectionError, match=r"status 401: .*Authorization must be Bearer") as caught:
            HTTPSearch(f"{url}/retrieve", token_variable=variable)("w3")
        assert "staple" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"tools\.search_token_variable=NO_TOKEN: the environment variable is empty"):
        HTTPSearch(url, token_variable="NO_TOKEN")
    with urllib.request.urlopen(f"{url}/health", timeout=120) as response:
        assert json.load(response)["status"] == "ok"


def test_our_client_keeps_the_limit_of_a_query() -> None:
    """Fails if a policy that repeats itself has its search refused by our own server."""
    assert len(clean_query('"' + "w " * 100_000)) == MAX_QUERY_CHARS <= ServerLimits().query_chars


def test_an_address_with_a_password_is_not_printed() -> None:
    """Fails if the password of an address is in an error, which becomes a line of a log and text of a trajectory."""
    with pytest.raises(ConnectionError) as caught:
        HTTPSearch("http://me:hunter2@127.0.0.1:9/retrieve")("x")
    assert "hunter2" not in str(caught.value) and "127.0.0.1:9" in str(caught.value)


# --- one request against others


class Gated:
    """An index that notes what it searches, and waits at each search until it is let go."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.searched: list[list[str]] = []
        self.go = threading.Event()

    def search(self, queries: Sequence[str], k: int) -> Any:
        self.searched.append(list(queries))
        assert self.go.wait(120)
        return self.index.search(queries, k)

    def __len__(self) -> int:
        return len(self.index)


def test_a_client_that_left_is_searched_no_further(retriever: Retriever) -> None:
    """Fails if the searches of a request go on when nobody reads the answer."""
    gated = Gated(retriever.index)
    running = Running(Retriever("bm25", gated, retriever.documents), max_batch=1)
    body = json.dumps({"queries": [f"w{i}" for i in range(100)]}).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        while not gated.searched:
            time.sleep(0.001)
    with urllib.request.urlopen(f"{running.url}/health", timeout=120):  # the loop has seen the closed connection
        pass
    gated.go.set()
    assert running.post({"queries": ["w3"]})[0] == 200
    assert len(gated.searched) <= 3  # the one that had begun, at most one more, and this one


def test_one_large_request_delays_others_by_one_search() -> None:
    """Fails if a request of many queries, or of long ones, is searched as a whole before anybody else's."""

    async def run() -> None:
        searched: list[list[str]] = []

        def search(queries: Sequence[str], k: int) -> list[str]:
            searched.append(list(queries))
            return list(queries)

        batcher = Batcher(search, weigh=len, wait_seconds=0, max_batch=8, batch_chars=1000, cache_bytes=0)
        large = asyncio.create_task(batcher.answer([f"l{i}" for i in range(100)], 1))
        long = asyncio.create_task(batcher.answer([f"{i}" * 900 for i in range(10)], 1))
        small = asyncio.create_task(batcher.answer(["s"], 1))
        assert await small == ["s"] and await large and await long
        assert "s" in searched[0] + searched[1]
        assert all(sum(map(len, queries)) < 2000 for queries in searched)

    asyncio.run(run())


def test_a_query_that_two_requests_ask_is_searched_though_one_left() -> None:
    """Fails if a request that is cancelled takes a query with it that another waits for, or one is searched twice."""

    async def run() -> None:
        searched: list[str] = []

        def search(queries: Sequence[str], k: int) -> list[str]:
            searched.extend(queries)
            return list(queries)

        batcher = Batcher(search, weigh=len, wait_seconds=0.01, cache_bytes=0)
        first = asyncio.create_task(batcher.answer(["a", "b"], 1))
        second = asyncio.create_task(batcher.answer(["b", "c"], 1))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(batcher.answer(["a", "c", "a"], 1))
        assert await second == ["b", "c"] and await third == ["a", "c", "a"]
        assert sorted(searched) == ["a", "b", "c"]
        batcher.close()

    asyncio.run(run())


def test_the_verb_needs_the_token_it_was_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the verb starts without the token that it was told to ask for."""
    from atpo_fast.commands.cli import main

    monkeypatch.delenv("NO_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["retriever", "--index-dir", "none", "--token-variable", "NO_TOKEN", "--port", "0"]) == 2
