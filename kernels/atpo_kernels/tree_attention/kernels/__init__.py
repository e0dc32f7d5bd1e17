"""Triton kernels of `tree_attention`, forward and backward.

Forward. A program owns a block of queries of one key head. The rows of its tile are pairs (query, head of the group),
so that the keys and values of a block are loaded once for all query heads that read them. Weights are powers of 2:

    c = scale / ln 2        score = q . k        weight = 2^((score - peak) c - log_total)

The peak is kept apart from log_total because a difference of near scores is exact; their rounded sum would not be.

Backward. The weights are computed again from these statistics. With P the weights, O = P V and dO the upstream
gradient: dV = P^T dO, dP = dO V^T, and through the softmax

    dS = P * (dP - delta)        delta = rowsum(P * dP) = rowsum(dO * O)        dQ = scale dS K        dK = scale dS^T Q

One kernel runs over blocks of queries for dQ, and writes delta; the other then runs over blocks of keys for dK and dV,
and through all heads of the group, so that keys and values are loaded once. There are no atomics: bits repeat.

Options, each of which is compiled only into the kernels of calls that have it; without it, its arguments are None.
- Windows (`first_keys`). Along a path indices of tokens rise, so the last W keys that a query sees are those from some
  key on: one number a query, compared in partial blocks alone. Of a block of keys the queries that see it are no range
  then, because a path may be left for a shorter sibling's; they are listed (`query_blocks`).
- Sinks. A sink is a key that all queries of a head see, without a value: the sums start with its weight, 1, at the peak
  sink / scale, and dsink = -sum over queries of its weight * delta.
- Soft caps (`factor` = scale / cap). score = tanh(factor q . k), c = cap / ln 2, and dS gets the factor 1 - score^2.

What to expect, by arithmetic; nothing here has been measured. For P pairs of a query and a key that it sees, and Hq
query heads of d dimensions: 4 P Hq d FLOPs forward (two products), and 14 P Hq d backward (seven: both kernels compute
scores and dP, so that neither needs atomics; a single kernel would need five). A tree of 32k tokens whose paths average
4k tokens has P = 1.3e8; with Hq = 32, d = 128: 2.1 and 7.5 TFLOP a layer, 20 ms at 500 TFLOP/s. Memory traffic is q, k,
v, the output and their gradients once, some tens to hundreds of MB: under 1 ms. So the matrix units bound it. What is
lost beyond P is masked work: about half a block at either end of a run of visible tokens, with blocks of 64 keys 3-6 %
at turns of several hundred tokens. A tile of 128 rows reads a byte of keys and values from the L2 cache every 128
FLOPs; the programs of one head run side by side, so that its keys and values (16 MB at 32k tokens) stay there.
"""

from __future__ import annotations

from atpo_kernels.tree_attention.kernels.backward import (
    _key_gradient_kernel,
    _key_sum_kernel,
    _query_gradient_kernel,
    _sink_gradient_kernel,
)
from atpo_kernels.tree_attention.kernels.forward import _forward_kernel

__all__ = [
    "_forward_kernel",
    "_key_gradient_kernel",
    "_key_sum_kernel",
    "_query_gradient_kernel",
    "_sink_gradient_kernel",
]
