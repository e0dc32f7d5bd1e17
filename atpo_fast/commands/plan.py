"""`atpo-fast plan`: what a training takes, by component, and what to change where it does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path

from atpo_fast.commands.verb import Verb
from atpo_fast.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config, --memory, --ranks, --like and overrides."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory of one device, such as 80G: plan for GPUs of this size"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks; default: what the configuration says")
    parser.add_argument(
        "--like", type=Path, metavar="RUN", help="folder of an earlier run on such devices, whose steps tell the time"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides by dotted name, as for `train`")


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; returns 0. Whether the run fits is part of what is printed."""
    config = load_config(arguments.config, arguments.overrides)
    from atpo_fast.train.plan import parse_memory, plan_lines

    memory = None if arguments.memory is None else parse_memory(arguments.memory)
    ranks = arguments.ranks or config.ranks or 1
    print(*plan_lines(config, ranks=ranks, memory=memory, like=arguments.like), sep="\n")
    return 0


PLAN = Verb(
    name="plan",
    summary="say what a training takes: memory by component, tokens of a row, time of a step",
    detail="Nothing is loaded or started. With --memory it says whether a rank fits a device, and what to change.",
    example="atpo-fast plan --config configs/qwen3_4b_multihop.yaml --memory 80G --ranks 8",
    run=plan,
    add_arguments=add_arguments,
)
