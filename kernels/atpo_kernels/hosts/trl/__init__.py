"""TRL: `GRPOTrainer` with one ratio for each turn. Tested with TRL 1.16.0.

    from atpo_kernels.hosts.trl import TurnGRPOConfig, TurnGRPOTrainer  # or FusedTurnGRPOTrainer

Turns are runs of ones in completion_mask * tool_mask: tool results lie between them. At importance_sampling_level
"token" and "sequence" the loss is TRL's own. A subclass may put advantages of turns, (B, T), into the output of
`_generate_and_score_completions`.
"""

from __future__ import annotations

from typing import Any

_NAMES = ("TurnGRPOConfig", "TurnGRPOTrainer", "FusedTurnGRPOTrainer")


def __getattr__(name: str) -> Any:
    """Make the classes when they are first asked for: they inherit from TRL's."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from atpo_kernels.hosts.trl.trainers import classes

    return classes()[name]


def check() -> None:
    """Raise AttributeError if the installed TRL lacks what the trainers override or call."""
    from trl import GRPOTrainer

    for name in ("_compute_loss", "_get_per_token_logps_and_entropies", "_generate_and_score_completions"):
        getattr(GRPOTrainer, name)
