"""Work of test_lora_ranks.py: gradients and weights of a policy with adapters, under DeepSpeed on several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, pack_trees
from atpo_fast.adapters import AdapterSettings, add_adapters
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.config import OptimConfig
from atpo_fast.packing import depth_first, spread_rows
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.step import accumulate
from atpo_fast.train.weights import whole_parameters
from atpo_fast.train.zero import join_process_group, make_optimizer
from tests.helpers.adapters import wake_adapters
from tests.helpers.distributed_gradients import ROWS, VOCAB, forest
from tests.helpers.other_trainer import start_engine, whole_gradients
from tests.helpers.policies import SIZES

Case = tuple[int, str, GradientCheckpointing]
CASES: list[Case] = [
    (0, "4096", "none"),
    (2, "40", "none"),
    (3, "deep", "none"),
    (3, "deep", "layer"),
    (3, "40", "mlp"),
]
"""ZeRO stage, rows (`ROWS`) and checkpointing."""


def adapted_policy(choice: GradientCheckpointing = "none") -> Policy:
    """The same float32 policy on every rank."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": VOCAB}, head_dim=8, tie_word_embeddings=True))
    add_adapters(model, AdapterSettings(rank=3, alpha=7.0), seed=2)
    wake_adapters(model)
    return Policy(model, gradient_checkpointing=choice).train()


def results(case: Case, rank: int, world: int) -> dict[str, np.ndarray]:
    """Whole gradients of a mini-batch, the weights that an engine gets, and the size of the optimizer's state."""
    stage, budget, choice = case
    policy = adapted_policy(choice)
    optimizer = make_optimizer(policy, OptimConfig(lr=1e-3), offload=False)
    engine = start_engine(policy, optimizer, stage)  # type: ignore[arg-type]  # a mix-in of one
    objective = Objective.preset("at2po", clip_low=10.0, clip_high=10.0)
    max_tokens, max_prefix = ROWS[budget]
    spread = spread_rows(pack_trees(forest(), objective, max_tokens, max_prefix=max_prefix), world)
    passes = plan_passes(spread)[rank]
    accumulate(engine, spread[rank], passes, lambda row, prefix: engine(row, objective, prefix).loss, PhaseTimer())
    out = {f"weight {name}": tensor.double().numpy().copy() for name, tensor in whole_parameters(policy, 4000)}
    out |= {f"gradient {name}": gradient for name, gradient in whole_gradients(policy.model, stage).items()}
    engine.step()
    state = [value for moments in optimizer.state.values() for value in moments.values() if value.numel() > 1]  # type: ignore[attr-defined]
    out["state"] = np.array(sum(value.numel() for value in state))
    engine.destroy()
    return out


def write_results(folder: Path) -> None:
    """Be one rank; rank 0 writes a .npz for each case."""
    depth_first.ROW_TOKENS = 0  # or trees as small as these would rather repeat their ancestors
    join_process_group(cuda=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    for case in CASES:
        found = results(case, rank, world)
        if rank == 0:
            np.savez(folder / f"{'_'.join(map(str, case))}_{world}.npz", **found)  # type: ignore[arg-type]
    dist.barrier()
    dist.destroy_process_group()
