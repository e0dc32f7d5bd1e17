"""Launches of `tree_attention`'s kernels: one forward, and one over queries and one over keys for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from atpo_kernels.devices import kernel_context, processors, target_of
from atpo_kernels.tree_attention.block_lists import TreeBlockLists, make_tree_block_lists
from atpo_kernels.tree_attention.kernels import (
    _forward_kernel,
    _key_gradient_kernel,
    _key_sum_kernel,
    _query_gradient_kernel,
    _sink_gradient_kernel,
)
from atpo_kernels.tree_attention.reference import AttentionOptions
from atpo_kernels.tree_attention.tiles import (
    SINK_QUERIES,
    SUMMED_KEYS,
    Tile,
    Tiles,
    block_sizes,
    padded_width,
    tiles_for,
)


class Gradients(NamedTuple):
    """Gradients of q, k and v, in their layouts, and of the sinks in float32."""

    q: Tensor  # (T, Hq, d)
    k: Tensor  # (P + T, Hkv, d)
    v: Tensor  # (P + T, Hkv, d)
    sinks: Tensor | None  # (Hq,)


@dataclass(frozen=True, slots=True)
class Attention:
    """Operands of one call, as the kernels take them."""

    q: Tensor  # (T, Hq, d) last dimension contiguous
    k: Tensor  # (P + T, Hkv, d) last dimension contiguous
    v: Tensor  # (P + T, Hkv, d) last dimension contiguous
    sinks: Tensor | None  # (Hq,) float32, in units of the kernels' scores
    key_ends: Tensor  # (P + T,) int32: subtree_end of every key, T for those of a prefix
    options: AttentionOptions
    blocks: TreeBlockLists
    tiles: Tiles

    @classmethod
    def prepare(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        subtree_end: Tensor,
        options: AttentionOptions,
        blocks: TreeBlockLists | None,
    ) -> Attention:
        """Make the lists if there are none, and copy operands that the kernels cannot read in place.

        Raises ValueError for a head that is too wide, too many query heads a key head, or blocks of other shapes.
        """
        tiles = tiles_for(target_of(q.device), q.dtype, q.shape[2], options.softcap is not None)
        sizes = block_sizes(tiles, q.shape[1] // k.shape[1])
        if blocks is None:
            blocks = make_tree_block_lists(
                subtree_end,
                sizes,
                key_heads=k.shape[1],
                workers=processors(q.device),
                prefix=len(k) - len(q),
                window=options.window,
            ).to(q.device)
        if not isinstance(blocks, TreeBlockLists) or blocks.sizes != sizes:
            raise ValueError(
                "tree_attention: blocks for impl='triton' are those of make_attention_blocks for the same heads, dtype "
                f"and softcap; here lists with {sizes}"
            )
        q, k, v = (_readable(x.detach()) for x in (q, k, v))
        in_units = None if sinks is None else sinks.detach().float() / _unit(options)
        return cls(q, k, v, in_units, _key_ends(subtree_end, len(k) - len(q)), options, blocks, tiles)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Compute the output (T, Hq, d), and (2, Hq, T): peaks of the scores, log2 of the sums of weights."""
        tokens, heads, width = self.q.shape
        out = torch.empty(tokens, heads, width, dtype=self.q.dtype, device=self.q.device)
        statistics = torch.empty(2, heads, tokens, dtype=torch.float32, device=self.q.device)
        if tokens == 0:
            return out, statistics
        tile = self.tiles.forward
        _forward_kernel[(len(self.blocks.query_order), self.k.shape[1])](
            self.q, *self._moved(tile.keys, self.k, self.v), self.key_ends, out, *statistics, *self._lists(),
            self.sinks, tokens, len(self.k), *_strides(self.q, self.k, self.v), self._unit_base_2, self._cap_factor,
            **self._constants(tile),
        )  # fmt: skip
        return out, statistics

    def backward(self, grad: Tensor, out: Tensor, statistics: Tensor) -> Gradients:
        """Compute the gradients of q, k, v and the sinks from that of the output, (T, Hq, d)."""
        grad = _readable(grad)
        made = torch.empty_like if len(grad) else torch.zeros_like
        of_sinks = None if self.sinks is None else made(self.sinks)
        grads = Gradients(made(self.q), made(self.k), made(self.v), of_sinks)
        if len(grad) == 0:
            return grads
        delta = torch.empty_like(statistics[0])
        tile = self.tiles.query_gradient
        _query_gradient_kernel[(len(self.blocks.query_order), self.k.shape[1])](
            self.q, *self._moved(tile.keys, self.k, self.v), self.key_ends, out, grad, *statistics, delta, grads.q,
            *self._lists(), len(grad), len(self.k), *_strides(self.q, self.k, self.v, grad, grads.q),
            self._unit_base_2, self._cap_factor, self.options.scale, **self._constants(tile),
        )  # fmt: skip
        self._key_gradients(grads, grad, statistics, delta)
        if grads.sinks is not None:
            _sink_gradient_kernel[(len(grads.sinks),)](
                self.sinks, *statistics, delta, grads.sinks, len(grad), self._unit_base_2, BLOCK=SINK_QUERIES
            )
        return grads

    def _key_gradients(self, grads: Gradients, grad: Tensor, statistics: Tensor, delta: Tensor) -> None:
        """Fill in the gradients of k and v; sums of pieces of a key block are added up by a second kernel."""
        lists, tile, (num_keys, heads, width) = self.blocks, self.tiles.key_gradient, self.k.shape
        depth = padded_width(width)
        parts = torch.empty(2, lists.slots, heads, tile.keys, depth, dtype=torch.float32, device=grad.device)
        strides = _strides(grads.k, grads.v)
        q, do = self._moved(tile.rows, self.q, grad)
        _key_gradient_kernel[(len(lists.key_parts), heads)](
            q, self.k, self.v, self.key_ends, do, *statistics, delta, grads.k, grads.v, parts[0], parts[1],
            lists.key_parts, lists.query_blocks, lists.first_keys, len(grad), num_keys,
            *_strides(self.q, self.k, self.v, grad), *strides, self._unit_base_2, self._cap_factor, self.options.scale,
            **self._constants(tile),
        )  # fmt: skip
        if lists.slots:
            _key_sum_kernel[(len(lists.split_keys), heads, ceil(tile.keys / SUMMED_KEYS))](
                grads.k, grads.v, parts[0], parts[1], lists.split_keys, num_keys, *strides,
                self.options.scale, WIDTH=width, DEPTH=depth, KEYS=tile.keys, SUMMED=SUMMED_KEYS,
            )  # fmt: skip

    @property
    def _unit_base_2(self) -> float:
        """Factor c of the kernels' derivation: weights are powers of 2."""
        return _unit(self.options) / log(2)

    @property
    def _cap_factor(self) -> float | None:
        """Factor of products under the hyperbolic tangent of a soft cap."""
        return None if self.options.softcap is None else self.options.scale / self.options.softcap

    def _lists(self) -> tuple[Tensor | None, ...]:
        """List the block lists in the order of the kernels' arguments."""
        lists = self.blocks
        offsets, partial_offsets = lists.full_offsets, lists.partial_offsets
        return lists.query_order, offsets, lists.full, partial_offsets, lists.partial, lists.first_keys

    def _moved(self, rows: int, *tensors: Tensor) -> list[Any]:  # (T, H, d) each
        """Describe the tensors to kernels that load `rows` tokens of one head at a time."""
        if not self.tiles.descriptors:
            return list(tensors)
        return [TensorDescriptor.from_tensor(x, [rows, 1, padded_width(x.shape[2])]) for x in tensors]

    def _constants(self, tile: Tile) -> dict[str, Any]:
        return self.tiles.constants(tile, self.q.shape[1] // self.k.shape[1], self.q.shape[2])


def _unit(options: AttentionOptions) -> float:
    """Say of what the kernels' scores are multiples: they are q . k, or with a cap its hyperbolic tangent."""
    return options.scale if options.softcap is None else options.softcap


def _readable(tensor: Tensor) -> Tensor:  # (T, H, d) -> (T, H, d)
    """Copy the tensor unless its last dimension is contiguous and its rows are apart by multiples of 16 bytes, as
    descriptors require."""
    apart = all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:2])
    if apart and tensor.stride(2) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    tokens, heads, width = tensor.shape
    return tensor.new_empty(tokens, heads, ceil(width / 16) * 16)[..., :width].copy_(tensor)


def _key_ends(subtree_end: Tensor, prefix: int) -> Tensor:  # (T,) -> (P + T,) int32
    """Give every key its subtree_end; the subtree of a prefix is all of the row."""
    if prefix:
        subtree_end = F.pad(subtree_end, (prefix, 0), value=len(subtree_end))
    ends = subtree_end.to(torch.int32).contiguous()
    return ends if ends.data_ptr() % 16 == 0 else ends.clone()  # kernels are compiled for aligned lists alone


def _strides(*tensors: Tensor) -> list[int]:
    """List the strides of tokens and heads."""
    return [x.stride(dim) for x in tensors for dim in (0, 1)]


class _TreeAttention(torch.autograd.Function):
    """`tree_attention` on the kernels; the backward computes the weights again from their statistics."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        subtree_end: Tensor,
        options: AttentionOptions,
        blocks: TreeBlockLists | None,
    ) -> Tensor:
        call = Attention.prepare(q, k, v, sinks, subtree_end, options, blocks)
        out, statistics = call.forward()
        ctx.save_for_backward(call.q, call.k, call.v, sinks, subtree_end, out, statistics)
        ctx.options, ctx.blocks = options, call.blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, subtree_end, out, statistics = ctx.saved_tensors
        with kernel_context(q):
            call = Attention.prepare(q, k, v, sinks, subtree_end, ctx.options, ctx.blocks)
            grads = call.backward(grad, out, statistics)
            return *grads[:3], None if grads.sinks is None else grads.sinks.to(sinks.dtype), None, None, None


def tree_attention_triton(
    q: Tensor,  # (T, Hq, d)
    k: Tensor,  # (P + T, Hkv, d)
    v: Tensor,  # (P + T, Hkv, d)
    sinks: Tensor | None,  # (Hq,)
    subtree_end: Tensor,  # (T,)
    options: AttentionOptions,
    blocks: TreeBlockLists | None,
) -> Tensor:  # (T, Hq, d)
    """Compute `tree_attention` by Triton kernels; see there."""
    return _TreeAttention.apply(q, k, v, sinks, subtree_end, options, blocks)
