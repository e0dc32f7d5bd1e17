"""Batch the queries of concurrent requests into one search, and cache the answers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[str, int]  # query, number of hits

_KEY_BYTES = 256  # of a cache entry beside the texts: tuple, dictionary, headers of the objects


@dataclass(eq=False, slots=True)
class _Asked(Generic[T]):
    """A query without an answer yet."""

    future: asyncio.Future[T]
    askers: int = 0  # number of requests that still wait for it
    taken: bool = False  # whether a search has taken it up


class Batcher(Generic[T]):
    """Queues of queries that are searched together on a thread; the answers last asked for are cached.

    The first query waits `wait_seconds` for others. Those that come during a search are the next batch and wait no
    longer. Equal queries that wait at the same time are searched once. Requests take turns: each gives one query to a
    batch, then each a second one, so that a request of a thousand queries delays others by one batch and not by all of
    its own. A search cannot be interrupted, so `batch_chars` bounds how much text one takes up. Queries that nobody
    waits for any more, because their requests were cancelled, are not searched. All methods belong to one event loop.

    Args:
        search: function from `(queries, k)` to one answer a query; called by one thread.
        weigh: size of an answer in bytes.
        wait_seconds: time for which the first query of a batch waits.
        max_batch: number of queries of one search, at most.
        batch_chars: number of characters from which on a search takes up no further query.
        cache_bytes: size of the cache; 0 is none.
    """

    def __init__(
        self,
        search: Callable[[Sequence[str], int], Sequence[T]],
        *,
        weigh: Callable[[T], int],
        wait_seconds: float = 0.002,
        max_batch: int = 256,
        batch_chars: int = 32_768,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self._search = search
        self._wait_seconds = wait_seconds
        self._max_batch = max_batch
        self._batch_chars = batch_chars
        self._cache = _Cache(weigh, cache_bytes)
        self._asked: dict[Key, _Asked[T]] = {}
        self._queues: deque[deque[Key]] = deque()  # of each request, the queries that no search has taken up
        self._worker: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")

    async def answer(self, queries: Sequence[str], k: int) -> list[T]:
        """Return one answer a query. Raises what the search raises."""
        keys = [(query, k) for query in queries]
        known = {key: found for key in dict.fromkeys(keys) if (found := self._cache.get(key)) is not None}
        waited = self._ask([key for key in dict.fromkeys(keys) if key not in known])
        if waited:
            try:
                await asyncio.wait([asked.future for asked in waited.values()])  # unlike gather, does not cancel them
            finally:
                for key, asked in waited.items():
                    asked.askers -= 1
                    if not asked.askers and not asked.taken and self._asked.get(key) is asked:
                        del self._asked[key]
        return [known[key] if key in known else waited[key].future.result() for key in keys]

    def close(self) -> None:
        """Stop the search thread; queries that wait are cancelled."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _ask(self, keys: Iterable[Key]) -> dict[Key, _Asked[T]]:
        """Return what will hold the answers. Queries that nobody has asked yet are put into a queue."""
        waited: dict[Key, _Asked[T]] = {}
        queue: deque[Key] = deque()
        for key in keys:
            if key not in self._asked:
                self._asked[key] = _Asked(asyncio.get_running_loop().create_future())
                queue.append(key)
            waited[key] = self._asked[key]
            waited[key].askers += 1
        if queue:
            self._queues.append(queue)
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())
        return waited

    async def _work(self) -> None:
        """Search batch after batch until no query waits."""
        await asyncio.sleep(self._wait_seconds)
        while batch := self._next_batch():
            taken = [(key, self._asked[key]) for key in batch]
            try:
                queries = [query for query, _ in batch]
                loop = asyncio.get_running_loop()
                answers = await loop.run_in_executor(self._executor, self._search, queries, batch[0][1])
                for (key, asked), answer in zip(taken, answers, strict=True):
                    asked.future.set_result(answer)
                    self._cache.put(key, answer)
            except Exception as error:
                for _, asked in taken:
                    if not asked.future.done():
                        asked.future.set_exception(error)
                        asked.future.exception()  # where nobody waits any more, nobody has to read it
            for key, asked in taken:
                if self._asked.get(key) is asked:
                    del self._asked[key]

    def _next_batch(self) -> list[Key]:
        """Take the queries of the next search out of the queues: all with one k, one of each request in turn."""
        batch: list[Key] = []
        chars, passed = 0, 0  # passed: requests in a row that had nothing for this batch
        while passed < len(self._queues) and len(batch) < self._max_batch and chars < self._batch_chars:
            queue = self._queues[0]
            while queue and self._is_settled(queue[0]):
                queue.popleft()
            if not queue:
                self._queues.popleft()
                continue
            passed += 1
            if not batch or queue[0][1] == batch[0][1]:
                key = queue.popleft()
                self._asked[key].taken = True
                batch.append(key)
                chars, passed = chars + len(key[0]), 0
            self._queues.rotate(-1)
        return batch

    def _is_settled(self, key: Key) -> bool:
        """Return whether a query in a queue needs no search: nobody waits for it, or it stands in another queue too."""
        return key not in self._asked or self._asked[key].taken


class _Cache(Generic[T]):
    """The answers last asked for, `limit` bytes at most."""

    def __init__(self, weigh: Callable[[T], int], limit: int) -> None:
        self._weigh = weigh
        self._limit = limit
        self._answers: OrderedDict[Key, T] = OrderedDict()
        self._bytes = 0

    def get(self, key: Key) -> T | None:
        if key in self._answers:
            self._answers.move_to_end(key)
        return self._answers.get(key)

    def put(self, key: Key, answer: T) -> None:
        if self._size(key, answer) > self._limit or key in self._answers:
            return
        self._answers[key] = answer
        self._bytes += self._size(key, answer)
        while self._bytes > self._limit:
            self._bytes -= self._size(*self._answers.popitem(last=False))

    def _size(self, key: Key, answer: T) -> int:
        return self._weigh(answer) + 4 * len(key[0]) + _KEY_BYTES
