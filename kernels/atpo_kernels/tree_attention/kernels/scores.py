"""Parts of the kernels of `tree_attention`: from products of queries and keys to scores, and which are visible."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # the score of a key that is not visible: finite, so that no difference is NaN
# tanh(x) = x + x^3 g(x^2) where x^2 is below the border, to 3e-9 of itself
_TANH_BORDER = tl.constexpr(0.36)
_TANH_0 = tl.constexpr(-0.33333299270657274)
_TANH_1 = tl.constexpr(0.13331958206259303)
_TANH_2 = tl.constexpr(-0.05378668053982189)
_TANH_3 = tl.constexpr(0.020805374490576827)
_TANH_4 = tl.constexpr(-0.00590585672080331)
_TWICE_LOG2_E = tl.constexpr(2.8853900817779268)


@triton.jit
def tanh(x):
    """Compute the hyperbolic tangent, to some units in the last place: 1 - 2 / (e^2x + 1) alone would cancel near 0."""
    square = x * x
    g = _TANH_0 + square * (_TANH_1 + square * (_TANH_2 + square * (_TANH_3 + square * _TANH_4)))
    far = 1.0 - 2.0 / (tl.exp2(x * _TWICE_LOG2_E) + 1.0)
    return tl.where(square < _TANH_BORDER, x + x * square * g, far)


@triton.jit
def score(products, factor):
    """Turn products of queries and keys into scores: see the derivation."""
    return products if factor is None else tanh(products * factor)


@triton.jit
def load_ends(key_ends, key, num_keys):
    """Load where the subtrees of keys end, counted as queries; 0 behind the last key, so that no query sees those."""
    return tl.load(key_ends + key, mask=key < num_keys, other=0)


@triton.jit
def hide(scores, query, key, end, first_key, QUERY_AXIS: tl.constexpr):
    """Set the scores of keys that are not visible to MASKED: (ROWS, KEYS) if QUERY_AXIS is 0, (KEYS, ROWS) if it is 1.

    A key is seen from itself to the end of its subtree, and with a window not before a query's first key. All count as
    queries, so a prefix lies below 0.
    """
    query = tl.expand_dims(query, 1 - QUERY_AXIS)
    key = tl.expand_dims(key, QUERY_AXIS)
    end = tl.expand_dims(end, QUERY_AXIS)
    seen = (key <= query) & (query < end)
    if first_key is not None:
        seen &= key >= tl.expand_dims(first_key, 1 - QUERY_AXIS)
    return tl.where(seen, scores, MASKED)
