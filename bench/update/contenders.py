"""One update, or one layer's forward and backward, in every layout that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.policy.attention import TREE_ATTENTION
from atpo_fast.policy.checkpointing import checkpoint_layer
from bench.attention.peers import ATTENTION, Attention, Heads
from bench.packing.rows import OBJECTIVE, Padded, every_position, pad
from bench.update.cases import Checkpointing
from bench.update.models import Shape, build

ANY_ATTENTION = "bench_any"
_PADDED_TOKENS = 8192  # of a padded batch, whose logits are all in memory, unless one sequence is longer

Rows = Sequence[PackedTrees]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One layout of the same trajectories, and how a model runs over it."""

    flat: bool
    note: str = ""
    attention: str = "ours"
    full_head: bool = False
    padded: bool = False
    repeated: bool = False
    """Whether a tree that does not fit a row is cut so that its pieces repeat their ancestors."""
    clipped: bool = True
    """Whether its rows have the case's clipped turns."""


CONTENDERS = {
    "ours": Contender(flat=False),
    "none_clipped": Contender(flat=False, clipped=False, note="ours on the same rows with no turn clipped"),
    "tree_repeated": Contender(flat=False, repeated=True, note="ours on rows that repeat their ancestors"),
    "tree_sdpa": Contender(
        flat=False, repeated=True, attention="sdpa", note="trees, scaled_dot_product_attention with a dense mask"
    ),
    "tree_flex_dense": Contender(
        flat=False,
        repeated=True,
        attention="flex_dense",
        note="trees, FlexAttention, BlockMask from a dense mask",
    ),
    "flat": Contender(flat=True, note="flat rows, our attention, our head on action rows"),
    "flat_varlen": Contender(
        flat=True, attention="varlen", note="flat rows, torch's varlen FlashAttention, our head on action rows"
    ),
    "flat_xformers": Contender(flat=True, attention="xformers", note="flat rows, xformers, our head on action rows"),
    "flat_full_head": Contender(
        flat=True, full_head=True, note="flat rows, our attention, fused head on every position"
    ),
    "flat_varlen_full_head": Contender(
        flat=True, attention="varlen", full_head=True, note="flat rows, varlen FlashAttention, head on every position"
    ),
    "flat_padded": Contender(
        flat=True, padded=True, note="padded batches, Hugging Face's sdpa attention, plain logits of every position"
    ),
}


class Model:
    """A policy of random weights that runs in any layout, and its optimizer, whose learning rate is 0.

    Args:
        shape: sizes of the model.
        layers: number of layers.
        dtype: dtype of weights, gradients and optimizer states.
        device: device of the model.
        checkpointing: "layer" keeps only each layer's input, for the peers in Hugging Face's way; "mlp": ours only.
    """

    def __init__(self, shape: Shape, layers: int, dtype: torch.dtype, device: str, checkpointing: Checkpointing):
        AttentionInterface.register(ANY_ATTENTION, _any_attention)
        self.heads = Heads(shape.heads, shape.key_heads, shape.head_dim, dtype)
        self.layers = layers
        self.device, self.checkpointing = torch.device(device), checkpointing
        self.policy = Policy(build(shape, layers, dtype, device), gradient_checkpointing=checkpointing).train()
        self.model: Any = self.policy.model
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, fused=device == "cuda")
        self._running = TREE_ATTENTION

    def make_states(self) -> None:
        """Make the optimizer's states, which otherwise the first step would make."""
        for parameter in self.policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run_with(self, implementation: str) -> None:
        """Switch the model's attention, and with it whose checkpointing it uses."""
        if implementation == self._running:
            return
        self._running = implementation
        self.model.set_attn_implementation(implementation)
        if self.checkpointing == "layer" and implementation == TREE_ATTENTION:
            self.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint_layer)
        elif self.checkpointing == "layer":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def hidden_states(self, row: PackedTrees, attention: Attention) -> Tensor:  # (T, D)
        """Compute hidden states through any attention; `row` is on the device."""
        out = self.model.model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            use_cache=False,
            any_attention=self.attend(row, attention),
        )
        return out.last_hidden_state[0]

    def attend(self, row: PackedTrees, attention: Attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Make the function (q, k, v) -> output of a row."""
        end = row.subtree_end.to(self.device)
        prepared = attention.prepare(row.subtree_end, self.heads, self.device)
        return lambda q, k, v: attention.attend(q, k, v, end, prepared)


def _any_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, d)
    key: Tensor,  # (1, Hkv, T, d)
    value: Tensor,  # (1, Hkv, T, d)
    attention_mask: Tensor | None,
    any_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert any_attention is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return any_attention(q, k, v)[None], None


def make_update(name: str, model: Model, rows: Rows) -> Callable[[], Tensor]:
    """Make the call of a contender's update over its rows: gradients and a step; it returns the loss.

    Raises ImportError for a package that is not installed.
    """
    contender = CONTENDERS[name]
    if contender.padded:
        backward: Callable[[], Tensor] = partial(_padded_backward, model, [(row, pad(row)) for row in rows])
    elif contender.attention == "ours":
        rows = [every_position(row) for row in rows] if contender.full_head else rows
        backward = partial(_our_backward, model, rows)
    else:
        rows = [every_position(row) for row in rows] if contender.full_head else rows
        backward = partial(_row_backward, model, rows, ATTENTION[contender.attention].make())

    def update() -> Tensor:
        model.optimizer.zero_grad()
        loss = backward()
        model.optimizer.step()
        return loss

    return update


def padded_tokens(longest: int) -> int:
    """Return the most tokens of a row that becomes a padded batch."""
    return max(_PADDED_TOKENS, longest)


def _our_backward(model: Model, rows: Rows) -> Tensor:
    model.run_with(TREE_ATTENTION)
    return accumulate_gradients(model.policy, rows, OBJECTIVE)


def _row_backward(model: Model, rows: Rows, attention: Attention) -> Tensor:
    model.run_with(ANY_ATTENTION)
    total = torch.zeros((), device=model.device)
    for row in rows:
        row = row.to(model.device)
        hidden = model.hidden_states(row, attention)
        loss = model.model.lm_head(hidden.index_select(0, row.predictor), row, OBJECTIVE).loss
        loss.backward()
        total += loss.detach()
    return total


def _padded_backward(model: Model, batches: Sequence[tuple[PackedTrees, Padded]]) -> Tensor:
    """Do what a trainer without packing does: (B, L, V) logits, log-softmax, and the loss on them."""
    model.run_with("sdpa")
    total = torch.zeros((), device=model.device)
    for row, padded in batches:
        row, ids = row.to(model.device), padded.input_ids.to(model.device)
        mask, predictor = padded.mask.to(model.device), padded.predictor.to(model.device)
        hidden = model.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logprob = F.linear(hidden, model.model.lm_head.weight).float().log_softmax(-1)  # (B, L, V)
        chosen = logprob.gather(2, ids.roll(-1, 1)[..., None]).view(-1)  # (B * L,)
        loss = OBJECTIVE.loss(chosen[predictor], row)
        loss.backward()
        total += loss.detach()
    return total


def make_layer(name: str, model: Model, rows: Rows) -> Callable[[], None]:
    """Return a call of the first layer's forward and backward over a contender's rows; lists and masks are built."""
    attention = ATTENTION[CONTENDERS[name].attention].make()
    layer = model.model.model.layers[0]
    problems = []
    for row in rows:
        size = (1, row.num_tokens, model.model.config.hidden_size)
        hidden, upstream = (torch.randn(size, device=model.device, dtype=model.heads.dtype) for _ in range(2))
        positions = row.position_ids[None].to(model.device)
        known = {"position_ids": positions, "position_embeddings": model.model.model.rotary_emb(hidden, positions)}
        problems.append((hidden.requires_grad_(), upstream, known, model.attend(row, attention)))

    def run() -> None:
        model.run_with(ANY_ATTENTION)
        model.optimizer.zero_grad()
        for hidden, upstream, known, attend in problems:
            hidden.grad = None
            layer(hidden, attention_mask=None, any_attention=attend, **known).backward(upstream)

    return run
