"""Parts of a rollout of verifiers before 0.3 that its own loop would supply."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from atpo_fast.environment.adapters.common import package


@lru_cache(maxsize=8)
def load_environment(env_id: str, options: str) -> Any:
    """Load an environment, once; `options` are its arguments as JSON.

    Its constructor would take Ctrl-C and SIGTERM from the run, which works on the main thread alone. It gets a module
    `signal` that sets no handler.
    """
    module = package("verifiers", "verifiers", "verifiers.envs.environment")
    module.signal = SimpleNamespace(**{**vars(signal), "signal": lambda *_: None})  # type: ignore[attr-defined]
    return package("verifiers", "verifiers").load_environment(env_id, **json.loads(options))


def new_step(messages: Sequence[Any], message: dict[str, Any]) -> tuple[Any, Any]:
    """Return what the policy wrote as a message, and the step of a trajectory that ends with it."""
    types = package("verifiers", "verifiers", "verifiers.types")
    written = types.AssistantMessage(role="assistant", **message)
    empty: dict[str, Any] = {"response": None, "tokens": None, "reward": None, "advantage": None, "extras": {}}
    return written, types.TrajectoryStep(prompt=messages, completion=[written], is_truncated=False, **empty)
