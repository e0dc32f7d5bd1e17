"""Section `environment`: an environment whose state the policy's actions change, and how its state branches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.choices import Fork
from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class EnvironmentConfig:
    """An environment with a state of its own (sessions), beside the tools of the section `tools`."""

    factory: str | None = None
    """Function that opens a session, `open_session(task, seed)`, as package.module:name or path/to/file.py:name; none:
    tools alone, which have no state."""
    fork: Fork = "auto"
    """How a second branch gets a session in the state of an earlier turn. native: the session forks itself. copy: a
    deep copy. replay: a new session repeats the actions on the path. none: not at all (rollout.strategy=chain). auto:
    the first of native, copy and replay that passes its check at the start."""
    on_mismatch: Literal["end", "continue"] = "end"
    """What follows where a repeated action is answered otherwise than it was at first. end: the branch ends. continue:
    it goes on under the recorded text."""
    action: str = Field(default="act", pattern=r"^[A-Za-z_][\w-]*$")
    """Tag around an action of a session that takes plain text."""
    probe: list[str] = Field(default_factory=list)
    """Actions that the check at the start tries, written as the policy writes them, such as "<act> go north </act>";
    empty: one made from the schema of each tool."""
    sessions: int = Field(default=256, ge=2)
    """Number of sessions that live at once, in each process. Beyond it the one that was used longest ago is closed, and
    its state is reached by replay where it is needed again."""
    concurrency: int = Field(default=32, ge=1)
    """Number of sessions that work at once."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest time of one action, of opening, forking or scoring; a session that takes longer is closed, and its branch
    ends."""
    guard_random: bool | None = None
    """Whether each session has the state of Python's and NumPy's global random generators to itself, and works alone in
    its process meanwhile; none: if the check at the start sees a session use them."""

    def __post_init__(self) -> None:
        given = [name for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        if self.factory is None and given:
            raise ValueError(
                f"environment.{given[0]} is read with environment.factory only: name the function that opens a session"
            )
        if self.factory is not None and ":" not in self.factory:
            raise ValueError(
                f"environment.factory={self.factory!r}: must look like package.module:name or path/to/file.py:name"
            )


_DEFAULTS: dict[str, Any] = {"fork": "auto", "on_mismatch": "end", "probe": [], "guard_random": None}
