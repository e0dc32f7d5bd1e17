"""Random forests shaped like the published search: 10 chains, then 2 rounds of 6 siblings, hence 22 leaves a tree."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from atpo_fast import TurnTree, assign_credit
from atpo_fast.tree import overlap

CHAINS, ROUNDS, SIBLINGS = 10, 2, 6
Range = tuple[int, int]  # least and most, drawn uniformly


@dataclass(frozen=True, slots=True)
class Lengths:
    """The ranges of the numbers of tokens and turns of a random tree."""

    prompt: Range
    turns: Range  # number of turns of a trajectory, its answer included
    action: Range
    observation: Range

    def scaled(self, by: float) -> Lengths:
        """Divide all numbers of tokens by the same factor."""
        prompt, turns, *others = astuple(self)
        prompt, action, observation = ((round(lo / by), round(hi / by)) for lo, hi in (prompt, *others))
        return Lengths(prompt, turns, action, observation)


PUBLISHED = Lengths(prompt=(300, 2000), turns=(1, 6), action=(40, 400), observation=(300, 900))
SEARCH_3000 = Lengths(prompt=(900, 900), turns=(4, 4), action=(150, 150), observation=(500, 500))  # 3,000 a trajectory


def random_tree(seed: int, lengths: Lengths, vocab: int) -> TurnTree:
    """Draw a tree: chains, then siblings of random inner turns, each run to its end; random rewards of 0 or 1."""
    rng, tokens = np.random.default_rng(seed), np.random.default_rng(seed)  # of the shape, of what is in it

    def ids(length: Range) -> np.ndarray:
        return tokens.integers(0, vocab, max(1, int(rng.integers(length[0], length[1] + 1))))

    tree = TurnTree(ids(lengths.prompt))

    def run_to_end(parent: int, depth: int) -> None:
        least, most = lengths.turns
        turns = int(rng.integers(max(least, depth + 1), most + 1))
        for turn in range(depth, turns):
            action = ids(lengths.action)
            observation = ids(lengths.observation) if turn < turns - 1 else None
            parent = tree.add_turn(parent, action, -tokens.random(len(action)), observation)
        tree.set_reward(parent, float(tokens.integers(0, 2)))

    for _ in range(CHAINS):
        run_to_end(0, 0)
    for _ in range(ROUNDS):
        inner = [n for n in range(1, len(tree)) if tree.turns[n].children]
        for n in rng.choice(inner, SIBLINGS):
            parent = tree.turns[int(n)].parent
            run_to_end(parent, len(tree.path(parent)) - 1)
    return tree


def random_forest(trees: int, lengths: Lengths, vocab: int, seed: int = 0) -> list[TurnTree]:
    """Draw several random trees and assign their credit."""
    forest = [random_tree(seed + i, lengths, vocab) for i in range(trees)]
    assign_credit(forest)
    return forest


def forest_of_overlap(target: float, trees: int, scale: float, vocab: int) -> list[TurnTree]:
    """Draw a forest whose overlap is `target` to about 0.01, reached by the length of the prompt.

    Otherwise as published, divided by `scale`. With a target of 0 trajectories share nothing: trees of one leaf.
    """
    if not target:
        return written_out(random_forest(trees, PUBLISHED.scaled(scale), vocab))
    _, *others = astuple(PUBLISHED.scaled(scale))
    low, high = 1, round(40_000 / scale)

    def grow(prompt: int) -> list[TurnTree]:
        return random_forest(trees, Lengths((prompt, prompt), *others), vocab)

    while low < high:  # overlap grows with the prompt
        middle = (low + high) // 2
        low, high = (middle + 1, high) if overlap(grow(middle)) < target else (low, middle)
    return grow(low)


def tree_of_tokens(tokens: int, vocab: int) -> TurnTree:
    """Draw a published tree, its lengths scaled so that it has about `tokens` unique tokens and not more."""
    scale = random_tree(0, PUBLISHED, vocab).unique_tokens / tokens
    while (tree := random_tree(0, PUBLISHED.scaled(scale), vocab)).unique_tokens > tokens:
        scale *= 1.002
    assign_credit([tree])
    return tree


def star_of_tokens(tokens: int, vocab: int, answers: int = 32) -> TurnTree:
    """Draw one prompt, a third of `tokens`, with answers of equal length, as samplers without a search make them."""
    rng = np.random.default_rng(0)
    length = max(1, 2 * tokens // (3 * answers))
    tree = TurnTree(rng.integers(0, vocab, tokens - answers * length))
    for _ in range(answers):
        leaf = tree.add_turn(0, rng.integers(0, vocab, length), -rng.random(length), None)
        tree.set_reward(leaf, float(rng.integers(0, 2)))
    assign_credit([tree])
    return tree


def written_out(forest: list[TurnTree]) -> list[TurnTree]:
    """Write out the trajectories as trees of one leaf each: what a trainer without prefix sharing sees."""
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
