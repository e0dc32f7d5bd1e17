"""Work of test_optimizer_state.py: an engine's state, written under one ZeRO stage and read under another."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atpo_fast.train.optimizer_state import OptimizerState, StoredState
from atpo_fast.train.zero import GuardedAdamW, join_process_group

STAGES = (0, 1, 2, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Odd(nn.Module):
    """Sizes that neither 2 nor 3 ranks divide; one parameter is smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.scale = nn.Linear(5, 7), nn.Linear(7, 3), nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.narrow(torch.tanh(self.wide(inputs))) * self.scale).square().sum()


def start(stage: int, dtype: str, weights: dict[str, Tensor] | None = None) -> Any:
    torch.manual_seed(3)
    model = Odd().to(DTYPES[dtype])
    if weights is not None:
        model.load_state_dict(weights)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    optimizer = GuardedAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, number: int) -> None:
    """Take a step on inputs that are the same on every rank."""
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    engine.backward(engine(inputs.to(next(engine.module.parameters()).dtype)))
    engine.step()


def whole(engine: Any, stage: int) -> dict[str, Tensor]:
    """All weights, whole, in the model's dtype."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter) if stage == 3 else parameter
        found[name] = value.detach().to(parameter.dtype).clone()
    return found


def write_states(folder: Path) -> None:
    """Be one rank: two steps, the state on disk, and the weights before and after a third."""
    join_process_group(cuda=False)
    rank = dist.get_rank()
    for stage, dtype in itertools.product(STAGES, DTYPES):
        case = folder / f"{stage}_{dtype}"
        case.mkdir(exist_ok=True)
        engine = start(stage, dtype)
        step(engine, 1)
        step(engine, 2)
        state = OptimizerState(engine)
        save_file({n: t.contiguous().clone() for n, t in state.tensors()}, case / f"rank_{rank}.safetensors")
        before, steps = whole(engine, stage), state.steps
        step(engine, 3)
        after = whole(engine, stage)
        if rank == 0:
            save_file(before, case / "before.safetensors")
            save_file(after, case / "after.safetensors")
            (case / "steps.json").write_text(json.dumps(steps))
        engine.destroy()
    assert "torch._inductor.compile_fx" not in sys.modules, "starting ZeRO has loaded PyTorch's compiler"


def continue_states(folder: Path) -> None:
    """Be one rank of another number: read each state under each stage, and take the third step."""
    join_process_group(cuda=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    for case in sorted(folder.glob("*_*32")) + sorted(folder.glob("*_bfloat16")):
        written, dtype = case.name.split("_")
        files = sorted(case.glob("rank_*.safetensors"))
        for stage in STAGES:
            engine = start(stage, dtype, load_file(case / "before.safetensors"))
            state = OptimizerState(engine)
            state.restore(StoredState(files), json.loads((case / "steps.json").read_text()))
            out = folder / f"found_{written}_{dtype}_{stage}_{world}"
            out.mkdir(exist_ok=True)
            save_file({n: t.contiguous().clone() for n, t in state.tensors()}, out / f"rank_{rank}.safetensors")
            step(engine, 3)
            after = whole(engine, stage)
            if rank == 0:
                save_file(after, out / "after.safetensors")
            engine.destroy()
