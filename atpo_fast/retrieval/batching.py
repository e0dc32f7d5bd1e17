"""Batch the queries of concurrent requests into one search, and cache the answers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[str, int]  # query, number of hits


class Batcher(Generic[T]):
    """A queue of queries that searches them in one call on a thread, and caches the answers last asked for.

    The first query waits `wait_seconds` for others. Those that come during a search are the next batch and wait no
    longer. Equal queries that wait at the same time are searched once. All methods belong to one event loop.

    Args:
        search: function from `(queries, k)` to one answer a query; called by one thread.
        wait_seconds: time for which the first query of a batch waits.
        max_batch: number of queries of one search, at most.
        cache_size: number of answers cached; 0 is none.
    """

    def __init__(
        self,
        search: Callable[[Sequence[str], int], Sequence[T]],
        *,
        wait_seconds: float = 0.002,
        max_batch: int = 256,
        cache_size: int = 10_000,
    ) -> None:
        self._search = search
        self._wait_seconds = wait_seconds
        self._max_batch = max_batch
        self._cache_size = cache_size
        self._cache: OrderedDict[Key, T] = OrderedDict()
        self._asked: dict[Key, asyncio.Future[T]] = {}  # queries not answered yet
        self._waiting: list[Key] = []  # those of them that no search has taken up
        self._worker: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")

    async def answer(self, queries: Sequence[str], k: int) -> list[T]:
        """Return one answer a query. Raises what the search raises."""
        found: list[T | asyncio.Future[T]] = [self._find((query, k)) for query in queries]
        if waited := {entry for entry in found if isinstance(entry, asyncio.Future)}:
            await asyncio.wait(waited)  # unlike gather, does not cancel them when this request is cancelled
        return [entry.result() if isinstance(entry, asyncio.Future) else entry for entry in found]

    def close(self) -> None:
        """Stop the search thread; queries that wait are cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _find(self, key: Key) -> T | asyncio.Future[T]:
        """Return the cached answer, or the future that will hold it."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if key not in self._asked:
            self._asked[key] = asyncio.get_running_loop().create_future()
            self._waiting.append(key)
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())
        return self._asked[key]

    async def _work(self) -> None:
        """Search batch after batch until no query waits."""
        await asyncio.sleep(self._wait_seconds)
        while self._waiting:
            k = self._waiting[0][1]
            batch = [key for key in self._waiting if key[1] == k][: self._max_batch]
            taken = set(batch)
            self._waiting = [key for key in self._waiting if key not in taken]
            try:
                queries = [query for query, _ in batch]
                answers = await asyncio.get_running_loop().run_in_executor(self._executor, self._search, queries, k)
                self._settle(zip(batch, answers, strict=True))
            except Exception as error:
                for key in batch:
                    if (future := self._asked.pop(key, None)) is not None:
                        future.set_exception(error)

    def _settle(self, answered: Iterable[tuple[Key, T]]) -> None:
        """Resolve the futures of answered queries, and cache the answers."""
        for key, answer in answered:
            self._asked.pop(key).set_result(answer)
            if self._cache_size:
                self._cache[key] = answer
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
