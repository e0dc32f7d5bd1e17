"""Wall-clock time per phase, with an NVTX range of the same name for the profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import nvtx
except ImportError:
    nvtx = None


class PhaseTimer:
    """Seconds spent in named phases.

    Phases may nest; each counts its whole time. A phase that runs inside another is recorded under the outer one's
    name: `loss` inside `update` is `update/loss`, and `rollout` inside `eval` is `eval/rollout`, so that it is not
    taken for training's. A name that already begins with the outer name (`rollout/tools` inside `rollout`) stays.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, str]] = []  # given and recorded name of each open phase, outermost first

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to the phase, also when the block raises."""
        recorded = self._recorded_name(name)
        self._open.append((name, recorded))
        if nvtx is not None:
            nvtx.push_range(recorded)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[recorded] += time.perf_counter() - start
            self._open.pop()
            if nvtx is not None:
                nvtx.pop_range()

    def pop(self) -> dict[str, float]:
        """Return the seconds per phase since the last `pop`, and start over."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _recorded_name(self, name: str) -> str:
        if not self._open:
            return name
        outer_name, outer_recorded = self._open[-1]
        return f"{outer_recorded}/{name.removeprefix(outer_name + '/')}"
