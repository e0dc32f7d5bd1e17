"""The comparison of the methods: what is read from runs, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.config import load_config
from atpo_fast.config.methods import METHODS, setting
from bench.methods.__main__ import best_rates
from bench.methods.curves import area, common_budget, interval, value_at
from bench.methods.plan import CONFIG, CONTENDERS, FULL, LEAVES, Budget, Trial, final, sweep
from bench.methods.report import HEADINGS, figures, table
from bench.methods.trials import curve


def record(contender: str = "at2po", seed: int = 0, rate: float = 1e-4, last: float = 0.8) -> dict[str, Any]:
    """A run that was evaluated before, in the middle of and after its budget of 100 tokens."""
    spent = [(0, 0.0), (60, 0.2), (100, last)]
    points = [
        {
            "step": step,
            "generated": float(tokens),
            "trained": 2.0 * tokens,
            "em": em,
            "by_hops": {"1": em, "2": em, "3": em / 2},
        }
        for step, (tokens, em) in enumerate(spent)
    ]
    return {"contender": contender, "seed": seed, "rate": rate, "cpu_seconds": 60.0, "points": points}


def test_every_contender_is_its_method_with_as_many_trajectories() -> None:
    """Fails if a contender trains on more trajectories of a question, or is another method than its name says."""
    for name, contender in CONTENDERS.items():
        config = load_config(CONFIG, contender.overrides)
        assert config.rollout.leaves == LEAVES, name
        departs = {k for k, v in METHODS[config.method].essence.items() if setting(config, k) != v}
        assert len(departs) + bool(config.objective.departures) == (1 if "," in name else 0), name


def test_trials_are_what_the_plan_says() -> None:
    """Fails if a contender gets more learning rates or seeds than another, or its record hides what it depends on."""
    tried, last = list(sweep(FULL)), list(final(FULL, dict.fromkeys(CONTENDERS, 1e-4)))
    assert len(tried) == len(CONTENDERS) * len(FULL.rates) and {trial.seed for trial in tried} == {FULL.seeds[0]}
    assert len(last) == len(CONTENDERS) * len(FULL.seeds)
    slugs = {trial.slug for trial in [*tried, *last]}
    assert len(slugs) == len({(t.contender.name, t.seed, t.rate) for t in [*tried, *last]})
    assert last[0].slug != Trial(last[0].contender, 0, 1e-4, Budget(1, 1, (0,), (1e-4,))).slug


def test_curves() -> None:
    """Fails if EM between evaluations, the area, or the interval of some seeds is another number."""
    run = record()
    assert value_at(run, "generated", 30) == pytest.approx(0.1)
    assert value_at(run, "trained", 160, "3") == pytest.approx(0.25)
    assert area(run, "generated", 80) == pytest.approx((60 * 0.1 + 20 * 0.35) / 80)
    assert common_budget([run, record(last=0.1)], "trained") == 200
    assert interval([0.5]) == "0.500"
    assert interval([0.4, 0.5, 0.6]) == "0.500 ± 0.248"  # t(2) = 4.303 times 0.1 / sqrt(3)


def test_the_best_rate_is_that_of_the_largest_area() -> None:
    tried = [record(rate=1e-4, last=0.3), record(rate=3e-4, last=0.7), record("grpo", rate=1e-4)]
    assert best_rates(tried, Budget(100, 1, (0,), (1e-4,))) == {"at2po": 3e-4, "grpo": 1e-4}


def test_a_run_is_read_with_what_was_spent(tmp_path: Path) -> None:
    """Fails if an evaluation is credited with tokens of later steps, or questions are sorted into wrong hops."""
    train = {"phase": "train", "tokens/decoded": 10, "tokens/trained": 30}
    lines = [{"phase": "eval", "step": 0}, *({**train, "step": step} for step in (1, 2)), {"phase": "eval", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "eval").mkdir()
    answers = [("the rival of e1", 1.0), ("the rival of the mentor of e1", 0.0), ("the tailor of e2", 0.0)]
    for step in (0, 2):
        text = "\n".join(json.dumps({"question": f"What is {q}?", "em": em}) for q, em in answers)
        (tmp_path / "eval" / f"step_{step:06d}.jsonl").write_text(text)
    first, second = curve(tmp_path)
    assert (first.generated, first.trained) == (0, 0)
    assert (second.generated, second.trained) == (20, 60)
    assert second.em == pytest.approx(1 / 3) and second.by_hops == {"1": 0.5, "2": 0.0}


def test_table_and_figure(tmp_path: Path) -> None:
    """Fails if a contender is left out, or a line has other columns than the heading."""
    runs = [record(name, seed) for name in ("at2po", "grpo") for seed in (0, 1)]
    lines = table(runs, 100).splitlines()
    assert [line.count("|") for line in lines] == [len(HEADINGS) + 1] * 5
    assert "| at2po | 0.0001 | " in lines[3] and "0.800 ± 0.000" in lines[3]
    (figure,) = figures(runs, tmp_path)
    assert "at2po" in figure.read_text() and "grpo" in figure.read_text()
