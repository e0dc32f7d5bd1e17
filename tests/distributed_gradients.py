"""Worker of test_distributed.py: the gradient of one mini-batch under DeepSpeed, for several stages and row budgets.

Run by the test as `python -m torch.distributed.run --nproc_per_node R tests/distributed_gradients.py OUT`; rank 0
writes one .npz per case, holding every parameter's whole gradient under its Hugging Face name.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.packing import spread_rows
from atpo_fast.policy import Policy
from atpo_fast.train.deepspeed_setup import join_process_group
from atpo_fast.train.optimizer import GradientWatch, GuardedAdamW

VOCAB = 64
BUDGETS = (4096, 40)  # everything in one row; many rows, trees cut


def forest() -> list[TurnTree]:
    """Three trees with branches, an empty observation and unequal rewards."""
    rng = np.random.default_rng(0)
    trees = []
    for t in range(3):
        tree = TurnTree(rng.integers(0, VOCAB, 9), question_id=f"q{t}")
        for c in range(3):
            inner = tree.add_turn(0, rng.integers(0, VOCAB, 4 + c), -rng.random(4 + c), rng.integers(0, VOCAB, c * 3))
            for leaf in range(2):
                n = tree.add_turn(inner, rng.integers(0, VOCAB, 3 + leaf), -rng.random(3 + leaf))
                tree.set_reward(n, float(rng.integers(0, 2)))
        trees.append(tree)
    assign_credit(trees, method="at2po")
    return trees


def gradients(stage: int, tied: bool, budget: int, rank: int, world: int) -> dict[str, np.ndarray]:
    """Whole gradients of one mini-batch after the last backward."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen3Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    policy = Policy(Qwen3ForCausalLM(config))
    optimizer = GuardedAdamW(policy.parameters(), lr=0.0)
    GradientWatch(policy, optimizer)
    engine, _, _, _ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    objective = Objective.preset("at2po", clip_low=10.0, clip_high=10.0)
    rows = spread_rows(pack_trees(forest(), objective, budget), world)[rank]
    for i, row in enumerate(rows):
        engine.set_gradient_accumulation_boundary(i == len(rows) - 1)
        engine.backward(engine(row, objective).loss * world)
    if stage == 0:
        out = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    else:
        out = {name: safe_get_full_grad(p).clone() for name, p in policy.model.named_parameters()}
    engine.destroy()
    return {name: g.double().numpy() for name, g in out.items()}


def main() -> None:
    """All cases, one after another."""
    join_process_group(cuda=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage, tied, budget in itertools.product((0, 2, 3), (True, False), BUDGETS):
        result = gradients(stage, tied, budget, rank, world)
        if rank == 0:
            np.savez(Path(sys.argv[1]) / f"stage{stage}_tied{int(tied)}_budget{budget}_ranks{world}.npz", **result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
