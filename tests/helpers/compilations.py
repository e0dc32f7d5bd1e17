"""Counts what Triton would compile on a GPU of generation 9.0 while the operators run on random sizes; run by a test.

The driver is a fake one: kernels are bound and looked up as on a GPU, but neither compiled nor launched, so that their
results are whatever is in memory. Prints a line of JSON: for each kernel its variants after the first calls of each
operator and dtype, and after all others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch

from atpo_kernels import linear_logprob, linear_turn_policy_loss, tree_attention, turn_policy_loss
from atpo_kernels.linear_logprob import launch as head_launch
from tests.helpers.fake_gpu import pretend_to_be_a_gpu, variants
from tests.helpers.kernel_cases import turn_offsets
from tests.helpers.tree_cases import random_row

VOCAB, WIDTH, CHUNK = 1304, 64, 1024


def shifted(values: torch.Tensor) -> torch.Tensor:
    """The same numbers, at an address that may not be a multiple of 16 bytes: a slice of a batch."""
    at = random.randint(0, 3)
    return torch.cat([values[:1].expand(at, *values.shape[1:]), values])[at:]


def lengths(tokens: int) -> list[int]:
    """Turns of a random mean length, as many as make that many tokens."""
    found: list[int] = []
    mean = random.choice((5, 60, 300, 900))
    while sum(found) < tokens:
        found.append(min(random.randint(1, 2 * mean), tokens - sum(found)))
    return found


def run_head(dtype: torch.dtype) -> None:
    tokens = random.randint(1, 3 * CHUNK)
    hidden, weight = torch.zeros(tokens, WIDTH, dtype=dtype), torch.zeros(VOCAB, WIDTH, dtype=dtype)
    targets = shifted(torch.zeros(tokens, dtype=torch.int64))
    with torch.no_grad():
        linear_logprob(hidden, weight, targets, impl="triton")
    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, targets, impl="triton")
    upstream = shifted(torch.ones(tokens))
    torch.autograd.grad([logprob], [hidden, weight], [upstream], retain_graph=True)
    torch.autograd.grad([logprob, entropy], [hidden, weight], [upstream, upstream])


def run_fused(dtype: torch.dtype) -> None:
    turns = lengths(random.randint(1, 3 * CHUNK))
    tokens = sum(turns)
    hidden = torch.zeros(tokens, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.zeros(VOCAB, WIDTH, dtype=dtype).requires_grad_()
    old, targets = shifted(torch.zeros(tokens)), shifted(torch.zeros(tokens, dtype=torch.int64))
    advantages = shifted(torch.ones(len(turns)))
    options: list[dict[str, Any]] = [{}, {"entropy_coef": 0.1}]
    for more in options:
        linear_turn_policy_loss(
            hidden, weight, targets, old, advantages, turn_offsets=turn_offsets(turns), impl="triton", **more
        ).loss.backward()


def run_loss(dtype: torch.dtype) -> None:
    turns = lengths(random.randint(1, 5000))
    tokens, rows = sum(turns), random.randint(1, 9)
    logprob, old = (shifted(torch.zeros(tokens, dtype=dtype)) for _ in range(2))
    offsets = shifted(turn_offsets(turns))
    turn_policy_loss(logprob, old, shifted(torch.ones(len(turns))), turn_offsets=offsets - offsets[0], impl="triton")
    length = random.choice((100, 700, 3000)) + random.randint(0, 20)
    batch = [torch.zeros(rows, length, dtype=dtype) for _ in range(3)]
    turn_policy_loss(*batch, mask=torch.ones(rows, length, dtype=torch.bool), impl="triton")


def run_attention(dtype: torch.dtype) -> None:
    tokens, prefix = random.randint(1, 700), random.choice((0, random.randint(1, 300)))
    q = torch.zeros(tokens, 14, 64, dtype=dtype).requires_grad_()
    k, v = (torch.zeros(prefix + tokens, 2, 64, dtype=dtype).requires_grad_() for _ in range(2))
    end = shifted(random_row(tokens, 50, tokens))
    sinks = torch.zeros(14, dtype=dtype).requires_grad_()
    options: list[dict[str, Any]] = [{}, {"window": random.randint(1, 400), "softcap": random.random(), "sinks": sinks}]
    for more in options:
        out = tree_attention(q, k, v, end, impl="triton", **more)
        torch.autograd.grad(out, (q, k, v, *([sinks] if more else [])), torch.zeros_like(out))


OPERATORS: list[Callable[[torch.dtype], None]] = [run_head, run_fused, run_loss, run_attention]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(calls: int) -> None:
    """Run the first calls, then as many others, and print the variants of both."""
    random.seed(0)
    pretend_to_be_a_gpu()
    head_launch.SCRATCH_BYTES = CHUNK * VOCAB * 2
    found: dict[str, Any] = {}
    for name, times in (("first", 2), ("others", calls)):
        variants.clear()
        for _ in range(times):
            for operator in OPERATORS:
                for dtype in DTYPES:
                    operator(dtype)
        found[name] = dict(variants)
    print(json.dumps(found))
