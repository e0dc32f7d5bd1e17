"""Time of a training, from the speed of this machine or from what an earlier run took.

How long trajectories will be is not known beforehand, so times by this machine's speed are told for responses of a
quarter of their limit and for all of it. That speed is measured by one product of matrices in the model's dtype.
"""

from __future__ import annotations

import time
from functools import cache

from atpo_fast.config import Config
from atpo_fast.train.plan.sizes import ModelSize

_UPDATE_EFFICIENCY = 0.5  # share of a plain product's rate that forward and backward reach (measured on a CPU: 0.4-0.6)
_DECODE_EFFICIENCY = 0.25  # the same for decoding, whose batches are small
_SHORT = 0.25  # share of the longest response of which the shorter estimate is


def training_flops(config: Config, size: ModelSize, share: float) -> tuple[float, float]:
    """Estimate (FLOPs of prefill and updates, FLOPs of decoding), for responses of a share of their longest."""
    rollout, train, cold = config.rollout, config.train, config.cold_start
    prompt, response = config.data.max_prompt_tokens, rollout.max_response_tokens * share
    written = rollout.leaves * response / 2  # of a tree: leaves share prefixes, and half of a response is results
    tree = prompt + rollout.leaves * response * 0.7
    questions = train.steps * train.questions_per_step
    forwards = 2 if train.old_logprobs == "recompute" else 1
    update = questions * tree * (2 + 2 * (forwards - 1) + 6)  # prefill, old log-probs, forward and backward
    demonstrations = cold.asks_for_demonstrations or config.data.source != "files"
    if cold.precedes_rl(demonstrations=demonstrations, given_model=config.model.path is not None):
        update += cold.steps * cold.batch_size * (prompt + response) * 6
    own = (config.rooms if config.data.source == "rooms" else config.world).eval_questions
    evaluations = 2 + (train.steps // train.eval_every if train.eval_every else 0)
    answered = evaluations * (config.data.max_eval_questions or own)
    update += answered * (prompt + response / 2) * 2
    return size.parameters * update, size.parameters * 2 * (questions * written + answered * response / 2)


def time_line(config: Config, size: ModelSize, *, dtype: str, on_gpu: bool) -> str:
    """Estimate the time of the whole training on this machine, in words."""
    if on_gpu:
        return "time: not estimated on a GPU; `atpo-fast plan --like RUN` takes it from an earlier run"
    rate = product_rate(dtype)
    seconds = []
    for share in (_SHORT, 1.0):
        update, decode = training_flops(config, size, share)
        seconds.append(update / (rate * _UPDATE_EFFICIENCY) + decode / (rate * _DECODE_EFFICIENCY))
    return (
        f"time on this machine: {duration(seconds[0])} to {duration(seconds[1])}, for responses of a quarter of and "
        f"of all of rollout.max_response_tokens; {rate / 1e9:,.0f} GFLOP/s measured now"
    )


@cache
def product_rate(dtype: str) -> float:
    """Measure the FLOP/s of a product of matrices on this machine's CPU, in a third of a second, once in a process."""
    import torch

    left, right = (torch.randn(1024, 1024, dtype=getattr(torch, dtype)) for _ in range(2))
    torch.mm(left, right)
    begun, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < 0.3 or products < 2:
        torch.mm(left, right)
        products += 1
    return products * 2 * 1024**3 / seconds


def duration(seconds: float) -> str:
    """Say a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours"
