"""Attention over a row by our operator and by its peers: one adapter each, for single layers and for whole models.

What a row needs before its first layer (lists, masks) is built by `prepare`, apart from the attention itself, because
all layers share it. Imports are inside the adapters; a peer that is not installed is skipped by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from atpo_kernels import make_attention_blocks, tree_attention
from atpo_kernels.tree_attention.reference import tree_mask
from bench.attention.candidates import CHANGES
from bench.attention.cases import WINDOWS
from bench.attention.flex import make_flex_mask
from bench.attention.sdpa import tree_attention_sdpa
from bench.attention.xformers import tree_attention_xformers
from bench.packing.rows import sequence_ends

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]
"""q (T, Hq, d), k and v (T, Hkv, d), subtree_end (T,), what was prepared -> (T, Hq, d)"""


class Heads(NamedTuple):
    """Sizes and dtype of the tensors that will be attended over."""

    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype


Prepare = Callable[[Tensor, Heads, torch.device], Any]  # subtree_end (T,) on the host


@dataclass(frozen=True, slots=True)
class Attention:
    """An implementation of attention: its preparation of a row, and the attention itself."""

    prepare: Prepare
    attend: Attend


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The constructor of an implementation, and a note on how its work differs from ours."""

    make: Callable[[], Attention]
    flat: bool = False
    """Whether it takes rows without branches only."""
    same_work: bool = True
    note: str = ""
    window: int | None = None


def _tree_attention(impl: str, window: int | None = None) -> Attention:
    def prepare(subtree_end: Tensor, heads: Heads, device: torch.device) -> Any:
        q, k, d, dtype = heads
        return make_attention_blocks(
            subtree_end, query_heads=q, key_heads=k, head_dim=d, dtype=dtype, device=device, impl=impl, window=window
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, blocks: Any) -> Tensor:
        return tree_attention(q, k, v, subtree_end, window=window, blocks=blocks, impl=impl)

    return Attention(prepare, attend)


def _windowed(window: int) -> Peer:
    note = f"ours over windows of {window} tokens"
    return Peer(make=lambda: _tree_attention("auto", window), same_work=False, note=note, window=window)


def _heads_first(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call a function of (1, H, T, d) on (T, H, d)."""
    grouped = q.shape[1] != k.shape[1]
    return function(*(x.transpose(0, 1)[None] for x in (q, k, v)), enable_gqa=grouped, **options)[0].transpose(0, 1)


def _sdpa() -> Attention:
    return Attention(
        lambda subtree_end, _, device: tree_mask(subtree_end.to(device), 0),
        lambda q, k, v, ends, mask: tree_attention_sdpa(q, k, v, ends, blocks=mask),
    )


@lru_cache
def _compiled_flex(dynamic: bool) -> Callable[..., Tensor]:
    """Compile FlexAttention once for all cases of a run, as in a trainer."""
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("FlexAttention is measured on CUDA only: it has no backward on CPUs")
    return torch.compile(import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=dynamic)


def _flex(dynamic: bool, backend: str | None = None) -> Attention:
    """Attend with a BlockMask built from our block lists, by PyTorch's choice of kernel or by a named one."""
    flex = _compiled_flex(dynamic)
    options = {} if backend is None else {"kernel_options": {"BACKEND": backend}}
    return Attention(
        lambda subtree_end, _, device: make_flex_mask(subtree_end.to(device)),
        lambda q, k, v, _, mask: _heads_first(flex, q, k, v, block_mask=mask, **options),
    )


def _flex_dense() -> Attention:
    """Attend with a BlockMask that FlexAttention makes itself, from a dense mask."""
    flex = _compiled_flex(True)
    create = import_module("torch.nn.attention.flex_attention").create_block_mask

    def prepare(subtree_end: Tensor, _: Heads, device: torch.device) -> Any:
        dense, tokens = tree_mask(subtree_end.to(device), 0), len(subtree_end)
        return create(lambda b, h, query, key: dense[query, key], None, None, tokens, tokens, device=device)

    return Attention(prepare, lambda q, k, v, _, mask: _heads_first(flex, q, k, v, block_mask=mask))


def _areal() -> Attention:
    """Take AReaL's own steps: a trie of the written-out sequences, its dense mask, FlexAttention compiled its way.

    Its order of the tokens is that of its trie; rows here have random numbers for tokens, so the sizes are the same.
    """
    tree, module = (import_module(f"areal.models.tree_attn.{name}") for name in ("tree", "module_fsdp"))
    spec = import_module("areal.api.cli_args").MicroBatchSpec

    def prepare(subtree_end: Tensor, _: Heads, device: torch.device) -> Any:
        ids, mask = _sequences(subtree_end)
        padded = -(-len(subtree_end) // 128) * 128
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        packed = tree.build_packed_tree_batch(batch, spec(max_tokens_per_mb=padded), pad_to_maximum=True).mbs[0]
        if "block_mask" in packed:
            return packed["block_mask"]
        return tree.build_block_mask_from_trie(packed["trie_node"], padded, device)

    def attend(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, mask: Any) -> Tensor:
        rest = mask.shape[-1] - len(q)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (q, k, v))
        return _heads_first(module._flex_attention, q, k, v, block_mask=mask)[: len(subtree_end)]

    return Attention(prepare, attend)


def _sequences(subtree_end: Tensor) -> tuple[Tensor, Tensor]:  # (T,) -> (B, L), (B, L)
    """Write out the trajectories of a row; each token is known by its place in the row."""
    end = subtree_end.long()
    index = torch.arange(len(end))
    leaf = torch.nonzero(end == index + 1).squeeze(1)
    paths = [torch.nonzero((index <= last) & (last < end)).squeeze(1) for last in leaf.tolist()]
    ids = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
    lengths = torch.tensor([len(path) for path in paths])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _varlen() -> Attention:
    varlen = import_module("torch.nn.attention.varlen").varlen_attn
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("torch.nn.attention.varlen needs CUDA")

    def prepare(subtree_end: Tensor, _: Heads, device: torch.device) -> Any:
        ends = torch.tensor([0, *sequence_ends(subtree_end)], dtype=torch.int32)
        return ends.to(device, non_blocking=True), int(ends.diff().max())

    known = inspect.signature(varlen).parameters  # they differ between PyTorch 2.10, 2.11 and later
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor, prepared: Any) -> Tensor:
        ends, longest = prepared
        if not grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        options = causal | ({"enable_gqa": True} if grouped else {})
        return varlen(q, k, v, ends, ends, longest, longest, **options)

    return Attention(prepare, attend)


def _xformers() -> Attention:
    masks = import_module("xformers.ops.fmha.attn_bias").BlockDiagonalCausalMask

    def prepare(subtree_end: Tensor, _: Heads, device: torch.device) -> Any:
        ends = torch.tensor([0, *sequence_ends(subtree_end)])
        return masks.from_seqlens(ends.diff().tolist(), device=device)

    return Attention(prepare, lambda q, k, v, ends, mask: tree_attention_xformers(q, k, v, ends, blocks=mask))


def _causal() -> Attention:
    """Run FlashAttention through PyTorch over as many tokens, all of one sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _heads_first(F.scaled_dot_product_attention, q, k, v, is_causal=True)

    return Attention(lambda *_: None, attend)


def _flash(module: str) -> Attention:
    """Run a FlashAttention of its own package over as many tokens, all of one sequence."""
    function = import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Any) -> Tensor:
        out = function(q[None], k[None], v[None], causal=True)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return Attention(lambda *_: None, attend)


ATTENTION: dict[str, Peer] = {
    "ours": Peer(make=lambda: _tree_attention("auto")),
    "flex": Peer(make=lambda: _flex(True), note="compiled FlexAttention with a BlockMask of our lists, for any length"),
    "flex_flash": Peer(
        make=lambda: _flex(False, "FLASH"),
        note="FlexAttention on FlashAttention 4's kernels (BACKEND=FLASH), same mask",
    ),
    "flex_static": Peer(make=lambda: _flex(False), note="the same, compiled again for every length"),
    "flex_dense": Peer(make=_flex_dense, note="FlexAttention whose BlockMask is made from a dense mask"),
    "areal": Peer(make=_areal, note="AReaL: trie and dense mask made on the host, FlexAttention"),
    "sdpa": Peer(make=_sdpa, note="scaled_dot_product_attention with a dense mask"),
    "varlen": Peer(make=_varlen, flat=True, note="FlashAttention on flat rows, torch.nn.attention.varlen"),
    "xformers": Peer(make=_xformers, flat=True, note="xformers' BlockDiagonalCausalMask on flat rows"),
    "causal": Peer(
        make=_causal,
        flat=True,
        same_work=False,
        note="yardstick: FlashAttention 2, as PyTorch's SDPA has it, causal, as many tokens in a sequence",
    ),
    "causal_fa3": Peer(
        make=lambda: _flash("flash_attn_interface"),
        flat=True,
        same_work=False,
        note="yardstick: FlashAttention 3, causal, as many tokens in a sequence",
    ),
    "causal_fa4": Peer(
        make=lambda: _flash("flash_attn.cute"),
        flat=True,
        same_work=False,
        note="yardstick: FlashAttention 4, causal, as many tokens in a sequence",
    ),
}
ATTENTION |= {name: Peer(make=lambda: _tree_attention("auto"), note=change.note) for name, change in CHANGES.items()}
ATTENTION |= {name: _windowed(window) for name, window in WINDOWS.items()}
