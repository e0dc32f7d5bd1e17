"""Checkpointing with tokens left out of the backward gives the gradients of the full backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_policy import MODELS, make, trees
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy
from atpo_fast.policy.checkpointing import GradientTokens
from atpo_kernels import make_tree_blocks


def gradients(policy: Policy, row: PackedTrees, coef: Tensor) -> dict[str, Tensor]:
    """Of sum(coef * logprob)."""
    policy.zero_grad()
    logprob, _ = policy(row)
    (logprob * coef).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def one_row() -> PackedTrees:
    (row,) = pack_trees(trees(), Objective.preset("at2po"), 4096, dtype=torch.float64)
    return row


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("alive", ["all", "one turn", "one token", "none", "half"])
def test_equal_to_the_full_backward(name: str, alive: str) -> None:
    """Fails if an ancestor of a token with gradient is left out, or a kept token's position or mask is wrong."""
    row = one_row()
    rng = torch.Generator().manual_seed(1)
    coef = torch.randn(row.num_actions, generator=rng, dtype=torch.float64)
    last = row.num_turns - 1
    turn = torch.arange(row.num_turns).repeat_interleave(row.turn_offsets.diff())
    index = torch.arange(row.num_actions)
    keep = {
        "all": torch.ones_like(turn, dtype=torch.bool),
        "one turn": turn == last,
        "one token": index == row.num_actions // 2,
        "none": torch.zeros_like(turn, dtype=torch.bool),
        "half": turn % 2 == 0,
    }[alive]
    full, pruned = (Policy(make(name), gradient_checkpointing=on).train() for on in (False, True))
    expected, found = (gradients(policy, row, coef * keep) for policy in (full, pruned))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12, msg=f"{name} {parameter}")
    assert pruned.dropped_tokens >= (row.num_tokens // 2 if alive in ("one turn", "one token", "none") else 0)


def test_every_backward_is_cut_anew() -> None:
    """Fails if what one backward left out is still left out in the next, or a second row takes the first's tokens."""
    row, policy = one_row(), Policy(make("qwen3"), gradient_checkpointing=True).train()
    full = Policy(make("qwen3")).train()
    coefs = [torch.zeros(row.num_actions, dtype=torch.float64) for _ in range(2)]
    coefs[0][0], coefs[1][-1] = 1, 1
    for coef in coefs:
        expected, found = gradients(full, row, coef), gradients(policy, row, coef)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_needed_tokens_are_the_ancestors(seed: int) -> None:
    """Fails if the needed tokens are not exactly those that a token with gradient sees, by brute force."""
    rng = np.random.default_rng(seed)
    tree = TurnTree(rng.integers(0, 9, 5))
    inner = {0}
    for turn in range(1, 13):
        parent = int(rng.integers(0, turn))
        inner.add(parent)
        tree.add_turn(parent, rng.integers(0, 9, rng.integers(1, 5)), observation_ids=[1, 2])
    for leaf in set(range(13)) - inner:
        tree.set_reward(leaf, float(rng.random()))
    assign_credit([tree])
    (row,) = pack_trees([tree], Objective.preset("at2po"), 4096, prune=False)
    end, length = row.subtree_end.long(), row.num_tokens
    carries = torch.from_numpy(rng.random(length) < 0.05)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    needed = ((k <= q) & (q < end[None, :]) & carries[:, None]).any(0)
    needed[0] = True
    tokens = GradientTokens(row.subtree_end, make_tree_blocks)
    tokens.observe(carries[None, :, None].double())
    if needed.sum() > 0.95 * length:
        assert tokens.index is None
        return
    assert torch.equal(tokens.index, needed.nonzero().squeeze(1))
    kept = tokens.index
    visible = (k <= q) & (q < end[None, :])
    new_end = tokens._by_name["subtree_end"].long()
    i = torch.arange(len(kept))
    assert torch.equal((i[None, :] <= i[:, None]) & (i[:, None] < new_end[None, :]), visible[kept][:, kept])


def test_dropout_is_refused() -> None:
    """Fails if a layer that draws random numbers is computed twice with different ones."""
    model = make("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        Policy(model, gradient_checkpointing=True)
