"""One engine spread over several ranks (tensor parallelism): its parts have to be called alike.

The first rank of the group leads: it runs the turn loop for all of them, and tells the others each call before it makes
it. They follow until it has finished. Weights, sleep and waking are each rank's own business: every rank does them for
its part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from atpo_fast.engines.base import Completion, Engine, EngineCounters, Request, TurnKey

T = TypeVar("T")
R = TypeVar("R")
_FINISHED = "finished"


class SharedEngine(Engine):
    """This rank's part of an engine; see `Engine` for the methods.

    Args:
        part: makes collectives with the other parts, the same on each rank when it is called alike.
        group: the ranks of the engine, of a backend that sends CPU tensors.
    """

    def __init__(self, part: Engine, group: dist.ProcessGroup):
        self._part, self._group = part, group
        self.leads = dist.get_rank(group) == 0
        self.counters = part.counters if self.leads else EngineCounters()  # every part counts the same

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests; the leader's to call, like `poll` and `release`."""
        self._tell("submit", list(requests))
        self._part.submit(requests)

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Advance all requests in flight by a little."""
        self._tell("poll")
        return self._part.poll()

    def release(self, tree: Hashable) -> None:
        """Forget a tree."""
        self._tell("release", tree)
        self._part.release(tree)

    def for_all(self, items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R] | None:
        """`work` done by the leader on the items of all ranks of the group, with this engine; a collective.

        Returns what became of this rank's items; None on the others when the leader has raised.
        """
        shares: list[list[T]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(shares, list(items), group=self._group)
        done: list[R] | None = None
        if self.leads:
            try:
                done = work([item for share in shares for item in share])
            finally:
                self._tell(_FINISHED, done)
        else:
            done = self._follow()
        first = sum(len(share) for share in shares[: dist.get_rank(self._group)])
        return None if done is None else done[first : first + len(items)]

    def _follow(self) -> Any:
        """Make the leader's calls until it has finished; what it has made."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, group=self._group, group_src=0)
            name, *arguments = message[0]
            if name == _FINISHED:
                return arguments[0]
            try:
                getattr(self._part, name)(*arguments)
            except Exception:  # the leader's call raises the same, and it knows what to do about it
                continue

    def _tell(self, *message: Any) -> None:
        dist.broadcast_object_list([message], group=self._group, group_src=0)

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights for this part."""
        self._part.update_weights(named_parameters)

    def reset_prefix_cache(self) -> None:
        """Forget this part's cache."""
        self._part.reset_prefix_cache()

    def sleep(self) -> None:
        """Give back this part's memory."""
        self._part.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self._part.wake()
