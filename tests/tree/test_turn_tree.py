"""The search tree: structure, counts and errors (docs/design.md#tree)."""

from __future__ import annotations

import subprocess
import sys
from math import nan

import pytest

import atpo_fast
from atpo_fast import TurnTree
from atpo_fast.tree import overlap
from atpo_fast.tree.forest import as_forest


def forked() -> TurnTree:
    """prompt 3; a 2+1 with leaves b 1 and c 2; leaf d 4."""
    tree = TurnTree([1, 2, 3], question_id="q")
    a = tree.add_turn(0, [4, 5], [-1.0, -3.0], [6], tool="search")
    tree.add_turn(a, [7])
    tree.add_turn(a, [8, 9])
    tree.add_turn(0, [4, 4, 4, 4])
    return tree


def test_structure() -> None:
    tree = forked()
    assert tree.leaves == [2, 3, 4]
    assert tree.path(3) == [0, 1, 3]
    assert tree.path_ids(3).tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert tree.turns[1].nll == 2.0
    assert tree.turns[0].nll == 0.0


def test_appended_tokens_have_no_part_in_the_entropy_estimate() -> None:
    # Fails if the NaN of a token that was not sampled reaches credit, in a tree or in a batch's table.
    tree = TurnTree([1, 2])
    tree.add_turn(0, [3, 4, 5], [-1.0, -3.0, nan], [6])
    tree.add_turn(1, [7], [nan])
    assert [turn.nll for turn in tree.turns] == as_forest([tree]).nll.tolist() == [0.0, 2.0, 0.0]


# unique 3 + 3 + 1 + 2 + 4 = 13; flat (3+3+1) + (3+3+2) + (3+4) = 22; with c twice 30 and 4 trajectories.
def test_counts() -> None:
    tree = forked()
    assert (tree.unique_tokens, tree.flat_tokens, tree.num_trajectories) == (13, 22, 3)
    assert overlap([tree]) == 1 - 13 / 22
    tree.set_multiplicity(3, 2)
    assert (tree.unique_tokens, tree.flat_tokens, tree.num_trajectories) == (13, 30, 4)
    assert overlap([]) == 0.0
    assert (TurnTree([1]).flat_tokens, TurnTree([1]).leaves) == (0, [])


def test_errors_name_the_tree() -> None:
    tree = forked()
    with pytest.raises(IndexError, match=r"'q'.*parent 9"):
        tree.add_turn(9, [1])
    with pytest.raises(ValueError, match=r"'q'.*2 action tokens.*1 log-prob"):
        tree.add_turn(0, [1, 2], [0.0])
    with pytest.raises(ValueError, match=r"'q'.*turn 1 is not a leaf"):
        tree.set_reward(1, 1.0)
    with pytest.raises(ValueError, match=r"'q'.*multiplicity"):
        tree.set_multiplicity(2, 0)
    with pytest.raises(ValueError, match=r"'q'.*children"):
        tree.set_observation(1, [1])


# Fails when importing the package pulls in torch, or a public name cannot be imported.
def test_importing_the_package_is_cheap_and_complete() -> None:
    code = "import sys, atpo_fast; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names: dict[str, object] = {}
    exec("from atpo_fast import *", names)
    assert names.keys() >= {
        *atpo_fast.__all__,
        "TurnTree",
        "assign_credit",
        "pack_trees",
        "Objective",
        "from_trajectories",
    }
