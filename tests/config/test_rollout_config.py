"""Legal and illegal shapes of the search: a key that a strategy does not read, or that cannot work, is refused."""

from __future__ import annotations

from typing import Any

import pytest

from atpo_fast.config import ConfigError, RolloutConfig, load_config
from atpo_fast.config.arithmetic import batch_arithmetic

ARPO: dict[str, Any] = {"strategy": "arpo", "samples_per_tree": 16, "initial_chains": 8}
TREE_GRPO: dict[str, Any] = {
    "strategy": "tree_grpo",
    "trees_per_question": 2,
    "initial_chains": 1,
    "expansion_rounds": 1,
    "expansions_per_round": 2,
    "samples_per_tree": 3,
}


def overrides(shape: dict[str, Any], **more: Any) -> list[str]:
    return [f"rollout.{key}={value}" for key, value in (shape | more).items()]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trees_per_question": 2}, "rollout.trees_per_question=2 is read by rollout.strategy=tree_grpo only"),
        ({"entropy_weight": 0.1}, "arpo and aepo only, not by entropy: leave it at 0.2"),
        ({"strategy": "chain", "branch_attempts": 2}, "rollout.branch_attempts=2"),
        (ARPO | {"streak_discount": 0.1}, "rollout.streak_discount=0.1 is read by rollout.strategy=aepo only"),
        (ARPO | {"pre_monitoring": False}, "rollout.pre_monitoring=False"),
        (ARPO | {"samples_per_tree": None}, "needs rollout.samples_per_tree"),
        (ARPO | {"initial_chains": 17}, "rollout.initial_chains=17 is more than rollout.samples_per_tree=16"),
        (ARPO | {"strategy": "aepo", "initial_chains": 17, "pre_monitoring": False}, "rollout.initial_chains=17"),
        (ARPO | {"top_p": 0.9}, "needs rollout.top_p=1"),
        (ARPO | {"top_k": 5}, "rollout.top_k=0"),
        (TREE_GRPO | {"trees_per_question": 1}, "with one tree the two are the same"),
        (TREE_GRPO | {"samples_per_tree": 1}, "a lone leaf has nothing in its tree to be compared with"),
        (TREE_GRPO | {"samples_per_tree": None, "expansion_rounds": 0}, "2 or more leaves in a tree, not 1"),
        (TREE_GRPO | {"samples_per_tree": 4}, "4 leaves are to be kept of a tree that has 3"),
    ],
)
def test_shapes_that_a_strategy_cannot_grow(settings: dict[str, Any], words: str) -> None:
    # Fails if a key is silently without effect, or if a shape fails only in the middle of a roll-out.
    with pytest.raises(ValueError, match=words):
        RolloutConfig(**settings)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["train.old_logprobs=rollout"], "train.old_logprobs=rollout has no log-prob of it"),
        (["objective.importance_cap=2.0"], "objective.importance_cap=2 has no log-prob to weigh it by"),
    ],
)
@pytest.mark.parametrize("strategy", ["arpo", "aepo"])
def test_nothing_needs_log_probs_of_tokens_that_were_not_sampled(strategy: str, more: list[str], words: str) -> None:
    # Fails if the NaN of an appended end token can reach a loss.
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*overrides(ARPO, strategy=strategy), *more])
    load_config(None, more)


def test_numbers_of_trajectories() -> None:
    # Fails if a batch is counted by tree, or a branching strategy by its initial chains.
    assert RolloutConfig(**ARPO).leaves == RolloutConfig(**ARPO).grown_leaves == 16
    found = RolloutConfig(**TREE_GRPO)
    assert (found.grown_leaves, found.leaves_per_tree, found.leaves) == (3, 3, 6)
    assert RolloutConfig(**(ARPO | {"strategy": "aepo", "initial_chains": 17})).leaves == 16


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (ARPO, "search: 8 chains, then branches up to 16 per question (arpo)"),
        (ARPO | {"strategy": "aepo"}, "search: as many chains as monitoring says, then branches up to 16 per question"),
        (TREE_GRPO, "search: 2 trees of 1 chain + 1 round × 2 expansions, 3 leaves of each kept, per question"),
    ],
)
def test_a_dry_run_says_what_grows(shape: dict[str, Any], words: str) -> None:
    # Fails if a strategy is described as rounds of expansion that it does not have.
    assert words in batch_arithmetic(load_config(None, overrides(shape)))
