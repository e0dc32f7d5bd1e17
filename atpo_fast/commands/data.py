"""`atpo-fast data prepare`: questions of the usual sets for training and evaluation, in one layout, decontaminated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from atpo_fast.commands.verb import Verb
from atpo_fast.common.files import replacing
from atpo_fast.data.decontamination import NEAR
from atpo_fast.data.preparation import parse_source, prepare
from atpo_fast.data.preparation.prepare import Preparation
from atpo_fast.data.preparation.report import report, report_lines
from atpo_fast.data.preparation.sources import HUB_SETS, SetSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the sets, what is protected, and the folder."""

    def sets(name: str, help_text: str) -> None:
        parser.add_argument(
            name, nargs="+", action="extend", type=_source, default=[], metavar="NAME[=FILE,..]", help=help_text
        )

    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder that is written")
    parser.add_argument("--root", default=".", type=Path, metavar="DIR", help="folder that files are relative to")
    sets("--train", f"sets to train on; without files from the Hugging Face hub ({', '.join(HUB_SETS)})")
    sets("--eval", "sets to evaluate on: written too, and taken out of training")
    sets("--against", "further sets that are taken out of training, but not written")
    parser.add_argument(
        "--near",
        type=_near,
        default=NEAR,
        metavar="S",
        help=f"similarity from which a training question is too near to an evaluation's (default: {NEAR}); none: only "
        "equal ones are taken out",
    )
    parser.add_argument(
        "--held-out",
        nargs="+",
        action="extend",
        type=_count,
        default=[],
        metavar="NAME=N",
        help="hold N questions of a training set out as its evaluation set",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of what is held out (default: 0)")


def prepare_data(arguments: argparse.Namespace) -> int:
    """Prepare the sets, write the report beside them, and print its lines; returns the exit code."""
    if not (arguments.train or arguments.eval):
        raise ValueError("nothing to prepare: name sets with --train and --eval")
    wanted = Preparation(
        train=arguments.train,
        evaluation=arguments.eval,
        against=arguments.against,
        held_out=dict(arguments.held_out),
        near=arguments.near,
        seed=arguments.seed,
        root=arguments.root,
    )
    sets = prepare(wanted, arguments.out)
    with replacing(arguments.out / "report.json") as partial:
        facts = {"near": arguments.near, "seed": arguments.seed, "sets": report(sets)}
        partial.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(report_lines(sets)))
    print(f"report: {arguments.out / 'report.json'}")
    return 0


def _source(text: str) -> SetSource:
    try:
        return parse_source(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _near(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0 and at most 1, or none")
    return value


def _count(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not name or not count.isdecimal() or not int(count):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=N, with N questions")
    return name, int(count)


PREPARE = Verb(
    name="data prepare",
    summary="questions of the usual sets in one layout, without those in training that an evaluation asks",
    detail="Reads HotpotQA, 2WikiMultihopQA, MuSiQue, Bamboogle, NQ, TriviaQA, PopQA and others in any layout that "
    "training reads, from local files or the hub. Writes DIR/train/NAME.jsonl and DIR/eval/NAME.jsonl with paragraphs "
    "and evidence, and DIR/report.json: what was read, dropped (equal or near to an evaluation question, with "
    "examples) and kept, the shares of yes-or-no answers and of questions with evidence.",
    example="atpo-fast data prepare --out prepared --train hotpotqa=hotpot_train.json --eval hotpotqa=hotpot_dev.json "
    "nq=nq_test.jsonl --held-out hotpotqa=50",
    run=prepare_data,
    add_arguments=add_arguments,
)
