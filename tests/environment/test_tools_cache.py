"""Results on disk: found again by any process, never a failure, bounded, and no reason to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.config import ToolsConfig
from atpo_fast.data.questions import Passage
from atpo_fast.environment import BM25Search, CachedTool, ResultCache, ToolBox, ToolCall, make_toolbox
from atpo_fast.environment.result_cache import read_published_cache
from tests.helpers.forked_runs import SERVER


class Upper:
    """Counts its calls; fails for `bad`, answers nothing to `none` and `blank`."""

    name = "search"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, argument: str) -> Any:
        self.asked.append(argument)
        if argument == "bad":
            raise OSError("down")
        return {"none": None, "blank": " "}.get(argument, argument.upper())


class Many(Upper):
    """The same in batches."""

    def run_many(self, arguments: list[str]) -> list[Any]:
        return [self(argument) for argument in arguments]


def cached(path: Path, tool: Any, **settings: Any) -> CachedTool:
    return CachedTool(tool, ResultCache(path), settings=settings)


def test_answers_are_found_again(tmp_path: Path) -> None:
    """Fails if a second run asks again, or other settings get the first ones' answers."""
    path = tmp_path / "deep" / "cache.sqlite"
    first, second, other = Upper(), Upper(), Upper()
    assert [cached(path, first, top_k=3)(query) for query in ("a", "b", "a")] == ["A", "B", "A"]
    assert first.asked == ["a", "b"]
    assert cached(path, second, top_k=3)("a") == "A" and second.asked == []
    assert cached(path, other, top_k=5)("a") == "A" and other.asked == ["a"]
    other.name = "find"
    assert cached(path, other, top_k=3)("a") == "A" and other.asked == ["a", "a"]


def test_failures_are_not_kept(tmp_path: Path) -> None:
    """Fails if an outage of the server is remembered."""
    tool = Upper()
    kept = cached(tmp_path / "c", tool)
    with ToolBox([kept], retries=1, backoff_seconds=0) as toolbox:
        for _ in range(2):
            results = toolbox.run([ToolCall("search", argument) for argument in ("bad", "none", "blank")])
            assert not any(result.ok for result in results)
        assert sorted(tool.asked) == ["bad"] * 4 + ["blank"] * 4 + ["none"] * 4
    assert kept.cache is not None and len(kept.cache) == 0


def test_a_batch_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    tool = Many()
    kept = cached(tmp_path / "c", tool)
    assert kept.run_many(["a", "b"]) == ["A", "B"]
    assert kept.run_many(["c", "a", "none", "c"]) == ["C", "A", None, "C"]
    assert tool.asked == ["a", "b", "c", "none"]
    assert not hasattr(cached(tmp_path / "c", Upper()), "run_many")


def test_coroutines_are_kept_too(tmp_path: Path) -> None:
    asked = []

    class Later:
        name = "later"

        async def __call__(self, argument: str) -> str:
            asked.append(argument)
            await asyncio.sleep(0)
            return argument.upper()

    with ToolBox([cached(tmp_path / "c", Later())]) as toolbox:
        assert [toolbox.run([ToolCall("later", "a")])[0].text for _ in range(2)] == ["A", "A"]
    assert asked == ["a"]


def write_many(path: str, first: int, done: Any) -> None:
    cache = ResultCache(path)
    for number in range(first, first + 100):
        cache.put(b"%d" % number, "t", str(number), f"answer {number}")
        cache.put(b"shared", "t", "shared", "same")
        assert cache.get(b"%d" % number) == f"answer {number}"
    done.put(first)


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    """Fails if writers lock each other out, lose answers, or damage the file."""
    path, done = str(tmp_path / "cache.sqlite"), SERVER.Queue()
    # Overlapping ranges, and a file that all of them make at once.
    processes = [SERVER.Process(target=write_many, args=(path, 50 * i, done)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    cache = ResultCache(path)
    assert len(cache) == 250 + 1
    assert all(cache.get(b"%d" % number) == f"answer {number}" for number in range(250))
    connection = sqlite3.connect(path)
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    assert (
        connection.execute("select bytes from total").fetchone()
        == connection.execute("select sum(bytes) from results").fetchone()
    )
    connection.close()


def test_a_forked_process_opens_the_file_again(tmp_path: Path) -> None:
    """Fails if a connection is used in two processes, which SQLite forbids."""
    cache = ResultCache(tmp_path / "c")
    cache.put(b"1", "t", "a", "before")
    child = os.fork()
    if child == 0:
        cache.put(b"2", "t", "b", "child")
        os._exit(0 if cache.get(b"1") == "before" and cache._process == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0
    cache.put(b"3", "t", "c", "after")
    assert [cache.get(key) for key in (b"1", b"2", b"3")] == ["before", "child", "after"]


def test_the_size_is_bounded(tmp_path: Path) -> None:
    """Fails if the cache grows without end, or new answers are dropped instead of old ones."""
    cache = ResultCache(tmp_path / "c", max_mb=1)
    for number in range(500):
        cache.put(b"%d" % number, "t", str(number), "x" * 10_000)
    assert 80 < len(cache) < 105
    assert cache.get(b"499") and not cache.get(b"0")
    cache.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6 << 20


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 1000)
    with pytest.raises(ValueError, match=r"text: the cache of tool results cannot be used \(file is not a database"):
        ResultCache(tmp_path / "text")
    with pytest.raises(ValueError, match="cannot be used"):
        ResultCache(tmp_path / "text" / "below")


def test_a_cache_that_breaks_is_passed_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a full disk or a damaged file stops a rollout, or says so at every call."""
    tool = Upper()
    kept = cached(tmp_path / "c", tool)
    connection = sqlite3.connect(tmp_path / "c")
    connection.execute("drop table results")
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert [kept("a"), kept("a"), kept("\ud800")] == ["A", "A", "\ud800"]
    assert tool.asked == ["a", "a", "\ud800"]
    assert len([record for record in caplog.records if "is passed by" in record.message]) == 1


# ---- the published cache


def test_the_published_cache_comes_first(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps({"who is it": "Page 1: me", "empty": ""}))
    tool = Upper()
    published = read_published_cache(tmp_path / "search.json")
    kept = CachedTool(tool, None, settings={}, published=published)
    assert kept("who is it") == kept('who "is" it') == "Page 1: me"
    assert kept("empty") == "EMPTY" and kept("else") == "ELSE"
    assert tool.asked == ["empty", "else"]


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "{", ""])
def test_bad_published_caches(tmp_path: Path, text: str) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(ValueError, match=r"tools\.published_cache=.*search\.json"):
        read_published_cache(tmp_path / "search.json")
    (tmp_path / "search.json.gz").write_text(text)
    with pytest.raises(ValueError, match=r"search\.json\.gz"):
        read_published_cache(tmp_path / "search.json.gz")


@pytest.mark.data
def test_the_real_published_cache() -> None:
    folder = os.environ.get("ATPO_DATA")
    if not folder:
        pytest.skip("ATPO_DATA is not set")
    published = read_published_cache(Path(folder) / "cache" / "arpo_bing_search_cache1000.json.gz")
    assert len(published) == 1000
    query = "Amy Smart film debut Campfire Tales"
    answer = CachedTool(Upper(), None, settings={}, published=published)(query)
    assert isinstance(answer, str)
    assert answer.startswith("Page 1: The film is made up")


# ---- from the configuration

PASSAGES = [Passage(id="0", title="e17", text="The r2 of e17 is e5 ."), Passage(id="1", title="e5", text="nothing")]


def test_a_configured_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the search is asked again in a second run, or a run on another corpus gets the first one's answers."""
    config = ToolsConfig(cache=str(tmp_path / "c"))
    asked: list[str] = []
    search = BM25Search.__call__
    monkeypatch.setattr(BM25Search, "__call__", lambda self, a: (asked.append(a), search(self, a))[1])
    for passages, texts in (
        (PASSAGES, 'Page 1: "e17"\nThe r2 of e17 is e5 .'),
        (PASSAGES[1:], "No search results found."),
    ):
        for _ in range(2):
            with make_toolbox(config, passages) as toolbox:
                assert toolbox.run([ToolCall("search", "r2")])[0].text == texts
    assert asked == ["r2", "r2"]
