"""The command line: `atpo-fast VERB`. Each verb is a module of this folder; here they are put together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from atpo_fast.commands.cold_start import COLD_START
from atpo_fast.commands.data import PREPARE
from atpo_fast.commands.doctor import DOCTOR
from atpo_fast.commands.evaluate import COMPARE, EVALUATE
from atpo_fast.commands.export import EXPORT
from atpo_fast.commands.import_traces import IMPORT
from atpo_fast.commands.methods import METHODS_VERB
from atpo_fast.commands.plan import PLAN
from atpo_fast.commands.report import REPORT
from atpo_fast.commands.retriever import RETRIEVER
from atpo_fast.commands.rollout import ROLLOUT
from atpo_fast.commands.train import TRAIN
from atpo_fast.common.errors import exit_code, in_words
from atpo_fast.common.log import set_up_logging

LAUNCHED = (TRAIN, COLD_START, EVALUATE, ROLLOUT)
LOCAL = (PLAN, COMPARE, PREPARE, REPORT, IMPORT, RETRIEVER, EXPORT, METHODS_VERB, DOCTOR)
VERBS = (*(verb.as_verb() for verb in LAUNCHED), *LOCAL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for a failure, 2 for bad input, 128 + a signal that stopped it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(join_verb(sys.argv[1:] if argv is None else argv))
    overrides = getattr(arguments, "overrides", None)
    if (overrides is None and rest) or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if overrides is not None:  # those that stood behind an option
        overrides.extend(rest)
    set_up_logging()
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        return code


def join_verb(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with a verb of two words, such as `eval compare`, as one."""
    both = " ".join(words[:2])
    return [both, *words[2:]] if any(verb.name == both for verb in VERBS) else list(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atpo-fast",
        description="Tree-search reinforcement learning of language-model agents (AT2PO).",
        epilog="`atpo-fast VERB --help` says more and gives an example.",
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_to(verbs)
    return parser
