"""Results of tools kept on disk, so that a call that was answered once is not repeated."""

from __future__ import annotations

import gzip
import inspect
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from atpo_fast.environment.search import clean_query

_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 30.0
_TABLES = """
create table if not exists results (
    key blob primary key, tool text not null, argument text not null, text text not null, bytes integer not null
) without rowid;
create table if not exists ages (number integer primary key autoincrement, key blob not null);
create table if not exists total (bytes integer not null);
insert into total select 0 where not exists (select * from total);
"""


class ResultCache:
    """A cache of answers in an SQLite file. Several processes and threads may read and write it at once.

    When the answers pass `max_mb`, the oldest are dropped. A fault of the file or disk while it is used is logged once
    and costs only the caching. The file has to be on a disk whose locks work (not every network file system's do).

    Raises:
        ValueError: the file exists and is no such cache, or cannot be created.
    """

    def __init__(self, path: str | Path, *, max_mb: float = 1024.0) -> None:
        self.path = Path(path)
        self.max_bytes = int(max_mb * (1 << 20))
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0  # whose connection it is: none may be used after a fork
        self._warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._connect()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"tools.cache={self.path}: the cache of tool results cannot be used ({error}); name a new file, or one "
                "that a run has written as its cache"
            ) from error

    def get(self, key: bytes) -> str | None:
        """Return the answer under a key, or None."""
        with self._lock:
            try:
                row = self._connect().execute("select text from results where key = ?", (key,)).fetchone()
            except sqlite3.Error as error:
                self._warn(error)
                return None
        return None if row is None else str(row[0])

    def put(self, key: bytes, tool: str, argument: str, text: str) -> None:
        """Keep an answer; the first one stays."""
        size = len(text.encode(errors="surrogatepass")) + len(argument.encode(errors="surrogatepass")) + 64
        with self._lock:
            try:
                connection = self._connect()
                with connection:
                    connection.execute("begin immediate")
                    row = (key, tool, argument, text, size)
                    if connection.execute("insert or ignore into results values (?, ?, ?, ?, ?)", row).rowcount:
                        connection.execute("insert into ages (key) values (?)", (key,))
                        connection.execute("update total set bytes = bytes + ?", (size,))
                        self._drop_oldest(connection)
            except (sqlite3.Error, UnicodeError) as error:
                self._warn(error)

    def __len__(self) -> int:
        with self._lock:
            return int(self._connect().execute("select count(*) from results").fetchone()[0])

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None or self._process != os.getpid():
            self._inherited = self._connection  # kept: closing it would disturb the process that it was copied from
            # Transactions are begun by hand; the lock lets one thread at a time in.
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
            _use_write_ahead_log(connection)
            connection.executescript(f"begin immediate; {_TABLES} commit;")
            self._connection, self._process = connection, os.getpid()
        return self._connection

    def _drop_oldest(self, connection: sqlite3.Connection) -> None:
        """Make room down to nine tenths, so that not every answer has to drop one."""
        (total,) = connection.execute("select bytes from total").fetchone()
        if total <= self.max_bytes:
            return
        oldest = "select number, ages.key, bytes from ages join results using (key) order by number limit 1"
        while total > 0.9 * self.max_bytes and (row := connection.execute(oldest).fetchone()):
            number, key, size = row
            connection.execute("delete from results where key = ?", (key,))
            connection.execute("delete from ages where number = ?", (number,))
            total -= size
        connection.execute("update total set bytes = ?", (total,))

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("the cache of tool results %s failed and is passed by: %s", self.path, error)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Let readers never wait for a writer. SQLite itself does not wait for its turn to switch, so this does."""
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            break
        except sqlite3.OperationalError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.01)
    connection.execute("pragma synchronous = normal")


class CachedTool:
    """A tool whose answers are looked up before it is called. Failures (exceptions, no text) are never kept.

    Args:
        tool: what is called for what is not known.
        cache: where answers are kept; none: nothing is.
        settings: everything besides name and argument that the answer depends on.
        published: answers by query that are looked up first (`read_published_cache`).
    """

    def __init__(
        self,
        tool: Any,
        cache: ResultCache | None,
        *,
        settings: Mapping[str, Any],
        published: Mapping[str, str] | None = None,
    ) -> None:
        self.tool = tool
        self.cache = cache
        self.published = published or {}
        self.name: str = tool.name
        self.description = getattr(tool, "description", None) or (inspect.getdoc(type(tool)) or "").partition("\n\n")[0]
        self.parameters = getattr(tool, "parameters", None)
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        if hasattr(tool, "run_many"):
            self.run_many: Callable[[list[str]], list[Any]] = self._run_many

    def __call__(self, argument: str) -> str | Awaitable[Any] | Any:
        """Return a known answer, or the tool's."""
        known = self._get(argument)
        if known is not None:
            return known
        answer = self.tool(argument)
        return self._await(argument, answer) if inspect.isawaitable(answer) else self._keep(argument, answer)

    def close(self) -> None:
        """Close the tool and the cache file."""
        for part in (self.tool, self.cache):
            if part is not None and hasattr(part, "close"):
                part.close()

    def _run_many(self, arguments: list[str]) -> list[Any]:
        answers: dict[str, Any] = {argument: self._get(argument) for argument in arguments}
        missing = [argument for argument, answer in answers.items() if answer is None]
        if missing:
            found: Sequence[Any] = self.tool.run_many(missing)
            if len(found) != len(missing):
                raise ValueError(f"run_many answered {len(found)} of {len(missing)} calls")
            answers.update({a: self._keep(a, answer) for a, answer in zip(missing, found, strict=True)})
        return [answers[argument] for argument in arguments]

    def _get(self, argument: str) -> str | None:
        for query in (argument, clean_query(argument)) if self.published else ():
            if query in self.published:
                return self.published[query]
        return None if self.cache is None else self.cache.get(self._key(argument))

    def _keep(self, argument: str, answer: Any) -> Any:
        if self.cache is not None and isinstance(answer, str) and answer.strip():
            self.cache.put(self._key(argument), self.name, argument, answer)
        return answer

    async def _await(self, argument: str, answer: Awaitable[Any]) -> Any:
        return self._keep(argument, await answer)

    def _key(self, argument: str) -> bytes:
        text = json.dumps([self.name, self._settings, argument])
        return blake2b(text.encode(), digest_size=20).digest()


_FORM = 'it must be a JSON object {"query": "result", ...}, in a file .json or .json.gz'


def read_published_cache(path: str | Path) -> dict[str, str]:
    """Read the search cache that the published code writes: a JSON object `{query: formatted result}`, `.gz` or not.

    Raises:
        ValueError: no such file, or not of this form.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"tools.published_cache={path}: cannot be read ({error}); {_FORM}") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"tools.published_cache={path}: {_FORM}")
    return {query: text for query, text in content.items() if text.strip()}
