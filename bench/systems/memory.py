"""`python -m bench memory`: the memory that `atpo-fast plan` tells beside what PyTorch's allocator held, on a CPU.

Each case makes a policy, hands it to DeepSpeed and takes two optimizer steps over two rows, on one rank and on two.
Everything is allocated while the profiler looks, so the peak is exact. On two ranks it is the same in every run only on
a quiet machine: what waits for the other rank stays allocated meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.commands.launcher import free_port
from atpo_fast.config import Config, load_config
from atpo_fast.policy import Policy
from atpo_fast.policy.opened_rows.plan import plan_passes
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.plan import ModelSize, model_size, plan_memory
from atpo_fast.train.plan.memory import HEAD, LAYERS, STEP
from bench.core.measure import peak_bytes
from bench.core.records import write_record

_BUCKET = 2_000_000  # elements of DeepSpeed's buffers: more than any weight has, fewer than the model
_SIZES = {"hidden_size": 256, "intermediate_size": 768, "layers": 2, "heads": 8, "kv_heads": 4, "vocab_size": 4096}
BOUND = 0.15


@dataclass(frozen=True, slots=True)
class Case:
    """A way to train: stage of ZeRO, dtype, what the backward computes again, tokens of a row."""

    stage: int
    dtype: str
    checkpointing: str
    row_tokens: int = 512


CASES = [
    *(Case(stage, *how) for stage in range(4) for how in (("float32", "none"), ("bfloat16", "layer"))),
    Case(3, "float32", "mlp"),
]


def configuration(case: Case, folder: Path, **sizes: int) -> Config:
    """Return the configuration of a case, with a DeepSpeed file in `folder`."""
    deepspeed = json.loads(Path(f"configs/deepspeed/zero{case.stage}.json").read_text())
    zero = deepspeed["zero_optimization"]
    zero |= {name: _BUCKET for name in zero if name.endswith("bucket_size")}
    path = folder / f"zero{case.stage}.json"
    path.write_text(json.dumps(deepspeed))
    given = {
        "deepspeed": str(path),
        "device": "cpu",
        "engine.name": "server",
        "engine.urls": "[http://127.0.0.1:1]",  # no engine in this process
        "model.dtype": case.dtype,
        "model.gradient_checkpointing": case.checkpointing,
        "train.row_tokens": str(case.row_tokens),
        "train.prefix_memory_gb": "0",
        "data.max_prompt_tokens": "16",
        "rollout.max_response_tokens": "16",
    }
    given |= {f"model.{name}": str(number) for name, number in (_SIZES | sizes).items()}
    return load_config(None, [f"{name}={value}" for name, value in given.items()])


def planned(config: Config, size: ModelSize, ranks: int) -> dict[str, float]:
    """Return the planned bytes of the phases of an update."""
    plan = plan_memory(config, size, ranks=ranks, dtype=config.model.dtype, on_gpu=False)
    return {phase: plan.during(phase) for phase in (HEAD, LAYERS, STEP)}


def measured(config: Config) -> int:
    """Return the most bytes that two optimizer steps allocate, on this rank of the process group."""
    rows = _rows(config)
    return peak_bytes(lambda: _train(config, rows), "cpu")[1]


def _rows(config: Config) -> list[Any]:
    """Pack two trees whose unique tokens fill a row each."""
    rng, tokens, words = np.random.default_rng(0), config.train.row_tokens // 8, config.model.vocab_size
    trees = []
    for _ in range(2):
        tree = TurnTree(rng.integers(0, words, 2 * tokens))
        first = tree.add_turn(0, rng.integers(0, words, tokens), -rng.random(tokens), rng.integers(0, words, tokens))
        for reward in (0.0, 1.0):
            leaf = tree.add_turn(first, rng.integers(0, words, 2 * tokens), -rng.random(2 * tokens))
            tree.set_reward(leaf, reward)
        trees.append(tree)
    assign_credit(trees)
    rows = pack_trees(trees, max_tokens=config.train.row_tokens, objective=Objective.preset("at2po"))
    return [replace(row, old_logprob=row.rollout_logprob) for row in rows]


def _train(config: Config, rows: list[Any]) -> None:
    from atpo_fast.train.from_config import build_model
    from atpo_fast.train.step import accumulate, apply_gradients
    from atpo_fast.train.zero import initialize

    objective, timer = Objective.preset("at2po"), PhaseTimer()
    model = build_model(config.model, _Words(config.model.vocab_size), 0)  # type: ignore[arg-type]
    policy = Policy(model, gradient_checkpointing=config.model.gradient_checkpointing)
    zero, watch = initialize(policy, config, config.optim)
    passes = plan_passes([rows])[0]
    for _ in range(2):
        accumulate(zero, rows, passes, lambda row, prefix: zero(row, objective, prefix).loss, timer)
        apply_gradients(zero, watch, timer)


@dataclass(frozen=True, slots=True)
class _Words:
    """As much of a tokenizer as a random model needs: how many words there are."""

    size: int
    eos_token_id: int = 0
    pad_token_id: int = 0

    def __len__(self) -> int:
        return self.size


def _rank(rank: int, ranks: int, port: int, output: str) -> None:
    """Measure every case as one rank of a group; rank 0 writes what it found."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from atpo_fast.train.zero import join_process_group

    torch.set_num_threads(1)
    join_process_group(cuda=False)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            config = configuration(case, Path(folder))
            plan, peak = planned(config, model_size(config), ranks), measured(config)
            ratio = max(plan.values()) / peak
            found.append(asdict(case) | {"ranks": ranks, "planned": plan, "measured": peak, "ratio": ratio})
            if rank == 0:
                print(
                    f"{ranks} ranks, {case}: planned {max(plan.values()):,.0f}, held {peak:,}: {ratio:.3f}", flush=True
                )
    if rank == 0:
        Path(output).write_text(json.dumps(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases and write the record; fails where plan and peak differ by more than the bound."""
    argparse.ArgumentParser(prog="python -m bench memory", description=__doc__).parse_args(arguments)
    found: list[dict[str, Any]] = []
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "found.json"
            torch.multiprocessing.spawn(_rank, (ranks, free_port(), str(output)), nprocs=ranks)
            found += json.loads(output.read_text())
    farthest = max(found, key=lambda case: abs(case["ratio"] - 1))
    write_record(
        "memory_plan", "memory_plan", "cpu", model=_SIZES, bound=BOUND, cases=found, farthest=farthest["ratio"]
    )
    if abs(farthest["ratio"] - 1) > BOUND:
        raise SystemExit(f"planned / measured is {farthest['ratio']:.3f} in {farthest}")


if __name__ == "__main__":
    main()
