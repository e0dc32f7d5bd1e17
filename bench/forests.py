"""Random forests of a given overlap, shaped like the published search (10 chains, 2 rounds of 6 siblings)."""

from __future__ import annotations

import numpy as np

from atpo_fast import TurnTree, assign_credit
from atpo_fast.tree import overlap

CHAINS, ROUNDS, SIBLINGS = 10, 2, 6


def random_tree(
    rng: np.random.Generator, *, prompt: int, turns: int, action: int, observation: int, vocab: int
) -> TurnTree:
    """One tree: chains of 1..`turns` tool turns and an answer, then siblings of random inner turns run to their end."""
    tree = TurnTree(np.arange(prompt) % vocab)  # drawing it would make the shape depend on its length

    def run_to_end(parent: int, left: int) -> None:
        for _ in range(left):
            parent = _turn(tree, rng, parent, action, observation, vocab)
        leaf = _turn(tree, rng, parent, action, 0, vocab)
        tree.set_reward(leaf, float(rng.integers(0, 2)))

    for _ in range(CHAINS):
        run_to_end(0, int(rng.integers(1, turns + 1)))
    for _ in range(ROUNDS):
        inner = [n for n in range(1, len(tree)) if tree.turns[n].children]
        for n in rng.choice(inner, SIBLINGS):
            parent = tree.turns[int(n)].parent
            run_to_end(parent, max(0, turns - len(tree.path(parent)) + 1))
    return tree


def forest_of_overlap(
    target: float, trees: int, *, turns: int, action: int, observation: int, vocab: int, seed: int = 0
) -> list[TurnTree]:
    """A forest whose overlap is `target` to about 0.01, reached by the length of the prompt."""
    low, high = 4, 200 * action
    sizes = {"turns": turns, "action": action, "observation": observation, "vocab": vocab}

    def grow(prompt: int) -> list[TurnTree]:
        rng = np.random.default_rng(seed)
        return [random_tree(rng, prompt=prompt, **sizes) for _ in range(trees)]

    while low < high:  # overlap grows with the prompt
        middle = (low + high) // 2
        low, high = (middle + 1, high) if overlap(grow(middle)) < target else (low, middle)
    forest = grow(low)
    assign_credit(forest)
    return forest


def written_out(forest: list[TurnTree]) -> list[TurnTree]:
    """The same trajectories as trees of one leaf each: what a trainer without prefix sharing sees."""
    flat = []
    for tree in forest:
        assert tree.advantages is not None
        for leaf in tree.leaves:
            path = tree.path(leaf)
            chain = TurnTree(tree.turns[0].observation_ids)
            parent = 0
            for n in path[1:]:
                turn = tree.turns[n]
                parent = chain.add_turn(parent, turn.action_ids, turn.logprobs, turn.observation_ids)
            chain.advantages = tree.advantages[path]
            flat.append(chain)
    return flat


def _turn(tree: TurnTree, rng: np.random.Generator, parent: int, action: int, observation: int, vocab: int) -> int:
    written = int(rng.integers(action // 2, action * 3 // 2))
    seen = int(rng.integers(observation // 2, observation * 3 // 2)) if observation else 0
    return tree.add_turn(parent, rng.integers(0, vocab, written), -rng.random(written), rng.integers(0, vocab, seen))
