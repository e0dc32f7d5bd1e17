"""A GRPO batch of TRL, forwarded and back-propagated flat and with its common prompts merged: tokens and CPU seconds.

    OMP_NUM_THREADS=1 python -m bench host-batches [--prompt 512] [--completion 128] [--group 8]

Both compute the turn loss of the same rows by a model of 4 layers in float32; flat is the model's own forward on padded
rows with the loss of `TurnGRPOTrainer`, merged is `from_trajectories(trl_batch(inputs), ...)` and this project's
policy. They take turns, so that both see the same load of the machine. Checked first: their gradients agree to 1e-4 of
the largest entry. Writes bench/results/cpu/host_batches.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, from_trajectories
from atpo_fast.packing import PackedTrees
from atpo_fast.packing.flat import trl_batch
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_kernels import turn_policy_loss
from bench.core.records import RESULTS, device_name, write_record

VOCAB, ROUNDS = 4096, 3


def make_model() -> Any:
    """Make the model, the same each time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 768, "head_dim": 32}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).float().train()


def make_batch(prompt: int, completion: int, group: int) -> dict[str, Tensor]:
    """Draw two prompts with a group of completions each, whose second quarter is a tool result."""
    rng = torch.Generator().manual_seed(0)
    rows = 2 * group
    tool_mask = torch.ones(rows, completion, dtype=torch.long)
    tool_mask[:, completion // 4 : completion // 2] = 0
    return {
        "prompt_ids": torch.randint(VOCAB, (2, prompt), generator=rng).repeat_interleave(group, 0),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(VOCAB, (rows, completion), generator=rng),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "tool_mask": tool_mask,
        "advantages": torch.randn(rows, generator=rng),
        "old_per_token_logps": torch.full((rows, completion), -8.3),
    }


def flat_step(model: Any, inputs: dict[str, Tensor]) -> None:
    """Forward and back-propagate all rows."""
    length = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    logits = model(input_ids=ids, logits_to_keep=length + 1).logits[:, :-1]
    logprob = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    old, advantages = inputs["old_per_token_logps"], inputs["advantages"]
    turn_policy_loss(logprob, old, advantages, mask=inputs["tool_mask"], max_log_ratio=1.0).loss.backward()


def measure(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Take the least CPU time of each step in seconds, over a few rounds."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.process_time()
            step()
            found[name].append(time.process_time() - start)
    return {name: round(min(seconds), 3) for name, seconds in found.items()}


def check(merged: torch.nn.Module, flat: torch.nn.Module) -> None:
    """Compare the gradients of two equal models, and forget them."""
    for ours, theirs in zip(merged.parameters(), flat.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * float(theirs.grad.abs().max()))
        ours.grad = theirs.grad = None


def main(arguments: list[str] | None = None) -> None:
    """Measure both, write the record and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench host-batches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    inputs = make_batch(given.prompt, given.completion, given.group)
    objective = Objective.preset("at2po", max_log_ratio=1.0)
    model, policy = make_model(), Policy(make_model()).train()
    rows: list[PackedTrees] = []

    def merged_step() -> None:
        rows[:] = from_trajectories(trl_batch(inputs), objective, 1 << 20, prune=False)
        accumulate_gradients(policy, rows, objective)

    steps = {"flat": lambda: flat_step(model, inputs), "merged": merged_step}
    for step in steps.values():
        step()
    check(policy, model)
    tokens = {"flat": inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()}
    tokens["merged"] = sum(len(row.input_ids) for row in rows)
    sizes = {"prompt": given.prompt, "completion": given.completion, "group": given.group, "prompts": 2}
    record = {**sizes, "tokens": tokens, "cpu_seconds": measure(steps), "threads": 1}
    write_record("host_batches", "host_batches", "cpu", given.results, device=device_name("cpu"), **record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
