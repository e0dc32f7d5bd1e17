"""What every case of the benches has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

Mode = Literal["forward", "gradient", "entropy_gradient"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: ours and what it is compared with, side by side in one run."""

    measured_by: ClassVar[str]
    """Module of this folder whose `measure(case, device, seconds)` gives what was measured, as fields of the record."""
    peers: tuple[str, ...] = ()
    quick: bool = False
    """Whether a must-show line is judged from it."""

    @property
    def bench(self) -> str:
        """The kind of record that it makes."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Unique; the name of the record."""
        raise NotImplementedError

    @property
    def implementations(self) -> tuple[str, ...]:
        """Ours first."""
        return ("ours", *self.peers)

    def fields(self) -> dict[str, Any]:
        """What a record says of the case itself."""
        found = asdict(self)
        return {"case": self.name} | {key: value for key, value in found.items() if key != "peers"}

    def measure(self, device: str, seconds: float) -> dict[str, Any]:
        """Run it; imports what it needs only now."""
        return import_module(self.measured_by).measure(self, device, seconds)
