"""`python -m bench.methods`: the methods against each other, from one cold start, at equal budgets of tokens.

    python -m bench.methods [--quick]

Every contender is first tried with each learning rate and the first seed; its best rate, by the area under EM, is then
run with all seeds. Each run leaves a record in bench/results/cpu/methods/, and a run that has one is not repeated: the
same command continues after Ctrl-C. Writes bench/results/METHODS.md and its figure. On 2 CPU cores it takes about two
hours, with --quick (one seed, a quarter of the budget) ten minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

from bench.core.records import RESULTS
from bench.methods.curves import Record, area
from bench.methods.plan import FULL, QUICK, Budget, Trial, final, sweep
from bench.methods.report import figures, table
from bench.methods.trials import measure


def main(arguments: list[str]) -> None:
    """Run what has no record yet, then write the table and the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a quarter of the budget")
    quick = parser.parse_args(arguments).quick
    budget = QUICK if quick else FULL
    records = _run(list(final(budget, best_rates(_run(list(sweep(budget))), budget))))
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


def _run(trials: list[Trial]) -> list[Record]:
    records: list[Record] = []
    for number, trial in enumerate(trials, 1):
        begun = time.monotonic()
        records.append(measure(trial))
        em = records[-1]["points"][-1]["em"]
        print(f"{number}/{len(trials)} {trial.slug}: EM {em:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return records


if __name__ == "__main__":
    main(sys.argv[1:])
