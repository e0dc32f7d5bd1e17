"""Run one process of a run, as DeepSpeed's launcher starts it.

deepspeed --module atpo_fast.train --config configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import sys

from atpo_fast.commands.cli import LAUNCHED
from atpo_fast.commands.launched import run_process

VERBS = {name: verb for verb in LAUNCHED for name in (verb.name, *verb.old_names)}


def main() -> int:
    """Parse the verb's arguments and do its work; returns the exit code."""
    parser = argparse.ArgumentParser(prog="atpo_fast.train", description=__doc__, add_help=False)
    parser.add_argument("--verb", choices=sorted(VERBS), default="train")
    verb = VERBS[parser.parse_known_args()[0].verb]
    parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value")
    verb.add_options(parser)
    return run_process(verb, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
