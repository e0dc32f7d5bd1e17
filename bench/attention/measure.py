"""Measure the attention of one layer, without the rest of a model."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from atpo_kernels.tree_attention.reference import key_positions
from bench.attention.candidates import CHANGES, changed
from bench.attention.cases import AttentionCase
from bench.attention.peers import ATTENTION, Attention, Heads
from bench.core.measure import Makers, peak_bytes, side_by_side, synchronize
from bench.core.records import package_version
from bench.packing.forests import star_of_tokens, tree_of_tokens
from bench.packing.rows import tree_rows, visible_pairs

_CHECKED = 64  # queries whose results are compared with float64
_PREPARATIONS, _SLOW_MS = 3, 5000  # number of timed preparations of a row, unless one takes this long
VOCAB = 1000


class Problem:
    """A row, its operands and the upstream gradient.

    Args:
        case: case to measure.
        tokens: number of tokens of the row.
        device: device of the tensors.
    """

    def __init__(self, case: AttentionCase, tokens: int, device: str):
        tree = star_of_tokens(tokens, VOCAB) if case.tree == "star" else tree_of_tokens(tokens, VOCAB)
        (row,) = tree_rows([tree], tokens)
        query_heads, key_heads, width = case.heads
        self.heads = Heads(query_heads, key_heads, width, getattr(torch, case.dtype))
        self.row, self.device, self.mode = row, torch.device(device), case.mode
        self.host_end = row.subtree_end  # (T,)
        self.subtree_end = row.subtree_end.to(device)
        rng = torch.Generator(device).manual_seed(0)

        def normal(heads: int) -> Tensor:  # (T, heads, d)
            size = (row.num_tokens, heads, width)
            return torch.randn(size, generator=rng, device=device).to(self.heads.dtype)

        self.operands = [normal(heads).requires_grad_() for heads in (query_heads, key_heads, key_heads)]
        self.upstream = normal(query_heads)  # (T, Hq, d)

    def call(self, attention: Attention, prepared: Any) -> tuple[Tensor, ...]:
        """Compute the output, and with gradients those of q, k and v."""
        if self.mode == "forward":
            q, k, v = (x.detach() for x in self.operands)
            return (attention.attend(q, k, v, self.subtree_end, prepared),)
        q, k, v = self.operands
        out = attention.attend(q, k, v, self.subtree_end, prepared)
        return out.detach(), *torch.autograd.grad(out, self.operands, self.upstream)

    def flops(self, pairs: int) -> float:
        """Count the FLOPs of matrix products over visible pairs, as FlashAttention's own benches do.

        There are two of 2 * pairs * heads * width forward and five backward, of which one computes the scores again.
        """
        return (4 if self.mode == "forward" else 14) * pairs * self.heads.heads * self.heads.head_dim

    @torch.no_grad()
    def errors(
        self, results: tuple[Tensor, ...], causal: bool, window: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Compare output and gradient of q with float64 for some queries, relative to the largest and mean value."""
        q, k, v = (x.detach() for x in self.operands)
        group = self.heads.heads // self.heads.key_heads
        at = torch.linspace(0, len(q) - 1, min(_CHECKED, len(q)), device=self.device).long()
        key = torch.arange(len(q), device=self.device)
        sees = (key <= at[:, None]) & (causal | (at[:, None] < self.subtree_end))  # (C, T)
        if window is not None:
            position = key_positions(self.subtree_end, 0)
            sees &= position[at, None] - position < window
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"out": [], "query_gradient": []}
        for head in range(self.heads.heads):
            keys, values = (x[:, head // group].double() for x in (k, v))
            scores = q[at, head].double() @ keys.T * q.shape[2] ** -0.5
            weights = scores.masked_fill(~sees, -torch.inf).softmax(1)  # (C, T)
            out = weights @ values
            found["out"].append((results[0][at, head], out))
            if self.mode == "gradient":
                upstream = self.upstream[at, head].double()
                inner = weights * (upstream @ values.T - (upstream * out).sum(1, keepdim=True))
                found["query_gradient"].append((results[1][at, head], inner @ keys * q.shape[2] ** -0.5))
        return {name: _relative(pairs) for name, pairs in found.items() if pairs}


@dataclass(frozen=True, slots=True)
class Call:
    """An implementation on a problem, with its lists and masks prepared."""

    name: str
    problem: Problem
    attention: Attention
    prepared: Any
    host_ms: float

    def __call__(self) -> tuple[Tensor, ...]:
        """Compute the output, and with gradients those of q, k and v."""
        with changed(self.name) if self.name in CHANGES else nullcontext():
            return self.problem.call(self.attention, self.prepared)


def makers(case: AttentionCase, device: str) -> Makers:
    """Return for each implementation a function that makes the call to be timed."""
    return _makers(case, Problem(case, case.row_tokens, device))


def _makers(case: AttentionCase, problem: Problem) -> Makers:
    return {name: partial(_make, name, problem) for name in case.implementations}


def _make(name: str, problem: Problem) -> Call:
    attention = ATTENTION[name].make()
    if name in CHANGES:
        import_module("atpo_kernels.tree_attention.launch")  # there is nothing to change without Triton
    return Call(name, problem, attention, *_prepared(attention, problem))


def measure(case: AttentionCase, device: str, seconds: float) -> dict[str, Any]:
    """Run a case and return the fields of its record."""
    problem = Problem(case, case.row_tokens, device)
    tokens = problem.row.num_tokens
    counted = {"unique": tokens, "flat": problem.row.flat_tokens}
    pairs = visible_pairs(problem.host_end)
    windowed = {name: visible_pairs(problem.host_end, ATTENTION[name].window) for name in case.implementations}

    def first(name: str, call: Call) -> dict[str, Any]:
        found = problem.errors(call(), name.startswith("causal"), ATTENTION[name].window)
        results, peak = peak_bytes(call, device)
        kept = sum(x.numel() * x.element_size() for x in results[1:])
        measured = {"errors": found, "peak_bytes": peak, "gradient_bytes": kept, "host_ms": call.host_ms}
        return measured | ({"other_length_ms": _other_length(case, device)} if name == "ours" else {})

    def about(name: str) -> dict[str, Any]:
        peer = ATTENTION[name]
        seen = {} if peer.window is None else {"pairs": windowed[name]}
        return {"note": peer.note, "same_work": peer.same_work, "version": package_version(name)} | seen

    entries, _, _ = side_by_side(_makers(case, problem), first, about, device, seconds)
    for name, entry in entries.items():
        if "ms" in entry:
            done = tokens * (tokens + 1) // 2 if name.startswith("causal") else windowed[name]
            entry["tflops"] = problem.flops(done) / entry["ms"]["p50"] / 1e9
            if entry["same_work"]:
                entry["tokens_per_s"] = {layout: 1000 * n / entry["ms"]["p50"] for layout, n in counted.items()}
    return {"tokens": counted, "pairs": pairs, "implementations": entries}


def _prepared(attention: Attention, problem: Problem) -> tuple[Any, float]:
    """Prepare a row before its first layer; return the result and the median milliseconds that it takes."""
    taken: list[float] = []
    while len(taken) < _PREPARATIONS and sum(taken) < _SLOW_MS:
        begun = time.perf_counter()
        prepared = attention.prepare(problem.host_end, problem.heads, problem.device)
        synchronize(problem.device.type)
        taken.append((time.perf_counter() - begun) * 1000)
    return prepared, statistics.median(taken)


def _other_length(case: AttentionCase, device: str) -> float:
    """Time our first call on a row of another length, in milliseconds: a compilation would take seconds."""
    problem = Problem(case, case.row_tokens - 37, device)
    attention = ATTENTION["ours"].make()
    prepared, _ = _prepared(attention, problem)
    begun = time.perf_counter()
    problem.call(attention, prepared)
    synchronize(device)
    return (time.perf_counter() - begun) * 1000


def _relative(found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    gap = torch.stack([(ours.double() - truth).abs() for ours, truth in found])
    size = torch.stack([truth.abs() for _, truth in found])
    return {"max": float(gap.max() / size.max()), "mean": float(gap.mean() / size.mean())}
