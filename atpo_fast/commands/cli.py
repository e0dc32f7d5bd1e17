"""The command line: `atpo-fast VERB`. Thin: it checks the configuration and starts what does the work."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from atpo_fast.commands.retriever import add_arguments, run_retriever
from atpo_fast.config.arithmetic import batch_arithmetic
from atpo_fast.config.load import ConfigError, dump_config, load_config, read_deepspeed

BAD_INPUT = 2

LAUNCHED = {
    "train": (
        "cold start where the task has demonstrations, RL, evaluation, summary and report",
        "Writes the run folder (run_dir): config.yaml, metrics.jsonl, trees.jsonl, eval/, checkpoints/, summary.json, "
        "report.html. Started again with the same run_dir it continues from the newest checkpoint.",
        "atpo-fast train --config configs/quickstart.yaml run_dir=runs/mine train.steps=10",
    ),
    "sft": (
        "the cold start alone: supervised training on demonstrations, loss on action tokens only",
        "Writes a Hugging Face folder into the run folder and evaluates it.",
        "atpo-fast sft --config configs/quickstart.yaml sft.steps=100",
    ),
    "eval": (
        "greedy answers to the test questions: EM, F1, format rate, turns, tool calls",
        "Evaluates model.path, or else the newest checkpoint of run_dir; prints the means as JSON.",
        "atpo-fast eval --config runs/quickstart/config.yaml data.max_eval_questions=50",
    ),
    "rollout": (
        "search trees without training: token ids, log-probs, rewards and texts, as JSON lines or Parquet",
        "Uses model.path, or else the newest checkpoint of run_dir, or running servers (rollout.engine=server). The "
        "same command continues an interrupted job: questions that the file holds are passed over. `atpo-fast report "
        "FILE` draws the trees.",
        "atpo-fast rollout --config runs/quickstart/config.yaml --questions all --split test --out trees.parquet",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for a failure, 2 for bad input, 128 + a signal that stopped it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = getattr(arguments, "overrides", None)
    if (overrides is None and rest) or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if overrides is not None:  # those that stood behind an option
        overrides.extend(rest)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (ConfigError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


# --- verbs -------------------------------------------------------------------------------------------------------


def _launch(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(dump_config(config), batch_arithmetic(config), sep="\n")
        return 0
    read_deepspeed(config)
    from atpo_fast.commands.launcher import launch, place

    return launch(arguments.verb, arguments.config, arguments.overrides, place(config), _options(arguments))


def _options(arguments: argparse.Namespace) -> list[str]:
    """The verb's own options, for the launched processes."""
    given = {name: getattr(arguments, name, None) for name in ("out", "questions", "split")}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _report(arguments: argparse.Namespace) -> int:
    if not Path(arguments.source).exists():
        raise FileNotFoundError(f"{arguments.source}: no run folder and no file of search trees")
    from atpo_fast.report import build_report

    print(build_report(Path(arguments.source)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    source, target = _model_folder(Path(arguments.checkpoint)), Path(arguments.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder; choose another or remove it")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    print(f"{source} copied to {target}")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from atpo_fast.commands.doctor import environment_report

    text, problems = environment_report()
    print(text)
    return 1 if problems else 0


def _model_folder(folder: Path) -> Path:
    """The Hugging Face folder of a checkpoint, of a run folder's newest checkpoint, or `folder` if it is one itself."""
    newest = sorted(folder.glob("checkpoints/step_*/hf"))[-1:]
    for candidate in (folder / "hf", *newest, folder / "cold_start", folder):
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors")):
            return candidate
    raise FileNotFoundError(f"{folder}: neither a checkpoint nor a run folder with one (no safetensors found)")


# --- arguments ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atpo-fast",
        description="Tree-search reinforcement learning of language-model agents (AT2PO).",
        epilog="`atpo-fast VERB --help` says more and gives an example.",
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for verb in LAUNCHED:
        _add_launched(verbs, verb)
    report = _add(
        verbs,
        "report",
        "the HTML report of a run, or of a file of search trees",
        "One self-contained file.",
        "atpo-fast report runs/quickstart",
    )
    report.add_argument("source", metavar="RUN", help="run folder, or a file that `atpo-fast rollout` wrote")
    report.set_defaults(run=_report)
    retriever = _add(
        verbs,
        "retriever",
        "a search server over a corpus: POST /retrieve, as published with AT2PO and Search-R1",
        "Builds the index first (BM25, or dense vectors in FAISS), or goes on with one that was interrupted; an index "
        "that is there is used again. Point tools.search_url at the printed address, or tools.index_dir at the index.",
        "atpo-fast retriever --corpus wiki-18.jsonl --index bm25 --index-dir indexes/wiki18 --port 8000",
    )
    add_arguments(retriever)
    retriever.set_defaults(run=run_retriever)
    export = _add(
        verbs,
        "export",
        "copy a checkpoint's Hugging Face files (safetensors, configuration, tokenizer)",
        "A run folder stands for its newest checkpoint.",
        "atpo-fast export runs/quickstart/checkpoints/step_000060 models/mine",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run folder")
    export.add_argument("target", metavar="TARGET", help="new or empty folder")
    export.set_defaults(run=_export)
    env = _add(
        verbs,
        "env",
        "versions, devices, and what does not fit together",
        "Exit code 1 when something has to be mended.",
        "atpo-fast env",
    )
    env.set_defaults(run=_env)
    return parser


def _add_launched(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: str) -> None:
    """A verb that runs in launched processes and is steered by a configuration."""
    summary, detail, example = LAUNCHED[verb]
    parser = _add(verbs, verb, summary, detail, example)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML configuration, such as configs/quickstart.yaml"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and the batch arithmetic; start nothing",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="overrides by dotted name; values are YAML, for example optim.lr=1e-6 data.eval_files=[a.jsonl]",
    )
    if verb == "rollout":
        parser.add_argument(
            "--out",
            type=_forest,
            metavar="FILE",
            help="NAME.jsonl or NAME.parquet (default: rollouts.jsonl in run_dir)",
        )
        parser.add_argument(
            "--questions", type=_count, metavar="N|all", help="the first so many; default: train.questions_per_step"
        )
        parser.add_argument("--split", choices=("train", "test"), help="which questions; default: train")
    parser.set_defaults(run=_launch)


def _forest(name: str) -> str:
    if Path(name).suffix not in (".jsonl", ".parquet"):
        raise argparse.ArgumentTypeError(f"{name!r} must end in .jsonl or .parquet")
    return name


def _count(text: str) -> str:
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of questions or all")
    return text


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: str, summary: str, detail: str, example: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        verb,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}",
        epilog=f"example: {example}",
    )
