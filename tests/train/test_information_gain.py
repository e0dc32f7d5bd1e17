"""The gold answer's log-prob after each turn, from one packed forward, is that of each path forwarded by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atpo_fast.packing import spread_rows
from atpo_fast.policy import Policy, score_rows
from atpo_fast.train.information_gain import (
    ANSWER_BEGINS,
    gold_by_turn,
    pack_probes,
    store_gold,
    with_gold_leaves,
)
from atpo_fast.tree import TurnTree
from tests.helpers.policies import make, trees

BEGINS, ANSWERS = [7, 8], {" one": [3], " two words": [4, 5, 6]}


def encode(text: str) -> list[int]:
    return BEGINS if text == ANSWER_BEGINS else ANSWERS[text]


def alone(model: torch.nn.Module, tree: TurnTree, turn: int, gold: list[int]) -> float:
    """Mean log-prob of the gold tokens, by a plain forward of one path, text and answer."""
    ids = torch.tensor([*tree.path_ids(turn).tolist(), *BEGINS, *gold])
    logprob = model(ids[None]).logits[0].log_softmax(-1)
    return float(logprob[-len(gold) - 1 : -1].gather(1, ids[-len(gold) :, None]).mean())


# A row of 24 tokens holds less than a tree, so ancestors are repeated and copies of one tree lie in several rows; two
# ranks score half of the rows each. In float64, as tests/policy/test_policy.py. Fails when an answer sees another's
# tokens, is added to another turn, counts once a rank, or its text before it is scored too.
@pytest.mark.parametrize("row_tokens", [24, 4096])
@torch.no_grad()
def test_one_forward_for_all_turns(row_tokens: int) -> None:
    forest, answers = [*trees(), TurnTree([1, 2])], ["one", "two words", "one"]  # the last tree has no leaf
    policy = Policy(make("qwen3"))
    rows = pack_probes([with_gold_leaves(*pair, encode) for pair in zip(forest, answers, strict=True)], row_tokens)
    assert (len(rows) > 1) == (row_tokens == 24)
    total = torch.zeros(sum(map(len, forest)), dtype=torch.float64)
    for mine in spread_rows(rows, 2):
        total += gold_by_turn(forest, mine, [logprob for logprob, _ in score_rows(policy, mine, torch.device("cpu"))])
    store_gold(forest, total.numpy())
    plain = make("qwen3")
    for tree, answer in zip(forest, answers, strict=True):
        assert tree.gold_logprob is not None
        for n, turn in enumerate(tree.turns):
            if turn.children:
                expected = alone(plain, tree, n, ANSWERS[f" {answer}"])
                assert tree.gold_logprob[n] == pytest.approx(expected, abs=1e-10), (answer, n)
            else:
                assert np.isnan(tree.gold_logprob[n])


def test_only_answers_are_scored() -> None:
    """Fails if the tree's own actions pass the LM head again, or a path that needs a longer row is refused."""
    forest = trees()
    rows = pack_probes([with_gold_leaves(tree, "two words", encode) for tree in forest], 8)
    assert sum(int((row.trajectory_count > 0).sum()) for row in rows) == 3 * sum(
        bool(turn.children) for tree in forest for turn in tree.turns
    )


def test_a_thought_that_the_template_has_begun() -> None:
    """Fails if the text before the answer opens a thought for the second time, after the prompt alone."""
    (tree, *_) = trees()
    coded = {ANSWER_BEGINS: [7, 8], ANSWER_BEGINS.removeprefix("<think>"): [8], " one": [3]}
    probe = with_gold_leaves(tree, "one", coded.__getitem__, "<think>\n")
    begins = [probe.turns[turn.parent] for turn in probe.turns if turn.action_ids.tolist() == [3]]
    assert [turn.observation_ids.tolist() for turn in begins] == [[8], *[[7, 8]] * (len(begins) - 1)]
    assert len(begins) > 1
