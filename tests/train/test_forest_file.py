"""Which questions a file of trees has, where a question may have several trees."""

from __future__ import annotations

from atpo_fast.data.questions import Question
from atpo_fast.train.forest_file import _take, _whole_questions
from atpo_fast.train.scoring import ScoredTree
from atpo_fast.tree import TurnTree


# Fails when half of a question's trees are written, and then passed over for good by the command that continues.
def test_questions_are_whole() -> None:
    names = [ScoredTree(Question(id=str(i), text="?", answers=("a",)), TurnTree([1]), []) for i in range(5)]
    finished = [(2, names[0]), (0, names[1]), (1, names[2]), (2, names[3]), (0, names[4])]
    assert _whole_questions(finished, 2) == [names[1], names[4], names[0], names[3]]
    assert _whole_questions(finished[1:3], 1) == [names[1], names[2]]


# Fails when a question that is asked twice is held by the trees of once.
def test_trees_are_counted_by_question() -> None:
    held = {"a": 4, "b": 2}
    assert [_take(held, name, 2) for name in ("a", "b", "a", "b", "c")] == [True, True, True, False, False]
