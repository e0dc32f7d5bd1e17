"""One engine spread over several ranks (tensor parallelism): its parts have to be called alike.

The first rank of the group leads: it runs the tree search for all of them, and announces each call before it makes it.
The others follow until it has finished. Weights, sleep and waking are no part of the search: every rank does them for
its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from atpo_fast.engines.base import Completion, Engine, EngineCounters, LeaderFailedError, Request, TurnKey

T = TypeVar("T")
R = TypeVar("R")
_FINISHED = "finished"


class SharedEngine(Engine):
    """An engine spread over ranks, seen from one of them: every call is passed on to this rank's part.

    Args:
        part: takes part in collectives with the other parts, which agree when all are called alike.
        group: the ranks of the engine, of a backend that sends CPU tensors.
    """

    def __init__(self, part: Engine, group: dist.ProcessGroup):
        self._part, self._group = part, group
        self.leads = dist.get_rank(group) == 0
        self.counters = part.counters if self.leads else EngineCounters()  # every part counts the same
        self.max_positions, self.bucket_bytes = part.max_positions, part.bucket_bytes
        self.holds_adapters = part.holds_adapters

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests; only the leader calls this, `poll` and `release`."""
        self._announce("submit", list(requests))
        self._part.submit(requests)

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Advance all requests in flight by a little."""
        self._announce("poll")
        return self._part.poll()

    def release(self, tree: Hashable) -> None:
        """Release a tree in the engine's part on every rank."""
        self._announce("release", tree)
        self._part.release(tree)

    def for_all(
        self, items: Sequence[T], work: Callable[[Sequence[T]], Iterator[tuple[int, R]]]
    ) -> Iterator[tuple[int, R]]:
        """Let the leader run `work` on the items of all ranks of the group; a collective.

        This rank's results come in order when all are done.
        """
        shares: list[list[T]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(shares, list(items), group=self._group)
        done = self._lead([item for share in shares for item in share], work) if self.leads else self._follow()
        if done is None:
            raise LeaderFailedError("the rank that leads this rank's engine has failed; its own message says why")
        first = sum(len(share) for share in shares[: dist.get_rank(self._group)])
        yield from ((index, result) for index in range(len(items)) for result in done[first + index])

    def _lead(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterator[tuple[int, R]]]) -> dict[int, list[R]]:
        """Run the work, and send its results to the followers; None in their place when it raises."""
        done: dict[int, list[R]] | None = None
        try:
            found: dict[int, list[R]] = {}
            for index, result in work(items):  # an item may have several
                found.setdefault(index, []).append(result)
            done = found
        finally:
            self._announce(_FINISHED, done)
        return done

    def _follow(self) -> dict[int, list[Any]] | None:
        """Make the leader's calls until it has finished; return its results."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, group=self._group, group_src=0)
            name, *arguments = message[0]
            if name == _FINISHED:
                results: dict[int, list[Any]] | None = arguments[0]
                return results
            try:
                getattr(self._part, name)(*arguments)
            except Exception:  # the leader's call raises the same, and it knows what to do about it
                continue

    def _announce(self, *message: Any) -> None:
        dist.broadcast_object_list([message], group=self._group, group_src=0)

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights into this rank's part."""
        self._part.update_weights(named_parameters)

    def reset_prefix_cache(self) -> None:
        """Evict the prefix cache of this rank's part."""
        self._part.reset_prefix_cache()

    def sleep(self) -> None:
        """Free the memory of this rank's part."""
        self._part.sleep()

    def wake(self) -> None:
        """Take back the memory of this rank's part."""
        self._part.wake()

    def close(self) -> None:
        """Close this rank's part of the engine."""
        self._part.close()
