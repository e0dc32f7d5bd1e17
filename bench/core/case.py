"""A case: one measurement of our implementation and of those that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

STARTS = "measuring "  # begins the line that names a case before it is measured
Mode = Literal["forward", "gradient", "entropy_gradient"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Our implementation and its peers, side by side in one run on the same inputs."""

    measured_by: ClassVar[str]
    """Module with `measure(case, device, seconds)` and `makers(case, device)`; imported when the case is run, because
    it needs more than the list of cases does."""
    peers: tuple[str, ...] = ()
    quick: bool = False
    """Whether a must-show line is judged from it."""

    def small(self) -> Case:
        """Shrink the case so that a CPU runs it in a moment: for rehearsals, whose numbers mean nothing."""
        raise NotImplementedError

    @property
    def bench(self) -> str:
        """Kind of record that the case makes."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Unique name of the case and of its record."""
        raise NotImplementedError

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of all implementations, ours first."""
        return ("ours", *self.peers)

    def fields(self) -> dict[str, Any]:
        """Return what a record says of the case itself."""
        found = asdict(self)
        return {"case": self.name} | {key: value for key, value in found.items() if key != "peers"}

    def measure(self, device: str, seconds: float) -> dict[str, Any]:
        """Run the case and return what was measured, as fields of the record."""
        result: dict[str, Any] = import_module(self.measured_by).measure(self, device, seconds)
        return result

    def makers(self, device: str) -> dict[str, Callable[[], Callable[[], Any]]]:
        """Return for each implementation a function that makes the call to be timed."""
        result: dict[str, Callable[[], Callable[[], Any]]] = import_module(self.measured_by).makers(self, device)
        return result
