"""One process of a run, started by the DeepSpeed launcher:

deepspeed --module atpo_fast.train --config configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import sys

from atpo_fast.train.verbs import VERBS, run_verb


def main() -> int:
    """Parse, run, and turn expected failures into a message and an exit code."""
    parser = argparse.ArgumentParser(prog="atpo_fast.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--verb", choices=sorted(VERBS), default="train")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value")
    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--out", help="file of the trees")
    rollout.add_argument("--questions", help="how many, or all")
    rollout.add_argument("--split", choices=("train", "test"), default="train")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("out", "questions", "split")}
    chosen = options if arguments.verb == "rollout" else {}
    return run_verb(arguments.verb, arguments.config, arguments.overrides, **chosen)


if __name__ == "__main__":
    sys.exit(main())
