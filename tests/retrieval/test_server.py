"""The retrieval server on the wire: both published answer shapes, batching, cache, and the verb as a user meets it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.commands.cli import main
from atpo_fast.data.questions import Passage
from atpo_fast.environment import BM25Search, HTTPSearch
from atpo_fast.retrieval import BM25Settings, Retriever, build_index, open_index
from atpo_fast.retrieval.batching import Batcher
from atpo_fast.retrieval.server import listen
from tests.helpers.retrieval_cases import random_queries, random_rows, write_corpus
from tests.helpers.retrieval_server import Running

ROOT = Path(__file__).resolve().parents[2]
ROWS = random_rows(50)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    folder = tmp_path_factory.mktemp("server")
    build_index(folder / "i", [write_corpus(folder / "c.jsonl", ROWS)], BM25Settings(shard_passages=20))
    return open_index(folder / "i")


@pytest.fixture(scope="module")
def server(retriever: Retriever) -> Running:
    return Running(retriever, topk=2)


def test_the_published_clients_request(server: Running, retriever: Retriever) -> None:
    """Fails if the shape with scores, the stored fields or the order differ from the published server's."""
    status, answer = server.post({"queries": ["w3"], "topk": 3, "return_scores": True})
    hits = retriever.hits(["w3"], 3)[0]
    assert status == 200
    assert answer == {"result": [[{"document": ROWS[hit.number], "score": hit.score} for hit in hits]]}
    assert hits[0].score >= hits[1].score > 0


def test_bare_documents_and_the_defaults(server: Running, retriever: Retriever) -> None:
    """Fails if no `return_scores` is not false, or if topk missing, null or 0 is not the server's default."""
    bare = [[ROWS[hit.number] for hit in hits] for hits in retriever.hits(["w3", "w1 w2"], 2)]
    for extra in ({}, {"topk": None}, {"topk": 0}, {"topk": 2, "return_scores": False}):
        assert server.post({"queries": ["w3", "w1 w2"], **extra}) == (200, {"result": bare})


def test_queries_without_hits_and_odd_queries(server: Running) -> None:
    status, answer = server.post({"queries": ["", "nothing", '"quoted" w3', "w3\0\ud83d"[:3], "é" * 10_000]})
    assert status == 200
    assert [len(hits) for hits in answer["result"]] == [0, 0, 2, 2, 0]
    assert server.post({"queries": []}) == (200, {"result": []})
    assert len(server.post({"queries": ["w1"], "topk": 1000})[1]["result"][0]) <= len(ROWS)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "w3"},
        {"queries": ["w3"], "query": "w3"},
        {"query": None},
        {"query": ["w3"]},
        {"queries": ["w3"], "return_scores": 1},
        {"queries": [1]},
        {"queries": ["w3"], "topk": "many"},
        {"queries": ["w3"], "topk": -1},
        {"queries": ["w3"], "topk": 10**9},
        {"queries": ["w3"], "return_scores": "perhaps"},
        [],
        b"{",
        b"",
    ],
)
def test_invalid_bodies_are_422(server: Running, body: Any) -> None:
    status, answer = server.post(body)
    assert status == 422 and "detail" in answer


def test_health(server: Running) -> None:
    with urllib.request.urlopen(f"{server.url}/health", timeout=120) as response:
        assert json.load(response) == {"status": "ok", "index": "bm25", "passages": 50, "topk": 2}


def test_our_client_finds_what_memory_finds(server: Running) -> None:
    """Fails if results through HTTP, of many requests at once, differ from those in process."""
    texts = [row["contents"].split("\n", 1) for row in ROWS]
    memory = BM25Search([Passage(id="", title=title[1:-1], text=text) for title, text in texts], top_k=3)
    client, queries = HTTPSearch(f"{server.url}/retrieve", top_k=3), random_queries(40)
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda query=query: found.update({query: client(query)})) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[query] for query in queries] == memory.run_many(queries)


class Broken:
    """An index that fails for one query."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def search(self, queries: Sequence[str], k: int) -> Any:
        if "bad" in queries:
            raise RuntimeError("broken")
        return self.index.search(queries, k)

    def __len__(self) -> int:
        return len(self.index)


def test_a_failed_search_is_500_and_the_server_goes_on(retriever: Retriever) -> None:
    """Fails if an error in a search ends the batching, so that later requests wait for ever."""
    running = Running(Retriever("bm25", Broken(retriever.index), retriever.documents))
    assert running.post({"queries": ["bad"]})[0] == 500
    assert running.post({"queries": ["w3"]})[0] == 200


# --- batching


class Calls:
    """A search that notes its calls; the first one waits until it is released."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.go = threading.Event()

    def __call__(self, queries: Sequence[str], k: int) -> list[str]:
        self.calls.append((list(queries), k))
        assert self.go.wait(120)
        return [f"{query}/{k}" for query in queries]


def test_concurrent_queries_are_one_search() -> None:
    """Fails if requests that come together are searched one by one, if equal queries are searched twice, if queries
    with another k are mixed in, or if a batch grows beyond its limit."""

    async def run() -> None:
        search = Calls()
        search.go.set()
        batcher = Batcher(search, weigh=len, wait_seconds=0.05, max_batch=3)
        asked = [(["a", "b"], 2), (["b"], 2), (["c"], 1), (["d", "e"], 2)]
        answers = await asyncio.gather(*(batcher.answer(queries, k) for queries, k in asked))
        assert answers == [["a/2", "b/2"], ["b/2"], ["c/1"], ["d/2", "e/2"]]
        assert search.calls == [(["a", "d", "b"], 2), (["c"], 1), (["e"], 2)]
        batcher.close()

    asyncio.run(run())


def test_queries_that_come_during_a_search_are_the_next_one() -> None:
    async def run() -> None:
        search = Calls()
        batcher = Batcher(search, weigh=len, wait_seconds=0)
        tasks = [asyncio.create_task(batcher.answer(["a"], 1))]
        while not search.calls:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher.answer([query], 1)) for query in ("b", "a", "c")]
        await asyncio.sleep(0.01)
        search.go.set()
        assert await asyncio.gather(*tasks) == [["a/1"], ["b/1"], ["a/1"], ["c/1"]]
        assert search.calls == [(["a"], 1), (["b", "c"], 1)]
        batcher.close()

    asyncio.run(run())


def test_a_request_that_gives_up_takes_no_other_with_it() -> None:
    """Fails if a cancelled request cancels the search that another one waits for."""

    async def run() -> None:
        search = Calls()
        batcher = Batcher(search, weigh=len, wait_seconds=0)
        tasks = [asyncio.create_task(batcher.answer(["a"], 1)) for _ in range(2)]
        while not search.calls:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        search.go.set()
        assert await tasks[1] == ["a/1"]
        batcher.close()

    asyncio.run(run())


def test_the_cache_forgets_what_was_asked_longest_ago() -> None:
    """Fails if answers are not remembered, if the cache grows without bound, or if use does not keep an entry."""

    async def run() -> None:
        search = Calls()
        search.go.set()
        batcher = Batcher(search, weigh=lambda answer: 1 << 20, wait_seconds=0, cache_bytes=(2 << 20) + 1000)
        for query in ("a", "b", "a", "c", "a", "b"):
            assert await batcher.answer([query], 1) == [f"{query}/1"]
        assert [queries[0] for queries, _ in search.calls] == ["a", "b", "c", "b"]
        await batcher.answer(["b"], 2)
        assert search.calls[-1] == (["b"], 2)
        batcher.close()

    asyncio.run(run())


def test_failures_are_not_remembered() -> None:
    async def run() -> None:
        failing = [True]

        def search(queries: Sequence[str], k: int) -> list[str]:
            if failing:
                failing.clear()
                raise OSError("once")
            return list(queries)

        batcher = Batcher(search, weigh=len, wait_seconds=0)
        with pytest.raises(OSError, match="once"):
            await batcher.answer(["a"], 1)
        assert await batcher.answer(["a"], 1) == ["a"]
        batcher.close()

    asyncio.run(run())


# --- the verb


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "atpo_fast", "retriever", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The verb over a corpus, its index in the default folder, and the address that it printed."""
    write_corpus(tmp_path / "c.jsonl.gz", ROWS)
    process = subprocess.Popen(
        command("--corpus", "c.jsonl.gz", "--port", "0"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in the background
    )
    assert process.stdout
    line = next(line for line in process.stdout if "ready" in line)
    yield process, line.split()[2]
    process.kill()
    process.communicate()


def test_the_verb_builds_serves_and_ends(
    started: tuple[subprocess.Popen[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Fails if the printed address does not answer, if Ctrl-C ends in a traceback, or if a port that is in use is told
    by one, or only after the build."""
    process, url = started
    assert HTTPSearch(url)("w3").startswith("Page 1:")
    write_corpus(tmp_path / "d.jsonl", ROWS)
    port = url.split(":")[2].split("/")[0]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert main(["retriever", "--corpus", "d.jsonl", "--port", port]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: cannot listen at 127.0.0.1:") and said.count("\n") == 1
    assert not (tmp_path / "runs" / "indexes" / "d-bm25").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "retriever stopped\n")
    assert (tmp_path / "runs" / "indexes" / "c-bm25" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs --corpus FILE"),
        (("--corpus", "none.jsonl", "--port", "0"), "none.jsonl does not exist"),
        (("--index-dir", "none", "--port", "0"), "no index"),
        (("--corpus", "bad.jsonl", "--build-only"), "no passages found"),
        (("--corpus", "c.jsonl", "--index", "dense"), "needs --encoder"),
        (("--corpus", "c.jsonl", "--port", "99999"), "cannot listen"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    write_corpus(tmp_path / "c.jsonl", ROWS[:3])
    (tmp_path / "bad.jsonl").write_text('{"title": "x"}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["retriever", *arguments]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_listening_on_ipv6() -> None:
    try:
        bound = listen("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    assert bound.family == socket.AF_INET6
    bound.close()
