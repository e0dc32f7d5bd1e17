"""A batch of TRL, packed as trees and trained on by our own policy: the gradients are TRL's (the real package)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atpo_fast import Objective, from_trajectories
from atpo_fast.packing.flat import trl_batch, verl_batch
from atpo_fast.policy import Policy, accumulate_gradients
from tests.helpers.policies import MODELS

VOCAB, P, T = 50, 12, 9


def group_batch() -> dict[str, Tensor]:
    """Two prompts, padded on the left, with four completions each; tool results lie between turns."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (2, P), generator=rng).repeat_interleave(4, 0)
    prompt_mask = (torch.arange(P) >= torch.tensor([0, 3]).repeat_interleave(4)[:, None]).long()
    length = torch.randint(3, T + 1, (8,), generator=rng)
    tool_mask = torch.ones(8, T, dtype=torch.long)
    tool_mask[:, 2:4] = 0
    return {
        "prompt_ids": prompts * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(VOCAB, (8, T), generator=rng),
        "completion_mask": (torch.arange(T) < length[:, None]).long(),
        "tool_mask": tool_mask,
        "advantages": torch.randn(8, generator=rng),
        "num_items_in_batch": torch.tensor(1.0),
    }


def with_old(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with old log-probs near the model's, so that some turns are clipped and some are not."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, P - 1 : -1]
        logprob = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    noise = torch.randn(logprob.shape, generator=torch.Generator().manual_seed(1))
    return inputs | {"old_per_token_logps": logprob + 0.004 * noise}


def test_gradients_of_trl_and_of_our_own_loop_are_equal(tmp_path: Any) -> None:
    """Fails if the two disagree on turns, averages, masks or positions: 1e-5 of the largest entry, in float32.

    The prompts of a group are forwarded once by ours.
    """
    pytest.importorskip("trl")
    from tests.kernels.hosts.test_trl import make

    torch.manual_seed(0)
    model = MODELS["qwen3"]().float()
    trainer = make(tmp_path, model=model)
    inputs = with_old(model, group_batch())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    policy = Policy(MODELS["qwen3"]().float())
    objective = Objective.preset("at2po")
    rows = from_trajectories(trl_batch(inputs), objective, 4096, prune=False)
    accumulate_gradients(policy.train(), rows, objective)
    assert sum(len(row.input_ids) for row in rows) <= sum(len(row) for row in inputs["prompt_ids"][::4]) + 8 * T
    for name, p in policy.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, theirs[name], rtol=0, atol=1e-5 * float(theirs[name].abs().max()))


def test_batches_of_verl_are_read_alike() -> None:
    """Fails if verl's whole rows are cut at another place than TRL's parts."""
    inputs = with_old(MODELS["qwen3"]().float(), group_batch())
    action = inputs["completion_mask"] * inputs["tool_mask"]
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        "response_mask": action,
        "old_log_probs": inputs["old_per_token_logps"],
        "advantages": inputs["advantages"][:, None] * action,
    }
    objective = Objective.preset("at2po")
    ours, theirs = (from_trajectories(given, objective, 4096) for given in (trl_batch(inputs), verl_batch(batch)))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.weight_pos, b.weight_pos)
        assert a.old_logprob is not None and b.old_logprob is not None and torch.equal(a.old_logprob, b.old_logprob)
