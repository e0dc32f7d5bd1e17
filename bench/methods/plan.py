"""What is compared: the contenders, and how much each may generate and train on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "compare.yaml"
WORLD_SEED = 1
"""Seed of the world and of the cold start, which all runs share: after it EM is about 0.2."""
LEAVES = 12
"""Trajectories of a question, the same for all."""
_TREE = ("rollout.initial_chains=6", "rollout.expansion_rounds=2", "rollout.expansions_per_round=3")
_CHAINS = (f"rollout.initial_chains={LEAVES}",)
_BRANCHING = ("rollout.initial_chains=6", f"rollout.samples_per_tree={LEAVES}")
_TREES = (
    "rollout.trees_per_question=2",
    "rollout.initial_chains=1",
    "rollout.expansion_rounds=1",
    "rollout.expansions_per_round=5",
    "rollout.samples_per_tree=6",
)


@dataclass(frozen=True)
class Contender:
    """A method, or a variant of one, and the shape of its rollouts."""

    name: str
    overrides: tuple[str, ...]


CONTENDERS = {
    name: Contender(name, (f"method={method}", *overrides))
    for name, method, overrides in (
        ("at2po", "at2po", _TREE),
        ("at2po, random expansion", "at2po", (*_TREE, "rollout.strategy=random")),
        ("at2po, credit by trajectory", "at2po", (*_TREE, "credit.method=grpo")),
        ("at2po, loss by token", "at2po", (*_TREE, "objective.preset=ppo")),
        (
            "at2po, ten times the clip range",
            "at2po",
            (*_TREE, "objective.clip_low=0.03", "objective.clip_high=0.04"),
        ),
        ("at2po, rollouts of arpo", "at2po", (*_BRANCHING, "rollout.strategy=arpo", "train.old_logprobs=recompute")),
        ("atpo", "atpo", _CHAINS),
        ("grpo", "grpo", _CHAINS),
        ("dapo", "dapo", _CHAINS),
        ("gspo", "gspo", _CHAINS),
        ("arpo", "arpo", _BRANCHING),
        ("aepo", "aepo", (*_BRANCHING, "rollout.pre_monitoring=false")),
        ("tree_grpo", "tree_grpo", _TREES),
    )
}


@dataclass(frozen=True)
class Budget:
    """How much one run may generate, and how often it is evaluated."""

    generated: int
    """Number of sampled tokens after which it ends."""
    eval_every: int
    """Steps between evaluations."""
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """Learning rates that are tried, with the first seed, for every contender alike."""


FULL = Budget(generated=32_000, eval_every=2, seeds=(0, 1, 2), rates=(5e-5, 1e-4, 2e-4, 4e-4))
QUICK = Budget(generated=16_000, eval_every=2, seeds=(0,), rates=(2e-4,))


@dataclass(frozen=True)
class Trial:
    """One run: a contender with a seed and a learning rate."""

    contender: Contender
    seed: int
    rate: float
    budget: Budget

    @property
    def slug(self) -> str:
        """Name of the trial's record: what it is, and a digest of all that it depends on."""
        words = self.contender.name.replace(", ", "-").replace(" ", "-")
        spent = self.budget.generated, self.budget.eval_every
        text = json.dumps([asdict(self.contender), WORLD_SEED, *spent, CONFIG.read_text()])
        return f"{words}-lr{self.rate:g}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def overrides(self) -> list[str]:
        """Overrides of the configuration, but for folders and weights."""
        return [
            *self.contender.overrides,
            f"seed={self.seed}",
            f"world.seed={WORLD_SEED}",
            f"optim.lr={self.rate:g}",
            f"train.token_budget={self.budget.generated}",
            f"train.eval_every={self.budget.eval_every}",
        ]


def sweep(budget: Budget) -> Iterator[Trial]:
    """Yield the trials of the learning rates: every contender with every rate, with the first seed."""
    for contender in CONTENDERS.values():
        for rate in budget.rates:
            yield Trial(contender, budget.seeds[0], rate, budget)


def final(budget: Budget, rates: dict[str, float]) -> Iterator[Trial]:
    """Yield the trials of the table: every contender with its best rate and every seed, a seed at a time."""
    for seed in budget.seeds:
        for name, contender in CONTENDERS.items():
            yield Trial(contender, seed, rates[name], budget)
