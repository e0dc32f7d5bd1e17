"""Optimizer state on disk fits any number of ranks and any ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atpo_fast.common.errors import CheckpointError
from atpo_fast.train.optimizer_state import Piece, StoredState
from tests.helpers.forked_runs import fork_ranks
from tests.helpers.optimizer_states import DTYPES, STAGES, continue_states, write_states


def together(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Put the pieces of a folder together; a hole or an overlap fails."""
    pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        for tensor, values in load_file(path).items():
            name, key, start = tensor.rsplit("|", 2)
            assert int(start) not in pieces.setdefault((name, key), {})
            pieces[name, key][int(start)] = values
    whole: dict[tuple[str, str], Tensor] = {}
    for named, parts in pieces.items():
        ends = [0, *(begin + len(parts[begin]) for begin in sorted(parts))]
        assert ends[:-1] == sorted(parts)
        whole[named] = torch.cat([parts[begin] for begin in sorted(parts)])
    return whole


# Fails when a stage's pieces lie elsewhere in the parameter than is written, padding is taken for values, a moment or
# the master weights are lost (the third step then differs by far more), or ranks write the same piece twice.
@pytest.mark.distributed
def test_any_stage_continues_any_other(tmp_path: Path) -> None:
    fork_ranks(write_states, 2, tmp_path)
    fork_ranks(continue_states, 3, tmp_path)
    checked = 0
    for written in STAGES:
        for dtype in DTYPES:
            stored = together(tmp_path / f"{written}_{dtype}")
            assert len(stored) == (10 if dtype == "float32" else 15)
            after = load_file(tmp_path / f"{written}_{dtype}/after.safetensors")
            for folder in tmp_path.glob(f"found_{written}_{dtype}_*"):
                found = together(folder)
                assert found.keys() == stored.keys()
                assert all(torch.equal(found[key], values) for key, values in stored.items()), folder
                # the sum of 3 equal gradients divided by 3 may differ by a rounding, and so may what follows from it
                bound = 2**-20 if dtype == "float32" else 2**-7
                for name, value in load_file(folder / "after.safetensors").items():
                    torch.testing.assert_close(value, after[name], rtol=bound, atol=bound, msg=f"{folder} {name}")
                checked += 1
    assert checked == len(STAGES) * len(DTYPES) * len(STAGES)


# Fails when a stretch that no file holds is filled with whatever is there.
def test_what_is_missing_is_named(tmp_path: Path) -> None:
    save_file({"a|exp_avg|0": torch.arange(3.0), "a|exp_avg|5": torch.arange(3.0)}, tmp_path / "rank_0.safetensors")
    stored = StoredState([tmp_path / "rank_0.safetensors"])
    assert stored.read(Piece("a", 1, 2), "exp_avg").tolist() == [1, 2]
    with pytest.raises(CheckpointError, match="exp_avg of a from element 3 on"):
        stored.read(Piece("a", 1, 5), "exp_avg")
    with pytest.raises(CheckpointError, match="another model"):
        stored.read(Piece("b", 0, 1), "exp_avg")
    (tmp_path / "rank_1.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="rank_1"):
        StoredState([tmp_path / "rank_1.safetensors"])
