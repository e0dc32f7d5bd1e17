"""Run the stages of a day on a GPU.

    python -m bench.gpu_day a --out DAY        first call: does everything work, and how fast is it
    python -m bench.gpu_day b --out DAY        second call: peers, candidates, whole updates
    python -m bench.gpu_day b c --out DAY --seconds 480    also trains, if time is left
    python -m bench.gpu_day --plan             print the stages, their limits and the sum
    python -m bench.gpu_day --rehearse --out DAY           all of it on a CPU, at small sizes

Send DAY/gpu_day.tar.gz, and paste DAY/summary.md: docs/gpu_day.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from bench.gpu_day.archive import Archive
from bench.gpu_day.plan import describe, stages
from bench.gpu_day.runner import ROOT, Clock, Outcome, RehearsalClock, Session, run_stages, stage_environment


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen calls, and print a line for each stage and the summary at the end."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.calls) - {"a", "b", "c"}:
        parser.error(f"no call {', '.join(sorted(unknown))}; there are a, b and c")
    if options.plan:
        print("\n".join(describe()))
        return
    calls = options.calls or (["a", "b", "c"] if options.rehearse else ["a"])
    signal.signal(signal.SIGTERM, _leave)  # so that a stage that runs is ended, and the archive is whole
    archive = Archive(options.out.resolve(), say)
    session = Session(
        archive=archive,
        summary=lambda outcomes: summarise(archive, outcomes),
        say=say,
        device="cpu" if options.rehearse else "cuda",
        small=options.rehearse,
        seconds=options.seconds,
        clock=RehearsalClock() if options.rehearse else Clock(),
        environment=stage_environment(ROOT / ".whl"),
    )
    say(describe()[-1])
    outcomes = run_stages(session, stages(calls))
    print(summarise(archive, outcomes))
    if options.rehearse and any(outcome.result != "ok" for outcome in outcomes):
        sys.exit(1)


def summarise(archive: Archive, outcomes: list[Outcome]) -> str:
    """Write the summary of what has been found so far; an error in it must not end a session."""
    from bench.gpu_day.summary import summary  # loads PyTorch, while the first stages already run

    try:
        return summary(archive.records(), outcomes)
    except Exception as error:
        return f"no summary: {type(error).__name__}: {error}"


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _leave(*_: Any) -> None:
    sys.exit("stopped by a signal")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calls", nargs="*", metavar="a|b|c", help="what to run; without one, a")
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), help="folder of records, archive and summary")
    parser.add_argument("--seconds", type=float, help="after which no stage goes on")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the CPU at small sizes")
    return parser


if __name__ == "__main__":
    main()
