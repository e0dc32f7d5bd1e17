"""`python -m bench.methods`: the methods against each other, from one cold start, at equal budgets of tokens.

    python -m bench.methods [--quick] [--parallel 2]

Every contender is first tried with each learning rate and the first seed; its best rate, by the area under EM, is then
run with all seeds. Each run leaves a record in bench/results/cpu/methods/, and a run that has one is not repeated: the
same command continues after Ctrl-C. Writes bench/results/METHODS.md and its figure. On 2 CPU cores it takes about an
hour, with --quick (one seed and learning rate, half of the budget) ten minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from bench.core.records import RESULTS
from bench.methods.curves import Record, area
from bench.methods.plan import FULL, QUICK, Budget, Trial, final, sweep
from bench.methods.report import figures, table
from bench.methods.trials import cold_start, measure


def main(arguments: list[str]) -> None:
    """Run what has no record yet, then write the table and the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, half of the budget")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    chosen = parser.parse_args(arguments)
    quick, budget = chosen.quick, QUICK if chosen.quick else FULL
    with ThreadPoolExecutor(chosen.parallel) as pool:
        cold_start()
        rates = best_rates(_run(pool, list(sweep(budget))), budget)
        records = _run(pool, list(final(budget, rates)))
    text = table(records, budget.generated)
    print(text)
    if quick:
        return
    (paths,) = figures(records, RESULTS / "plots")
    page = f"# Methods compared\n\n{text}\n\n![EM over tokens]({paths.relative_to(RESULTS)})\n"
    (RESULTS / "METHODS.md").write_text(page)


def best_rates(records: Iterable[Record], budget: Budget) -> dict[str, float]:
    """Return each contender's learning rate with the largest area under EM."""
    best: dict[str, tuple[float, float]] = {}
    for record in records:
        found = area(record, "generated", budget.generated), float(record["rate"])
        best[record["contender"]] = max(found, best.get(record["contender"], found))
    return {name: rate for name, (_, rate) in best.items()}


def _run(pool: ThreadPoolExecutor, trials: list[Trial]) -> list[Record]:
    """Return the records of trials, in order; tells of each as it ends."""
    begun, done = time.monotonic(), count(1)

    def run(trial: Trial) -> Record:
        record = measure(trial)
        em = record["points"][-1]["em"]
        print(f"{next(done)}/{len(trials)} {trial.slug}: EM {em:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
        return record

    return list(pool.map(run, trials))


if __name__ == "__main__":
    main(sys.argv[1:])
