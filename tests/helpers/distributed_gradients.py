"""Work of test_distributed.py: the gradient of one mini-batch under DeepSpeed, for several stages and row budgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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

ROWS = {"4096": (4096, 0), "40": (40, 0), "deep": (14, 500), "cut": (20, 500)}
"""Tokens of a row and of its prefix: everything in one row; many rows, trees cut; trees cut depth-first, so that rows
continue rows that continue others; the same in rows that continue one other."""

DEPTH = {"4096": 0, "40": 0, "deep": 2, "cut": 1}
"""How many rows lie above a row, at most."""

WITH_STATES = ("qwen3_5", "lfm2", "granitemoehybrid")
"""A family for each kind of state."""

ALONE = "stage0"
"""End of the names of the cases with which others are compared, and which one rank computes."""

FIVE = (3, 1, 2, 1, 1)
"""Branches of the trees that are compared over stages, rows and numbers of ranks."""

UNLIKE = (3, 1)
"""Branches of the trees of a family: two ranks have one each, and the second has nothing to do when the first has.
Rows of every family that lie deeper than one are tested by one process: tests/policy/test_families.py."""

CHECKPOINTED: tuple[GradientCheckpointing, ...] = ("layer", "mlp")

FILTERED = {"4096": (3,), "40": (2, 3), "deep": (3,)}
"""Numbers of ranks on which four questions of five are filtered, by rows."""

Compute = Callable[[int, int], dict[str, np.ndarray]]
"""From rank and number of ranks to the whole gradients of a case."""


def forest(unequal: int = 5, branches: Sequence[int] = FIVE) -> list[TurnTree]:
    """Trees with branches, an empty observation and unequal rewards, or only so many with unequal ones.

    Trees whose leaves all earn the same are filtered: they have no gradient.
    """
    rng = np.random.default_rng(0)
    trees = []
    for t, count in enumerate(branches):
        tree = TurnTree(rng.integers(0, VOCAB, 9), question_id=f"q{t}")
        for c in range(count):
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
    return model_gradients(Qwen3ForCausalLM(config), stage, budget, choice, rank, world, forest(unequal))


def model_gradients(
    model: PreTrainedModel,
    stage: int,
    budget: str,
    choice: GradientCheckpointing,
    rank: int,
    world: int,
    trees: list[TurnTree],
    balance: float = 0.0,
) -> dict[str, np.ndarray]:
    """Whole gradients of one mini-batch of some trees after the last backward, and the loss of weighted routers."""
    policy = Policy(model, gradient_checkpointing=choice, router_balance=balance).train()
    optimizer = GuardedAdamW(policy.parameters(), lr=0.0)
    GradientWatch(policy, optimizer)
    engine = start_engine(policy, optimizer, stage)
    objective = Objective.preset("at2po", clip_low=10.0, clip_high=10.0)
    max_tokens, max_prefix = ROWS[budget]
    rows = pack_trees(trees, objective, max_tokens, max_prefix=max_prefix)
    assert max(row.depth for row in rows) == DEPTH[budget]
    spread = spread_rows(rows, world)
    passes = plan_passes(spread)[rank]
    accumulate(engine, spread[rank], passes, lambda row, prefix: engine(row, objective, prefix).loss, PhaseTimer())
    assert (policy.skipped_tokens > 0) == (choice != "none" and bool(spread[rank]))
    out = whole_gradients(policy.model, stage)
    if policy.router_loss is not None:
        out["router_loss"] = reduce_over_ranks(policy.router_loss.total.clone()).numpy()
    engine.destroy()
    return out


def write_gradients(folder: Path) -> None:
    """Be one rank; rank 0 writes a .npz for each case, with every parameter's whole gradient under its name."""
    depth_first.ROW_TOKENS = 0  # or trees as small as these would rather repeat their ancestors
    join_process_group(cuda=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    for name, ranks, compute in cases():
        if world in ranks:
            result = compute(rank, world)
            if rank == 0:
                np.savez(folder / f"{name}_ranks{world}.npz", **result)  # type: ignore[arg-type]  # numpy's flags are none of them
    dist.barrier()
    dist.destroy_process_group()


def cases() -> Iterator[tuple[str, tuple[int, ...], Compute]]:
    """Yield the name of each case, the numbers of ranks on which it runs, and what computes its gradients as one."""
    plain: dict[tuple[int, bool, str, GradientCheckpointing], tuple[int, ...]]
    plain = {
        (stage, True, budget, "none"): (2, 3) if stage == 3 else (2,) for stage in (0, 2, 3) for budget in FILTERED
    }
    plain |= {(0, True, "4096", "none"): (1, 2), (2, True, "40", "none"): (1, 2), (3, True, "deep", "none"): (1, 2, 3)}
    plain |= {(0, False, "4096", "none"): (1,), (2, False, "40", "none"): (2,), (3, False, "deep", "none"): (2,)}
    for choice in CHECKPOINTED:
        plain |= {(3, True, "40", choice): (2,), (3, False, "deep", choice): (1, 3)}
    for (stage, tied, budget, choice), ranks in plain.items():
        yield (
            f"stage{stage}_tied{int(tied)}_budget{budget}_{choice}",
            ranks,
            partial(gradients, stage, tied, budget, choice),
        )
    filtered: list[tuple[int, str, GradientCheckpointing, tuple[int, ...]]]
    filtered = [(0, "4096", "none", (1,)), *((3, budget, "layer", FILTERED[budget]) for budget in FILTERED)]
    for stage, budget, choice, ranks in filtered:
        yield (
            f"filtered_stage{stage}_budget{budget}_{choice}",
            ranks,
            partial(gradients, stage, True, budget, choice, unequal=1),
        )
    for family, about in FAMILIES.items():
        yield f"{family}_{ALONE}", (1,), partial(exact, family, 0, "4096", "none")
        yield f"{family}_stage3_cut", (2,), partial(exact, family, 3, "cut", about.checkpointing[0])
    for family in WITH_STATES:
        yield f"{family}_stage3", (2,), partial(exact, family, 3, "4096", "none")
    yield f"routers_{ALONE}", (1,), partial(exact, "qwen3-moe", 0, "cut", "none", balance=0.3)
    yield "routers_stage3", (1, 2), partial(exact, "qwen3-moe", 3, "cut", "none", balance=0.3)
    for stage, tied, inside in itertools.product((0, 3), (True, False), (True, False)):
        yield (
            f"module_stage{stage}_tied{int(tied)}_inside{int(inside)}",
            (1, 2) if stage == 0 and inside else (2,),
            partial(module_gradients, stage, tied, inside),
        )


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
        return model_gradients(make(family), stage, budget, choice, rank, world, forest(branches=UNLIKE), balance)
