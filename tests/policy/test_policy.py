"""The policy over packed rows equals separate forwards of each trajectory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atpo_fast import Objective, pack_trees
from atpo_fast.packing import spread_rows
from atpo_fast.policy import Policy
from tests.helpers.flat_reference import exact_norms
from tests.helpers.policies import MODELS, SIZES, grad_of, make, trees


# Fails when positions restart wrongly, a sibling is visible, the predictor of a branch's first token is off by one,
# or an architecture ignores the attention it was given.
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_logprobs_equal_separate_forwards(name: str) -> None:
    plain, forest = make(name), trees()
    policy = Policy(make(name))
    (row,) = pack_trees(forest, Objective.preset("at2po"), 4096, dtype=torch.float64)
    logprob, _ = policy(row)
    for n in range(row.num_turns):
        tree, turn = forest[int(row.turn_tree[n])], int(row.turn_index[n])
        ids = torch.from_numpy(np.concatenate([tree.path_ids(tree.turns[turn].parent), tree.turns[turn].action_ids]))
        logits = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        length = len(tree.turns[turn].action_ids)
        expected = logits[-length - 1 : -1].gather(1, ids[-length:, None])[:, 0]
        begin, end = row.turn_offsets[n : n + 2].tolist()
        torch.testing.assert_close(logprob[begin:end], expected, rtol=1e-10, atol=1e-10)


# Fails when spreading loses or doubles a row, or an empty row has a gradient. (float64, which DeepSpeed does not have;
# test_distributed.py repeats it on real ranks and ZeRO stages in float32.)
@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_does_not_depend_on_ranks_and_rows(level: str, tied: bool) -> None:
    objective = Objective.preset("at2po", level=level, clip_low=5.0, clip_high=5.0)
    gradients = []
    for max_tokens, ranks in ((4096, 1), (4096, 3), (22, 1), (22, 2)):
        torch.manual_seed(0)
        config = Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied)
        policy = Policy(exact_norms(Qwen3ForCausalLM(config).double()))
        rows = pack_trees(trees(), objective, max_tokens, dtype=torch.float64)
        for mine in spread_rows(rows, ranks):
            for row in mine:
                policy(row, objective).loss.backward()
        gradients.append({n: grad_of(p) for n, p in policy.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-10 * float(gradient.abs().max()))


def test_no_old_logprobs_are_the_current_ones() -> None:
    """Fails if the first mini-batch's update differs from one with old log-probs of a pass of their own."""
    (row,) = pack_trees(trees(), Objective.preset("at2po"), 4096, dtype=torch.float64)
    policy = Policy(make("qwen3")).train()
    with torch.no_grad():
        own, _ = policy(row)
    grads = []
    for old in (None, own):
        policy.zero_grad()
        policy(replace(row, old_logprob=old), Objective.preset("at2po")).loss.backward()
        grads.append([grad_of(p).clone() for p in policy.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-14)


# Fails when recomputation loses the row's keyword arguments or the head's gradient is taken twice.
def test_gradient_checkpointing_changes_nothing() -> None:
    objective = Objective.preset("at2po", clip_low=5.0, clip_high=5.0)
    (row,) = pack_trees(trees(), objective, 4096, dtype=torch.float64)
    gradients = []
    for checkpointing in ("none", "layer", "mlp"):
        policy = Policy(make("qwen3"), gradient_checkpointing=checkpointing).train()
        policy(row, objective).loss.backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-10, atol=1e-12)


# Fails when the fused head and the two-operator path disagree, i.e. two copies of the loss maths.
def test_fused_loss_equals_objective_on_logprobs() -> None:
    objective = Objective.preset("dapo", kl="k3", kl_coef=0.1, entropy_coef=0.01)
    (row,) = pack_trees(trees(), objective, 4096, dtype=torch.float64)
    policy = Policy(make("qwen3"))
    fused = policy(row, objective).loss
    logprob, entropy = policy(row)
    torch.testing.assert_close(fused, objective.loss(logprob, row, entropy), rtol=1e-12, atol=1e-12)
