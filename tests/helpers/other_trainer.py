"""A trainer that is not ours, with FusedLinearTurnPolicyLoss in its LM head: used by distributed_gradients.py."""

from __future__ import annotations

from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from atpo_fast.train.zero import gather_experts_whole
from atpo_kernels import FusedLinearTurnPolicyLoss
from atpo_kernels.hosts.plain import LossHead

ROWS, LENGTH, WIDTH, VOCAB = 4, 7, 32, 64


class OtherPolicy(nn.Module):
    """Embedding, body and head; with `head_inside` the head is called in the forward, else by the trainer after it."""

    def __init__(self, tied: bool, head_inside: bool):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        linear = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            linear.weight = self.embedding.weight
        self.head = LossHead(linear, FusedLinearTurnPolicyLoss(loss_type="dapo", beta=0.1))
        self.head_inside = head_inside

    def forward(self, ids: Tensor, *batch: Tensor, **more: Tensor) -> Any:
        hidden = self.body(self.embedding(ids))
        return self.head(hidden, *batch, **more) if self.head_inside else hidden


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """A DeepSpeed engine that partitions every parameter, however small."""
    gather_experts_whole(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def whole_gradients(model: nn.Module, stage: int) -> dict[str, np.ndarray]:
    """The gradient of every parameter that is trained, put together from the ranks."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads: dict[str, Any] = {name: p.grad if stage == 0 else safe_get_full_grad(p) for name, p in trained.items()}
    return {name: grad.double().cpu().numpy().copy() for name, grad in grads.items()}


def module_gradients(stage: int, tied: bool, head_inside: bool, rank: int, world: int) -> dict[str, np.ndarray]:
    """Gradients of the second of two equal steps; rows are split over the ranks, which have unequal token counts."""
    torch.manual_seed(1)
    model = OtherPolicy(tied, head_inside)
    engine = start_engine(model, torch.optim.SGD(model.parameters(), lr=0.0), stage)
    rng = torch.Generator().manual_seed(2)
    ids, targets = (torch.randint(VOCAB, (ROWS, LENGTH), generator=rng) for _ in range(2))
    mask = torch.rand(ROWS, LENGTH, generator=rng) < torch.tensor([0.9, 0.8, 0.4, 0.3])[:, None]
    advantages = torch.randn(ROWS, generator=rng)
    old, ref = (-torch.rand(ROWS, LENGTH, generator=rng) - 3.5 for _ in range(2))
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    ids, *batch = (x[mine] for x in (ids, targets, mask, advantages))
    more = {"old_per_token_logps": old[mine], "ref_per_token_logps": ref[mine]}
    for _ in range(2):
        out = engine(ids, *batch, **more)
        loss, metrics = out if head_inside else model.head(out, *batch, **more)
        assert metrics.by_name["tokens"] == batch[1].sum()
        engine.backward(loss)
        gradients = whole_gradients(model, stage)
        engine.step()
    if stage == 3 and world > 1:
        _assert_refused(model, batch, more)
    engine.destroy()
    return gradients


def _assert_refused(model: OtherPolicy, batch: list[Tensor], more: dict[str, Tensor]) -> None:
    """Outside of its module's forward the weight is partitioned, and the loss says so."""
    hidden = torch.zeros(len(batch[0]), LENGTH, WIDTH)
    try:
        model.head.loss(hidden, model.head.weight, *batch, **more)
    except ValueError as error:
        assert "weight has no elements" in str(error) and "ZeRO-3" in str(error), error
    else:
        raise AssertionError("a partitioned weight was not refused")
