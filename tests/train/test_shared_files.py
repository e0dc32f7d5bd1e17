"""What ranks must share is checked before anything expensive (docs/several_machines.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from atpo_fast.config import Config, load_config
from tests.helpers.forked_runs import fork_ranks
from tests.helpers.runs import write_config

pytestmark = pytest.mark.distributed


def check_each_difference(config: Config, folder: Path) -> None:
    """In each of two ranks: equal ones pass, also on nodes of unequal size; every difference is named on both."""
    from atpo_fast.task import load_task
    from atpo_fast.train.shared_files import check_shared_files
    from atpo_fast.train.zero import join_process_group

    join_process_group(cuda=False)
    second = dist.get_rank() == 1
    task = load_task(config)
    check_shared_files(replace(config, ranks=2 - second), task, folder)
    dist.barrier()  # rank 0 removes its mark when all have seen it, and the others do not wait for that
    assert list(folder.glob(".shared-*")) == []
    dist.barrier()  # rank 0 leaves the next mark when all have looked
    other = folder / "other"
    model = folder / f"model{dist.get_rank()}"
    model.mkdir()
    (model / "config.json").write_text("{}" if second else "{ }")
    with_model = replace(config, model=replace(config.model, path=str(model)))
    questions = replace(task, train=task.train[:-1])
    cases = {
        "configuration on": (replace(config, seed=int(second)), task, folder),
        "run folder on": (config, task, other if second else folder),
        "model on": (with_model, task, folder),
        "questions on": (config, questions if second else task, folder),
    }
    for expected, case in cases.items():
        with pytest.raises(ValueError, match=rf"{expected} \S+ \(rank 1\)"):
            check_shared_files(*case)


# Each would be noticed by nobody until the losses are wrong or the run is resumed.
def test_each_difference_is_named_on_every_rank(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    (tmp_path / "run").mkdir()
    fork_ranks(check_each_difference, 2, config, tmp_path / "run")
