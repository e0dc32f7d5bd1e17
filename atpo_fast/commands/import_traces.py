"""`atpo-fast import`: rollouts that other programs recorded, as search trees."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_fast.commands.verb import Verb

if TYPE_CHECKING:
    from atpo_fast.tree.traces import Episode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("traces", metavar="TRACES", help="JSON lines of verifiers or of OpenEnv")
    parser.add_argument("--out", required=True, metavar="FILE", help="NAME.jsonl or NAME.parquet, which must not exist")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or name of the model that sampled: texts for people and the report"
    )


def import_traces(arguments: argparse.Namespace) -> int:
    """Write the trees and say what they are; returns the exit code."""
    from atpo_fast.common.jsonl import iterate_records
    from atpo_fast.data.tokenizers import load_tokenizer
    from atpo_fast.tree.storage import append_forest
    from atpo_fast.tree.traces import grow_trees

    source, out = Path(arguments.traces), Path(arguments.out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--out {out}: must end in .jsonl or .parquet")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; name the JSON lines that verifiers or OpenEnv recorded")
    if out.exists():
        raise ValueError(f"--out {out}: is there already; choose another name")
    read = [_episode(record, source, number) for number, record in enumerate(iterate_records(source), 1)]
    episodes = [episode for episode in read if episode is not None]
    if not episodes:
        raise ValueError(f"{source}: none of its {len(read)} records has a reward and tokens to learn from")
    trees = grow_trees(episodes)
    append_forest(out, trees, load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None)
    questions = len({tree.question_id for tree in trees})
    print(
        f"{len(trees)} trees of {questions} questions, with {sum(len(tree.leaves) for tree in trees)} trajectories, "
        f"from {len(episodes)} rollouts in {out}; {len(read) - len(episodes)} without a reward were left out"
    )
    return 0


def _episode(record: dict[str, Any], source: Path, number: int) -> Episode | None:
    from atpo_fast.tree.traces import read_openenv, read_verifiers

    try:
        return read_verifiers(record) if "nodes" in record else read_openenv(record, f"record {number}")
    except (KeyError, TypeError, IndexError) as error:
        where = f"{source}: record {number}"
        raise ValueError(f"{where}: neither a trace of verifiers nor of OpenEnv ({error!r})") from error


IMPORT = Verb(
    name="import",
    summary="search trees from rollouts that verifiers or OpenEnv recorded",
    detail="Reads verifiers' traces.jsonl, and training traces of OpenEnv's harness. The trees are those of `atpo-fast "
    "rollout`: `atpo-fast report FILE` draws them, and they are packed and trained on like others.",
    example="atpo-fast import traces.jsonl --tokenizer Qwen/Qwen3-0.6B --out trees.parquet",
    run=import_traces,
    add_arguments=add_arguments,
)
