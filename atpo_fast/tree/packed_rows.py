"""The record between packing and the policy: one row of packed search trees (docs/design.md#fields-of-a-row).

Shapes: T tokens, A action tokens, N turns with at least one action token, S trajectories (distinct leaves),
P entries of the leaf → turn path tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class PackedTrees:
    """A packed row. Its trees follow one another, each in depth-first pre-order with one copy of every token.

    The whole attention mask is `subtree_end`: query q sees key k iff `k <= q < subtree_end[k]`. A row of a tree over
    the budget may continue rows before it in the list: then its tokens also see a prefix, all tokens of the rows above.
    Float fields have the dtype asked of `pack_trees` (float32 by default). Fields are plain tensors and may be
    replaced (a fresh `old_logprob`, say).
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, depth along the path
    subtree_end: Tensor  # (T,) int32, row index after the last token of the token's turn's subtree; stays on the CPU

    predictor: Tensor  # (A,) int64, index of the hidden state that predicts the action token; -1: the prefix's last
    targets: Tensor  # (A,) int64, the action tokens
    old_logprob: Tensor | None  # (A,) log-prob when sampled (the engine's until replaced); None: the current one
    rollout_logprob: Tensor  # (A,) log-prob of the engine
    ref_logprob: Tensor  # (A,) log-prob under the reference policy (zeros until filled)
    turn_offsets: Tensor  # (N+1,) int32, CSR over the A axis; stays on the CPU
    # The weights are the loss mask: only action tokens have them, and they are 0 where a token is repeated.
    weight_pos: Tensor  # (A,) W+: sum of w * max(A, 0) over the trajectories through the token
    weight_neg: Tensor  # (A,) W-: sum of w * max(-A, 0)
    weight_all: Tensor  # (A,) W0: sum of w; weighs KL and entropy terms
    trajectory_count: Tensor  # (A,) trajectories through the token, with multiplicity; 0 on repeated tokens

    path_offsets: Tensor  # (S+1,) int32, CSR: the turns of each trajectory in `path_turns`
    path_turns: Tensor  # (P,) int32, indices into the N turns of this row, root side first
    path_weight_pos: Tensor  # (P,) per-token weight w * max(A, 0) of one trajectory in one turn (level `sequence`)
    path_weight_neg: Tensor  # (P,) per-token weight w * max(-A, 0) of one trajectory in one turn
    leaf_multiplicity: Tensor  # (S,) float, number of times that the trajectory counts

    turn_tree: Tensor  # (N,) int32, tree of the turn, as an index into the list given to `pack_trees`
    turn_index: Tensor  # (N,) int32, index of the turn in that tree
    leaf_turn: Tensor  # (S,) int32, index in the tree of the trajectory's leaf
    leaf_tree: Tensor  # (S,) int32, tree of the trajectory

    unique_tokens: int  # tokens of this row that are not repeats: summed over rows, the tokens kept of the forest
    flat_tokens: int  # tokens of the row's trajectories written out, with multiplicity

    clip_low: Tensor | None = None  # (N,) distance of the turn's lower clip bound from 1; None: the objective's
    clip_high: Tensor | None = None  # (N,) distance of the turn's upper clip bound from 1; None: the objective's

    depth: int = 0  # number of rows above; the nearest earlier row of depth - 1 is the one right above
    prefix_tokens: int = 0  # tokens of the rows above, root first: every token of this row sees all of them

    @property
    def num_tokens(self) -> int:
        """Number T of tokens of the row."""
        return self.input_ids.numel()

    @property
    def num_actions(self) -> int:
        """Number A of action tokens of the row."""
        return self.targets.numel()

    @property
    def num_turns(self) -> int:
        """Number N of turns with at least one action token."""
        return self.turn_offsets.numel() - 1

    @property
    def num_trajectories(self) -> int:
        """Number S of distinct trajectories of the row."""
        return self.path_offsets.numel() - 1

    def to(self, device: torch.device | str) -> PackedTrees:
        """Copy the row to `device`; `subtree_end` and `turn_offsets` stay: the CPU reads them to plan kernels."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name not in ("subtree_end", "turn_offsets")
        }
        return replace(self, **moved)


def empty_row(dtype: torch.dtype = torch.float32) -> PackedTrees:
    """Make a row that runs a real forward and backward and adds exactly 0: two tokens, one action token of weight 0."""
    zero = torch.zeros(1, dtype=dtype)
    index = torch.zeros(1, dtype=torch.int32)
    return PackedTrees(
        input_ids=torch.zeros(2, dtype=torch.int64),
        position_ids=torch.arange(2),
        subtree_end=torch.full((2,), 2, dtype=torch.int32),
        predictor=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        old_logprob=zero.clone(),
        rollout_logprob=zero.clone(),
        ref_logprob=zero.clone(),
        turn_offsets=torch.tensor([0, 1], dtype=torch.int32),
        weight_pos=zero.clone(),
        weight_neg=zero.clone(),
        weight_all=zero.clone(),
        trajectory_count=zero.clone(),
        path_offsets=torch.tensor([0, 1], dtype=torch.int32),
        path_turns=index.clone(),
        path_weight_pos=zero.clone(),
        path_weight_neg=zero.clone(),
        leaf_multiplicity=zero.clone(),
        turn_tree=index - 1,
        turn_index=index - 1,
        leaf_turn=index - 1,
        leaf_tree=index - 1,
        unique_tokens=0,
        flat_tokens=0,
    )
