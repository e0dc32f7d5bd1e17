"""The update of small models with recurrent layers, over packed trees and over the same trajectories written out.

    OMP_NUM_THREADS=1 python -m bench hybrid [--families qwen3_5,lfm2] [--overlaps 0.36,0.8]

    tree   packed trees: a state is computed once for all that continue it
    flat   the same functions over rows of whole trajectories
    loop   padded batches of the trajectories through Hugging Face's own model, with plain logits

All compute the loss and the gradients of one forest, in float32, and take turns. The bound is the number of tokens of
the trajectories over that of the trees. It is one for linear layers; a recurrence also pays for the padding of its
levels, and attention pairs shrink by another factor. `qwen3` is the same model with attention in every layer, for
comparison. With one thread, times are those of the process, which other processes do not change much. Writes the record
`hybrid_update`.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atpo_fast.policy import Policy
from atpo_fast.recurrent.segments import Segments
from atpo_fast.tree import overlap
from bench.core.measure import Calls, clock, interleaved, quantiles
from bench.core.records import device_name, environment, write_record
from bench.packing.forests import forest_of_overlap
from bench.packing.rows import flat_rows, pad, tree_rows
from bench.systems.real_model import packed_gradients, padded_gradients

VOCABULARY = 2048
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
STATES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "lfm2": {
        "model_type": "lfm2",
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "granite": {
        "model_type": "granitemoehybrid",
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 32,
        "num_local_experts": 0,
        "shared_intermediate_size": 768,
    },
}


def make_model(family: str) -> PreTrainedModel:
    """Make a random float32 model of a family."""
    torch.manual_seed(0)
    fields = dict(STATES[family])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **SIZES, **fields))


def measure(family: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """Time one forest's update in every layout."""
    model = make_model(family)
    forest = forest_of_overlap(share, options.trees, options.scale, VOCABULARY)
    trees, flat = tree_rows(forest, options.row), flat_rows(forest, options.row)
    plain, policy = copy.deepcopy(model).train(), Policy(model).train()
    padded = [(row, pad(row)) for row in flat_rows(forest, options.padded)]
    calls: Calls = {
        "tree": partial(packed_gradients, policy, trees),
        "flat": partial(packed_gradients, policy, flat),
        "loop": partial(padded_gradients, plain, padded),
    }
    losses = {name: float(call()) for name, call in calls.items()}
    samples, failed = interleaved(calls, "cpu", 0.0, least=options.repeats, most=options.repeats, warm=0)
    tokens = {"unique": sum(tree.unique_tokens for tree in forest), "flat": sum(tree.flat_tokens for tree in forest)}
    segments = [Segments.of_trees(row.subtree_end, policy.device) for row in trees]
    return {
        "overlap": overlap(forest),
        "tokens": tokens | {"padded": sum(len(each.padded) for each in segments)},
        "levels": max(len(each.levels) for each in segments),
        "bound": tokens["flat"] / tokens["unique"],
        "loss": losses,
        "ms": {name: quantiles(taken) for name, taken in samples.items() if taken},
        "failed": failed,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: measure, print, write the record."""
    options = _parser().parse_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    for family in options.families:
        results[family] = {}
        for share in options.overlaps:
            entry = results[family][str(share)] = measure(family, share, options)
            print(f"{family:8} {_line(entry)}", flush=True)
    about = {"device": device_name("cpu"), "environment": environment(), "clock": clock("cpu"), "sizes": SIZES}
    shape = {"trees": options.trees, "scale": options.scale, "row": options.row, "padded": options.padded}
    write_record("hybrid_update", "hybrid_update", "cpu", options.results, **about, **shape, results=results)


def _line(entry: dict[str, Any]) -> str:
    """Say what one forest took."""
    took = {name: each["p50"] for name, each in entry["ms"].items()}
    times = ", ".join(f"{took[name] / took['tree']:.2f}x {name}" for name in ("flat", "loop") if name in took)
    return f"overlap {entry['overlap']:.2f}: tree {took['tree'] / 1000:.2f} s, {times} (bound {entry['bound']:.2f}x)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench hybrid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=tuple(STATES), type=lambda text: tuple(text.split(",")))
    parser.add_argument("--overlaps", default=(0.36, 0.8), type=lambda text: tuple(map(float, text.split(","))))
    parser.add_argument("--trees", type=int, default=1)
    parser.add_argument("--scale", type=float, default=16.0, help="by which the published lengths are divided")
    parser.add_argument("--row", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--padded", type=int, default=1024, help="tokens of a padded batch")
    parser.add_argument("--repeats", type=int, default=3, help="samples of each call")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", help="folder of records")
    return parser
