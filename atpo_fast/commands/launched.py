"""Verbs that launched processes do together: the command checks the configuration, each process then does the work.

The modules of such verbs import what needs PyTorch inside `work`, so that help and dry runs are there at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from atpo_fast.commands.hostfile import start_nodes
from atpo_fast.commands.nodes import add_node_arguments, follow_input, nodes_of
from atpo_fast.commands.verb import Verb, no_arguments
from atpo_fast.common.errors import AtpoError, ConfigError, StopRequested, exit_code, in_words, is_lost_rank
from atpo_fast.common.log import set_up_logging
from atpo_fast.config import dump_config, load_config, read_deepspeed
from atpo_fast.config.arithmetic import batch_arithmetic

if TYPE_CHECKING:
    from atpo_fast.train.run import Run


_LAUNCHER_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class LaunchedVerb:
    """A verb that is steered by a configuration and runs in every process of the launcher."""

    name: str
    summary: str
    detail: str
    example: str
    work: Callable[[Run, argparse.Namespace], int]
    """Function that each process runs; returns its exit code."""
    add_options: Callable[[argparse.ArgumentParser], None] = no_arguments
    """Function that adds the verb's own options, each with the default None."""
    tells_cost: bool = False
    """Whether a dry run estimates time and memory."""
    old_names: tuple[str, ...] = ()

    def as_verb(self) -> Verb:
        """Return the verb of the command line, which launches."""
        return Verb(
            name=self.name,
            summary=self.summary,
            detail=self.detail,
            example=self.example,
            run=partial(_launch, self),
            add_arguments=self._add_arguments,
            old_names=self.old_names,
        )

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
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
            help="overrides by dotted name; values are YAML, for example optim.lr=1e-6 data.eval_files=[a.jsonl]; "
            "--dry-run prints all keys, docs/configuration.md explains them",
        )
        self.add_options(parser)
        add_node_arguments(parser)

    def options(self, arguments: argparse.Namespace) -> list[str]:
        """Return the verb's own options as words of a command line."""
        parser = argparse.ArgumentParser(add_help=False)
        self.add_options(parser)
        given = {name: getattr(arguments, name) for name in vars(parser.parse_args([]))}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _launch(verb: LaunchedVerb, arguments: argparse.Namespace) -> int:
    """Check the configuration, then start the processes and wait for them; a dry run only says what would be done."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(dump_config(config), batch_arithmetic(config), sep="\n")
        if verb.tells_cost:
            from atpo_fast.train.plan import cost_lines

            print(*cost_lines(config), sep="\n")
        return 0
    read_deepspeed(config)
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        raise ConfigError(f"run_dir={config.run_dir}: is a file; name a folder, which may be new")
    options = verb.options(arguments)
    if arguments.hostfile is not None:
        words = [verb.name, *options, "--config", arguments.config, *arguments.overrides]
        return start_nodes(arguments, words)
    from atpo_fast.commands.launcher import launch, place

    placement = place(config)
    nodes = nodes_of(arguments, len(placement.accelerators))
    if arguments.stop_with_input:
        stop = partial(os.kill, os.getpid(), signal.SIGTERM)
        threading.Thread(target=follow_input, args=(stop, sys.stdin), daemon=True).start()
    return launch(verb.name, arguments.config, arguments.overrides, placement, options, nodes)


def run_process(verb: LaunchedVerb, arguments: argparse.Namespace) -> int:
    """Do a verb's work as one of its processes; returns the exit code. Expected failures become a line on stderr."""
    import torch.distributed as dist

    from atpo_fast.train.run import start_run

    set_up_logging()
    try:
        config = load_config(arguments.config, arguments.overrides)
        run = start_run(config)
        try:
            with run.progress:
                return verb.work(run, arguments)
        finally:
            if run.task.sessions is not None:
                run.task.sessions.close()  # not at the exit of Python, when nothing can start a thread any more
            run.logger.close()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        lost = is_lost_rank(error)
        told_by_the_first = lost or (isinstance(error, AtpoError) and error.on_every_rank)
        if not isinstance(error, StopRequested) and not (told_by_the_first and os.environ.get("RANK", "0") != "0"):
            print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        if lost:
            time.sleep(_LAUNCHER_SECONDS)  # until the launcher has seen the rank that failed, whose exit code it keeps
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
