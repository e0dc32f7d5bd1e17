"""The presets of the objective as plain data, so that a configuration can be read and shown without PyTorch.

A preset holds fields of `atpo_fast.objective.Objective` and of `atpo_kernels.LossConfig`; docs/methods.md#presets says
where the numbers are from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURN = {"level": "turn", "clip": "hard", "clip_low": 3e-3, "clip_high": 4e-3, "aggregation": "seq-mean-token-mean"}
_TOKEN = {"level": "token", "clip": "hard", "aggregation": "token-mean"}
_PPO = {**_TOKEN, "clip_low": 0.2, "clip_high": 0.2, "dual_cap": 3.0}
_KL = {"kl": "low_var", "kl_coef": 0.001}

PRESETS: dict[str, Mapping[str, Any]] = {
    "at2po": _TURN,
    "atpo": _TURN,
    "ppo": _PPO,
    "grpo": {**_PPO, **_KL},
    "dapo": {**_TOKEN, "clip_low": 0.2, "clip_high": 0.28, "dual_cap": 10.0},
    "gspo": {**_TURN, "level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "aepo": {**_PPO, "clip": "soft_high", "entropy_advantage": 0.2},
    "arpo": _PPO,
    "tree_grpo": {**_PPO, **_KL, "entropy_coef": 0.001},
    "igpo": {**_PPO, **_KL, "entropy_coef": 0.001},
    "gppo": {**_TOKEN, "clip": "soft", "clip_low": 0.2, "clip_high": 0.28, "dual_cap": 3.0},
    "sapo": {**_TOKEN, "clip": "sapo", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05, "aggregation": "seq-mean-token-mean"},
    "cispo": {**_TOKEN, "clip": "cispo", "clip_low": 1.0, "clip_high": 0.28},
}
