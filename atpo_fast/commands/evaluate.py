"""`atpo-fast eval`: answers to the questions of all evaluation sets; `atpo-fast eval compare`: two of them, paired."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atpo_fast.commands.launched import LaunchedVerb
from atpo_fast.commands.model_folder import model_to_use
from atpo_fast.commands.verb import Verb
from atpo_fast.common.errors import STOPPED, DataError, StopRequested
from atpo_fast.common.files import replacing

if TYPE_CHECKING:
    from atpo_fast.data.questions import Question
    from atpo_fast.train.run import Run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the files."""
    parser.add_argument(
        "--name",
        type=_file_name,
        metavar="NAME",
        help="write eval/NAME.jsonl, .json and .md in run_dir; default: newest, or given for model.path",
    )


def evaluate(run: Run, arguments: argparse.Namespace) -> int:
    """Evaluate the run folder's newest model, or else `model.path`, on all sets; returns the exit code."""
    from atpo_fast.evaluation.sets import evaluation_sets
    from atpo_fast.train.evaluate import AnswerFile, answer_header, answer_sets, answering_config
    from atpo_fast.train.sampler import Sampler

    sets = evaluation_sets(run.config, run.task.eval)
    if not sets:
        raise DataError("nothing was evaluated: there are no evaluation questions; set eval.sets or data.eval_files")
    for question in (question for questions in sets.values() for question in questions):
        run.task.encode_prompt(question)  # raises for one that is too long, before the model is loaded
    run = replace(run, config=answering_config(run.config))
    model, given = model_to_use(run.folder, run.config.model.path, arguments.overrides)
    path = run.folder / "eval" / f"{arguments.name or ('given' if given else 'newest')}.jsonl"
    file = AnswerFile(path, answer_header(run.config, model))
    try:
        answered = answer_sets(run, Sampler(run, model, run.device), sets, file)
    except StopRequested:
        run.progress.message(f"stopped: {path} holds what is answered; the same command continues")
        return STOPPED
    if run.is_main:
        from atpo_fast.evaluation.summary import summarise

        training = {name: _in_training(questions, run.task.train) for name, questions in sets.items()}
        summary = summarise(answered, training)
        _finish(run, path, file.header, summary)
    return 0


def _finish(run: Run, path: Path, header: Mapping[str, Any], summary: Any) -> None:
    """Write the summary as JSON and as Markdown beside the answers, and show the latter."""
    from atpo_fast.evaluation.tables import render

    page = render(summary, str(header["model"]))
    with replacing(path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps({"of": header, **summary.as_json()}, indent=1) + "\n", encoding="utf-8")
    with replacing(path.with_suffix(".md")) as partial:
        partial.write_text(page, encoding="utf-8")
    run.progress.message(f"{page}\nanswers: {path}; this page and its numbers: {path.stem}.md and .json beside it")


def _in_training(questions: list[Question], train: list[Question]) -> int:
    """Count the questions that are training questions too."""
    from atpo_fast.data.decontamination import normalise_question

    known = {normalise_question(question.text) for question in train}
    return sum(normalise_question(question.text) in known for question in questions)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two files, and the option for numbers in place of a table."""
    parser.add_argument("first", type=Path, metavar="A", help="answers of the first model: eval/NAME.jsonl of a run")
    parser.add_argument("second", type=Path, metavar="B", help="answers of the second model to the same questions")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, not as a table")


def compare_files(arguments: argparse.Namespace) -> int:
    """Compare two files of answers question by question; returns the exit code."""
    from atpo_fast.evaluation.answers import read_answers
    from atpo_fast.evaluation.compare import compare, render

    found = compare(read_answers(arguments.first)[1], read_answers(arguments.second)[1])
    if arguments.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print(render(found, _short_names(arguments.first, arguments.second)))
    return 0


def _short_names(first: Path, second: Path) -> tuple[str, str]:
    """Return the names of two files, with as much of their paths as tells them apart."""
    ends = first.with_suffix("").parts, second.with_suffix("").parts
    for length in range(1, max(map(len, ends)) + 1):
        names = "/".join(ends[0][-length:]), "/".join(ends[1][-length:])
        if names[0] != names[1]:
            return names
    return "A", "B"


def _file_name(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise argparse.ArgumentTypeError(f"{name!r} must be a name, without folders")
    return name


EVALUATE = LaunchedVerb(
    name="eval",
    summary="answers to all evaluation sets: EM, F1, intervals, format, turns, tool calls, tokens, pass@k, maj@k",
    detail="Evaluates model.path where the command line gives it, else the newest checkpoint of run_dir, else the "
    "configuration's model.path, on eval.sets (named lists of files) and "
    "data.eval_files, by any engine. Writes eval/NAME.jsonl (every answer with its whole response), NAME.json and "
    "NAME.md (tables, published results beside ours) in run_dir. The same command continues an interrupted "
    "evaluation; answers of another model or configuration are put aside. data.max_eval_questions limits each set; "
    "eval.samples and eval.temperature ask for several answers to a question. `atpo-fast eval compare A B` tests two "
    "evaluations against each other.",
    example="atpo-fast eval --config runs/quickstart/config.yaml --name small "
    "'eval.sets={hotpotqa: [eval/hotpot.jsonl], nq: [eval/nq.jsonl]}' data.max_eval_questions=50",
    work=evaluate,
    add_options=add_options,
)

COMPARE = Verb(
    name="eval compare",
    summary="two evaluations question by question: differences, intervals, exact paired tests",
    detail="Compares the questions that both files answer, by set and over all: McNemar's exact test where every "
    "question is right or wrong, else a paired randomisation test; intervals by the paired bootstrap.",
    example="atpo-fast eval compare runs/a/eval/newest.jsonl runs/b/eval/newest.jsonl",
    run=compare_files,
    add_arguments=add_compare_arguments,
)
