"""Work of test_distributed.py: the gradient of one mini-batch under DeepSpeed, for several stages and row budgets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.packing import depth_first, spread_rows
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.step import accumulate
from atpo_fast.train.zero import GradientWatch, GuardedAdamW, join_process_group
from tests.helpers.families import FAMILIES, VOCAB, make
from tests.helpers.hybrid_models import in_float64
from tests.helpers.other_trainer import module_gradients, start_engine, whole_gradients

ROWS = {"4096": (4096, 0), "40": (40, 0), "deep": (14, 500)}
"""Tokens of a row and of its prefix: everything in one row; many rows, trees cut; trees cut depth-first."""

WITH_STATES = ("qwen3_5", "lfm2", "granitemoehybrid")
"""A family for each kind of state."""


ALONE = "stage0"
"""End of the names of the cases with which others are compared, and which one rank computes."""

Compute = Callable[[int, int], dict[str, np.ndarray]]
"""From rank and number of ranks to the whole gradients of a case."""


def forest(unequal: int = 5) -> list[TurnTree]:
    """Five trees with branches, an empty observation and unequal rewards, or only so many with unequal ones.

    Trees whose leaves all earn the same are filtered: they have no gradient.
    """
    rng = np.random.default_rng(0)
    trees = []
    for t in range(5):
        tree = TurnTree(rng.integers(0, VOCAB, 9), question_id=f"q{t}")
        for c in range(3):
            inner = tree.add_turn(0, rng.integers(0, VOCAB, 4 + c), -rng.random(4 + c), rng.integers(0, VOCAB, c * 3))
            for leaf in range(2):
                n = tree.add_turn(inner, rng.integers(0, VOCAB, 3 + leaf), -rng.random(3 + leaf))
                tree.set_reward(n, float(rng.integers(0, 2)) if t < unequal else 1.0)
        trees.append(tree)
    assign_credit(trees, method="at2po")
    return trees


def gradients(
    stage: int, tied: bool, budget: str, choice: GradientCheckpointing, rank: int, world: int, unequal: int = 5
) -> dict[str, np.ndarray]:
    """Whole gradients of one mini-batch of a Qwen3 model, with so many trees of unequal rewards."""
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
    return model_gradients(Qwen3ForCausalLM(config), stage, budget, choice, rank, world, unequal)


def model_gradients(
    model: PreTrainedModel,
    stage: int,
    budget: str,
    choice: GradientCheckpointing,
    rank: int,
    world: int,
    unequal: int = 5,
    balance: float = 0.0,
) -> dict[str, np.ndarray]:
    """Whole gradients of one mini-batch after the last backward, and the loss of its routers if that has a weight."""
    policy = Policy(model, gradient_checkpointing=choice, router_balance=balance).train()
    optimizer = GuardedAdamW(policy.parameters(), lr=0.0)
    GradientWatch(policy, optimizer)
    engine = start_engine(policy, optimizer, stage)
    objective = Objective.preset("at2po", clip_low=10.0, clip_high=10.0)
    max_tokens, max_prefix = ROWS[budget]
    rows = pack_trees(forest(unequal), objective, max_tokens, max_prefix=max_prefix)
    assert (max(row.depth for row in rows) > 0) == (budget == "deep")
    spread = spread_rows(rows, world)
    passes = plan_passes(spread)[rank]
    accumulate(engine, spread[rank], passes, lambda row, prefix: engine(row, objective, prefix).loss, PhaseTimer())
    assert (policy.skipped_tokens > 0) == (choice != "none" and bool(spread[rank]))
    out = whole_gradients(policy.model, stage)
    if policy.router_loss is not None:
        out["router_loss"] = reduce_over_ranks(policy.router_loss.total.clone()).numpy()
    engine.destroy()
    return out


def write_gradients(folder: Path, only: str = ".*") -> None:
    """Be one rank; rank 0 writes a .npz for each case, with every parameter's whole gradient under its name.

    `only` is a pattern of the names of the cases that are wanted.
    """
    depth_first.ROW_TOKENS = 0  # or trees as small as these would rather repeat their ancestors
    join_process_group(cuda=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, compute in cases():
        if re.fullmatch(only, name):
            result = compute(rank, world)
            if rank == 0:
                np.savez(folder / f"{name}_ranks{world}.npz", **result)  # type: ignore[arg-type]  # numpy's flags are none of them
    dist.barrier()
    dist.destroy_process_group()


def cases() -> Iterator[tuple[str, Compute]]:
    """Yield the name of each case, and what computes its gradients as one of some ranks."""
    plain: list[tuple[int, bool, str, GradientCheckpointing]]
    plain = [(stage, tied, budget, "none") for stage in (0, 2, 3) for tied in (True, False) for budget in ROWS]
    plain += [(3, tied, "40" if tied else "deep", choice) for tied in (True, False) for choice in ("layer", "mlp")]
    for stage, tied, budget, choice in plain:
        yield f"stage{stage}_tied{int(tied)}_budget{budget}_{choice}", partial(gradients, stage, tied, budget, choice)
    filtered: list[tuple[int, str, GradientCheckpointing]]
    filtered = [(0, "4096", "none"), *((3, budget, "layer") for budget in ROWS)]
    for stage, budget, choice in filtered:
        yield (
            f"filtered_stage{stage}_budget{budget}_{choice}",
            partial(gradients, stage, True, budget, choice, unequal=1),
        )
    for family, about in FAMILIES.items():
        yield f"{family}_{ALONE}", partial(exact, family, 0, "4096", "none")
        yield f"{family}_stage3_deep", partial(exact, family, 3, "deep", about.checkpointing[0])
    for family in WITH_STATES:
        yield f"{family}_stage3", partial(exact, family, 3, "4096", "none")
    for name, stage in ((f"routers_{ALONE}", 0), ("routers_stage3", 3)):
        yield name, partial(exact, "qwen3-moe", stage, "deep", "none", balance=0.3)
    for stage, tied, inside in itertools.product((0, 3), (True, False), (True, False)):
        yield f"module_stage{stage}_tied{int(tied)}_inside{int(inside)}", partial(module_gradients, stage, tied, inside)


def exact(
    family: str,
    stage: int,
    budget: str,
    choice: GradientCheckpointing,
    rank: int,
    world: int,
    balance: float = 0.0,
) -> dict[str, np.ndarray]:
    """Whole gradients of one mini-batch of a model of some family, in float64."""
    with in_float64():
        return model_gradients(make(family), stage, budget, choice, rank, world, balance=balance)
