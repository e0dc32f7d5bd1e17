"""Files of search trees, damaged: read, or refused by an error that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.tree.storage import append_forest, read_forest, read_trees, tree_from_json, tree_to_json
from tests.helpers.fuzzing import FUZZ, changed, damaged, values
from tests.helpers.stored_trees import Letters, make_tree

GOOD = tree_to_json(make_tree())
KEYS = [*GOOD, *GOOD["turns"][1]]


@FUZZ
@given(st.one_of(changed(GOOD, KEYS), values(KEYS)))
def test_any_record(value: Any) -> None:
    """Fails if a record ends in another error, or becomes a tree that does not keep the form of one."""
    try:
        tree = tree_from_json(value)
    except ValueError as error:
        assert "not a stored search tree" in str(error)
        return
    assert all(0 <= turn.parent < number for number, turn in enumerate(tree.turns) if number)
    assert tree_from_json(tree_to_json(tree)).question_id == tree.question_id


@pytest.mark.parametrize("name", ["forest.jsonl", "forest.parquet"])
@FUZZ
@given(st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """Fails if a damaged file of trees ends in another error than the one that names what cannot be read."""
    path = tmp_path_factory.mktemp("trees") / name
    append_forest(path, [make_tree(), make_tree()], Letters())
    file = path if path.is_file() else next(path.glob("part-*"))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    for read in (read_forest, read_trees) if path.is_file() else (read_forest,):
        try:
            read(path)  # type: ignore[operator]
        except ValueError as error:
            assert Path(name).stem in str(error) or "not a stored search tree" in str(error)
