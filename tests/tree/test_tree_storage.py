"""Search trees on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_fast.common.jsonl import append_records
from atpo_fast.tree.storage import (
    ACTION_CHARS,
    append_forest,
    read_forest,
    read_trees,
    tree_from_json,
    tree_record,
    tree_to_json,
)
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.stored_trees import Letters, assert_equal, encode, make_tree


@pytest.mark.parametrize("scored", [False, True])
def test_round_trip_is_lossless(tmp_path: Path, scored: bool) -> None:
    # fails if a field is forgotten, a float rounded, or -inf, nan (leaf credit) or a lone surrogate breaks the file
    tree = make_tree()
    if scored:
        tree.values = np.array([0.1, 1 / 3, 1.0, -1.0, 0.0])
        tree.advantages = tree.values.copy()
        tree.leaf_advantages = np.array([math.nan, math.nan, 1.0, -1.0, 0.0])
        tree.clip_low, tree.clip_high = np.array([math.nan, 0.1, 0.2, 1 / 3, 0.0]), np.full(5, 0.1)
    append_forest(tmp_path / "forest.jsonl", [tree, tree])
    append_forest(tmp_path / "forest.jsonl", [tree])
    trees = read_forest(tmp_path / "forest.jsonl")
    assert len(trees) == 3
    for again in trees:
        assert_equal(tree, again)


def test_damaged_tree_is_named() -> None:
    # fails if a tree that lost a field or a token comes back as a different tree, or without saying which it was
    for damage in ("missing", "short", "scores", "reward"):
        data = json.loads(json.dumps(tree_to_json(make_tree())))
        if damage == "missing":
            del data["turns"][1]["action_ids"]
        elif damage == "short":
            data["turns"][1]["logprobs"].pop()
        elif damage == "scores":
            data["values"] = [0.0]
        else:
            data["turns"][1]["reward"] = 1.0  # not a leaf
        with pytest.raises(ValueError, match="'q1'"):
            tree_from_json(data)


def written(folder: Path, tree: TurnTree, step: int = 1) -> dict[str, Any]:
    """The record of a tree, from its file."""
    append_records(folder / "trees.jsonl", [tree_record(tree, step, Letters())])
    return read_trees(folder / "trees.jsonl")[0]


def test_readable_record(tmp_path: Path) -> None:
    # fails if text is decoded from the wrong tokens or a number belongs to another turn
    tree = make_tree()
    tree.values = np.arange(5.0, dtype=np.float64)
    tree.advantages = np.arange(5.0, dtype=np.float64) - 2
    record = written(tmp_path, tree, step=4)
    assert record["question_id"] == "q1" and record["step"] == 4 and record["meta"]["question"] == "Who?"
    root, search, good, bad, failed = record["turns"]
    assert root["observation"] == "Who?" and root["parent"] == -1 and root["nll"] is None
    assert search == {
        "parent": 0,
        "text": "<search>x</search>",
        "observation": "<r>é</r>",
        "action_tokens": 18,
        "observation_tokens": 8,
        "nll": 0.5,
        "tool": "search",
        "finish_reason": "stop",
        "value": 1.0,
        "advantage": -1.0,
        "reward": None,
        "step_reward": None,
        "score": None,
        "multiplicity": 1,
    }
    assert (good["reward"], good["finish_reason"], bad["multiplicity"]) == (1.0, "eos", 3)
    assert failed["text"] == "" and failed["nll"] == 0.0


def test_trajectory_credit_is_shown_on_leaves_only(tmp_path: Path) -> None:
    # fails if inner turns show an advantage they do not have
    tree = make_tree()
    tree.leaf_advantages = np.array([math.nan, math.nan, 1.0, -1.0, 0.5])
    turns = written(tmp_path, tree)["turns"]
    assert [turn["advantage"] for turn in turns] == [None, None, 1.0, -1.0, 0.5]


def test_long_text_is_cut_in_the_middle(tmp_path: Path) -> None:
    # fails if a runaway turn fills the disk, or if the cut hides how the turn ended
    tree = TurnTree(encode("Q"), question_id="q")
    tree.add_turn(0, encode("a" * ACTION_CHARS + "THE END"))
    text = written(tmp_path, tree)["turns"][1]["text"]
    assert text.endswith("THE END") and "7 characters cut" in text and len(text) < ACTION_CHARS + 100
