"""Which turns are re-sampled and which leaves are kept, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from atpo_fast.rollout.expansion import expansion_scores, keep_leaves, select_turns
from atpo_fast.tree import TurnTree


def fixture_tree() -> TurnTree:
    """Turns 1..6; H(n) in brackets.

    root ─┬─ 1 (0.50) ─┬─ 3 (0.90, leaf)
          │            └─ 4 (0.52) ── 6 (2.0, leaf)
          └─ 2 (0.50) ─── 5 (0.70, leaf)
    """
    tree = TurnTree([1, 2, 3], question_id="q")
    for parent, nll in ((0, 0.5), (0, 0.5), (1, 0.9), (1, 0.52), (2, 0.7), (4, 2.0)):
        # Two tokens whose mean is H: a sum instead of a mean would double it.
        tree.add_turn(parent, [7, 8], [-nll - 0.1, -nll + 0.1], [9])
    return tree


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def select(tree: TurnTree, count: int, strategy: str = "entropy", penalty: float = 0.05, seed: int = 0) -> list[int]:
    return select_turns(tree, count, strategy=strategy, branch_penalty=penalty, rng=rng(seed))  # type: ignore[arg-type]


def test_scores_by_hand() -> None:
    # Fails if the penalty counts the turn's own children, or not minus 1, or if a leaf can be chosen.
    # root: 0 - 0.05*(2-1); 1 and 2: 0.5 - 0.05*(2-1); 4: 0.52 - 0.05*(2-1).
    scores = expansion_scores(fixture_tree(), 0.05)
    np.testing.assert_allclose(scores, [-0.05, 0.45, 0.45, -np.inf, 0.47, -np.inf, -np.inf], atol=1e-12)


def test_best_are_selected_with_ties_by_index() -> None:
    # Fails if ties depend on the sort algorithm or leaves 3, 5, 6 (the highest entropies) are candidates.
    assert select(fixture_tree(), 3) == [4, 1, 2]


def test_root_is_taken_only_when_it_ranks() -> None:
    assert select(fixture_tree(), 4) == [4, 1, 2, 0]
    # A penalty of 1: the root 0 - 1 and turns 1, 2 at 0.5 - 1. A third child of turn 1 costs turn 4 one more.
    tree = fixture_tree()
    tree.add_turn(1, [7], [-0.1])
    assert select(tree, 4, penalty=1.0) == [1, 2, 0, 4]


def test_too_few_candidates_are_taken_again_best_first() -> None:
    # Fails if fewer than `count` come back, or the worst is repeated.
    assert select(fixture_tree(), 6) == [4, 1, 2, 0, 4, 1]


def test_only_final_answers_leave_the_root() -> None:
    tree = TurnTree([1], question_id="q")
    tree.add_turn(0, [2], [-3.0])
    assert select(tree, 3) == [0, 0, 0]
    assert select(tree, 2, "random") == [0, 0]


def test_a_tree_without_turns_offers_nothing() -> None:
    assert select(TurnTree([1]), 3) == []


def test_random_takes_each_candidate_alike_and_no_leaf() -> None:
    # 2000 draws of 1 out of the 4 candidates: 500 expected each; 4 standard deviations are 77.
    tree, generator = fixture_tree(), rng(1)
    drawn = [select_turns(tree, 1, strategy="random", branch_penalty=0.05, rng=generator)[0] for _ in range(2000)]
    turns, counts = np.unique(drawn, return_counts=True)
    assert turns.tolist() == [0, 1, 2, 4]
    assert np.abs(counts - 500).max() < 80
    # Without repetition until all were taken; reproducible from the generator alone.
    assert sorted(select(tree, 4, "random", seed=2)) == [0, 1, 2, 4]
    assert select(tree, 9, "random", seed=3) == select(tree, 9, "random", seed=3)


def test_keep_leaves_of_the_right_number_changes_nothing() -> None:
    tree = fixture_tree()
    assert keep_leaves(tree, 3, rng()) is tree
    assert tree.num_trajectories == 3


def test_missing_leaves_raise_the_last_ones_multiplicity() -> None:
    # Fails if tokens are copied or another leaf is raised.
    tree = keep_leaves(fixture_tree(), 8, rng())
    assert [(n, tree.turns[n].multiplicity) for n in tree.leaves] == [(3, 1), (5, 1), (6, 6)]
    assert tree.num_trajectories == 8


def test_a_tree_without_leaves_stays() -> None:
    assert len(keep_leaves(TurnTree([1]), 4, rng())) == 1


@pytest.mark.parametrize("count", [1, 2])  # all ways to drop one or two of three leaves are met over the seeds
def test_extra_leaves_go_with_their_childless_ancestors(count: int) -> None:
    # Fails if an ancestor is left behind as a new leaf, or if indices, tokens or rewards are mixed up.
    seen = set()
    for seed in range(20):
        tree = fixture_tree()
        for leaf, reward in ((3, 0.3), (5, 0.5), (6, 0.6)):
            tree.set_reward(leaf, reward)
        pruned = keep_leaves(tree, count, rng(seed))
        kept = [pruned.turns[n].reward for n in pruned.leaves]
        seen.add(tuple(kept))
        assert len(kept) == count == pruned.num_trajectories
        assert pruned.question_id == "q"
        for n in pruned.leaves:
            original = {0.3: 3, 0.5: 5, 0.6: 6}[pruned.turns[n].reward or 0.0]
            assert pruned.path_ids(n).tolist() == tree.path_ids(original).tolist()
            assert [pruned.turns[i].nll for i in pruned.path(n)] == [tree.turns[i].nll for i in tree.path(original)]
        assert len(tree) == 7  # the original is not touched
    assert len(seen) == 3
