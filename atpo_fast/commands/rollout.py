"""`atpo-fast rollout`: search trees into a file, without training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from atpo_fast.commands.launched import LaunchedVerb
from atpo_fast.commands.model_folder import model_to_use
from atpo_fast.common.errors import STOPPED

if TYPE_CHECKING:
    from atpo_fast.train.run import Run
    from atpo_fast.train.sampler import Sampler

SPLITS = ("train", "eval")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the output file and choose the questions."""
    parser.add_argument(
        "--out",
        type=_forest,
        metavar="FILE",
        help="NAME.jsonl or NAME.parquet (default: rollouts.jsonl in run_dir)",
    )
    parser.add_argument(
        "--questions", type=_count, metavar="N|all", help="the first so many; default: train.questions_per_step"
    )
    parser.add_argument(
        "--split", type=_split, choices=SPLITS, help="questions for training or for evaluation; default: train"
    )


def rollout(run: Run, arguments: argparse.Namespace) -> int:
    """Roll out the questions asked for and write their trees; returns the exit code."""
    from atpo_fast.train.forest_file import write_forest
    from atpo_fast.train.identity import TREES, claim
    from atpo_fast.train.sampler import Sampler

    split = arguments.split or "train"
    asked = run.task.eval if split == "eval" else run.task.train
    if not asked:
        raise ValueError(f"there are no {split} questions: set data.{split}_files")
    if arguments.questions != "all":
        asked = asked[: int(arguments.questions or run.config.train.questions_per_step)]
    path = Path(arguments.out) if arguments.out else run.folder / "rollouts.jsonl"
    model, _ = model_to_use(run.folder, run.config.model.path, arguments.overrides)
    record = path.with_name(f"{path.name}.run.json")
    claim(run, record, TREES, continued=path.exists(), model=Path(model))
    sampler = Sampler(run, model, run.device)
    left = write_forest(run, sampler, asked, path)
    if run.is_main and not left:
        print(f"trees of {len(asked)} questions in {path}")
    _tell_sessions(run, sampler)
    return STOPPED if left else 0


def _tell_sessions(run: Run, sampler: Sampler) -> None:
    """Print how the sessions of an environment branched; a collective."""
    mine = {name: n for name, n in sampler.counts().items() if name.startswith("session/")}
    if not mine:
        return
    count = {name.removeprefix("session/"): round(n) for name, n in run.sum_over_ranks(mine).items()}
    if run.is_main:
        print(
            f"sessions: {count['opened']} opened for {count['actions']} actions, {count['lost']} lost; forks: "
            f"{count['forks_native']} native, {count['forks_copy']} copied, {count['forks_replay']} by replay of "
            f"{count['replayed']} actions with {count['mismatches']} mismatches"
        )


def _forest(name: str) -> str:
    if Path(name).suffix not in (".jsonl", ".parquet"):
        raise argparse.ArgumentTypeError(f"{name!r} must end in .jsonl or .parquet")
    return name


def _count(text: str) -> str:
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of questions or all")
    return text


def _split(name: str) -> str:
    if name == "test":
        raise argparse.ArgumentTypeError("the split test is now called eval")
    return name


ROLLOUT = LaunchedVerb(
    name="rollout",
    summary="search trees without training: token ids, log-probs, rewards and texts, as JSON lines or Parquet",
    detail="Uses model.path where the command line gives it, else the newest checkpoint of run_dir, else the "
    "configuration's model.path, or running servers (engine.name=server). The "
    "same command continues an interrupted job: questions that the file holds are passed over. `atpo-fast report FILE` "
    "draws the trees.",
    example="atpo-fast rollout --config runs/quickstart/config.yaml --questions all --split eval --out trees.parquet",
    work=rollout,
    add_options=add_options,
)
