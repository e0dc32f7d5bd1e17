"""Choose the turns of a search tree that are re-sampled, and the leaves that are kept (docs/design.md#search)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atpo_fast.tree.turn_tree import TurnTree


def expansion_scores(tree: TurnTree, branch_penalty: float) -> NDArray[np.float64]:
    """Compute the (N,) score of every turn: `H(n) - branch_penalty * (children of parent(n) - 1)`; -inf for leaves.

    The root has no action: it scores `0 - branch_penalty * (its own children - 1)`.
    """
    children = np.array([len(turn.children) for turn in tree.turns])
    parents = np.array([max(turn.parent, 0) for turn in tree.turns])
    entropy = np.array([turn.nll for turn in tree.turns])
    return np.where(children > 0, entropy - branch_penalty * (children[parents] - 1), -np.inf)


def select_turns(
    tree: TurnTree,
    count: int,
    *,
    strategy: Literal["entropy", "random"],
    branch_penalty: float,
    rng: np.random.Generator,
) -> list[int]:
    """Choose the `count` turns to re-sample, among those that are not leaves.

    entropy: the best scores, equal ones by lower index. random: uniformly, without repetition. Where there are fewer
    candidates than `count`, the same order is gone through again. Re-sampling turn n adds a sibling of it under
    parent(n); the root (0) means a fresh chain. Empty for a tree without any turn under its root.
    """
    scores = expansion_scores(tree, branch_penalty)
    candidates = np.flatnonzero(np.isfinite(scores))
    if not candidates.size:
        return []
    order = (
        rng.permutation(candidates)
        if strategy == "random"
        else candidates[np.argsort(-scores[candidates], kind="stable")]
    )
    return np.resize(order, count).tolist()


def keep_leaves(tree: TurnTree, count: int, rng: np.random.Generator) -> TurnTree:
    """Make the leaves of a tree count for exactly `count` trajectories.

    Extra leaves are pruned at random, with the ancestors that become childless: the result is then a new tree, its
    turns in the old order. Missing ones raise the multiplicity of the last leaf, in place. A tree without leaves
    is unchanged.
    """
    leaves = np.array(tree.leaves, dtype=np.int64)
    if leaves.size > count:
        return _prune(tree, rng.choice(leaves, size=count, replace=False))
    if leaves.size and leaves.size < count:
        last = int(leaves[-1])
        tree.set_multiplicity(last, tree.turns[last].multiplicity + count - leaves.size)
    return tree


def _prune(tree: TurnTree, leaves: NDArray[np.int64]) -> TurnTree:
    """Copy a tree with only the paths from the root to `leaves`."""
    keep = np.zeros(len(tree), dtype=bool)
    keep[leaves] = True
    for index in range(len(tree) - 1, 0, -1):  # parents come before their children
        keep[tree.turns[index].parent] |= keep[index]
    pruned = TurnTree(tree.turns[0].observation_ids, question_id=tree.question_id, meta=tree.meta)
    index_of = {0: 0}
    for index in np.flatnonzero(keep[1:]) + 1:
        old = tree.turns[index]
        index_of[int(index)] = new = pruned.add_turn(
            index_of[old.parent],
            old.action_ids,
            old.logprobs,
            old.observation_ids,
            finish_reason=old.finish_reason,
            tool=old.tool,
            step_reward=old.step_reward,
            score=old.score,
        )
        pruned.turns[new].reward = old.reward
        pruned.turns[new].multiplicity = old.multiplicity
    return pruned
