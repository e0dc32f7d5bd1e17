"""How long the paths of a tree may be beside the rows that they are cut into."""

from __future__ import annotations

import torch

from atpo_fast.config import Config
from atpo_fast.config.arithmetic import longest_path
from atpo_fast.objective import Objective
from atpo_fast.policy.attention import prefix_token_bytes
from atpo_fast.policy.model import model_sizes


def max_prefix(config: Config, objective: Objective) -> int:
    """Compute how many tokens of a row's prefix `train.prefix_memory_gb` has room for.

    It is 0 for objectives of whole trajectories. Raises ValueError when the longest trajectory fits neither a row nor a
    row and such a prefix.
    """
    rows, longest, memory = config.train.row_tokens, longest_path(config), config.train.prefix_memory_gb
    token_bytes = prefix_token_bytes(model_sizes(config.model), getattr(torch, config.model.dtype))
    tokens = 0 if objective.whole_trajectories else int(memory * 1e9 / token_bytes)
    if longest > rows + tokens:
        reason = (
            "an objective of whole trajectories (level sequence or denominator local) allows for no prefix"
            if objective.whole_trajectories
            else f"train.prefix_memory_gb={memory:g} has room for a prefix of {tokens} ({token_bytes} bytes each)"
        )
        raise ValueError(
            f"the longest trajectory has {longest} tokens, a row train.row_tokens={rows}, and {reason}; raise "
            f"train.row_tokens to at least {longest - tokens}"
        )
    return tokens
