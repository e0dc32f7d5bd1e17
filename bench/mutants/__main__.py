"""`python -m bench.mutants`: try every mutant against the tests of its part, and say which survive.

One process imports the libraries. It forks a child for each mutant, which loads the faulty module in the place of the
real one and runs the tests that run the faulty line, until the first failure. A mutant whose tests take five times
their CPU time counts as noticed. The outcome goes to `results.json` and SURVIVORS.md in this folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from atpo_fast.common.threads import bound_spinning
from bench.mutants.mutate import mutants
from bench.mutants.parts import PARTS, equivalent_mutants, name_of
from bench.mutants.survivors import BAR, Outcome, Survivor, keep, unknown_names
from bench.mutants.trial import baseline, try_mutant, warm

_PROGRESS_SECONDS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the check, print a line for each survivor, and fail where a part has less than 90 % killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--every", type=int, help="try one of so many mutants, and record nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if stale := unknown_names():
        sys.exit("equivalent.json names mutants that do not exist (any more):\n  " + "\n  ".join(stale))
    bound_spinning(os.environ)  # like all of this before PyTorch and Triton are imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # forks cannot use a GPU
    outcomes = {name: _check(name, options.every or PARTS[name].every) for name in options.parts}
    if options.every is None:
        keep(outcomes)
    sys.exit(any(outcome.share < BAR for outcome in outcomes.values()))


def _check(name: str, every: int) -> Outcome:
    """Try the mutants of a part."""
    from bench.core.records import commit

    part, equivalent = PARTS[name], equivalent_mutants()
    try:
        base = baseline(part)
    except RuntimeError as error:
        sys.exit(f"{name}: {error}")
    warm(base.libraries)
    faults = [(file, mutant) for file in part.files() for mutant in mutants(file.read_text())][every - 1 :: every]
    outcome = Outcome(commit=commit(), every=every, seconds=sum(base.seconds.values()))
    said = time.monotonic()
    for number, (file, mutant) in enumerate(faults):
        label = name_of(file, mutant.place, mutant.what)
        if label in equivalent:
            outcome.equivalent.append(label)
            continue
        verdict = try_mutant(base, file, mutant)
        outcome.tried += 1
        outcome.killed += verdict.killed
        outcome.seconds += verdict.seconds
        if not verdict.killed:
            outcome.survivors.append(Survivor(label, mutant.line, is_run=bool(base.tests_of(file, mutant.lines))))
            print(f"  survived: {label} (line {mutant.line})", flush=True)
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"  {name}: {number + 1} of {len(faults)}, {outcome.killed} killed", file=sys.stderr, flush=True)
    print(f"{name}: {outcome.killed} of {outcome.tried} mutants killed ({outcome.share:.0%})", flush=True)
    return outcome


if __name__ == "__main__":
    main()
