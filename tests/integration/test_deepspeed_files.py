"""The DeepSpeed files of the repository: DeepSpeed takes them, and ZeRO++ learns what ZeRO-3 does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.helpers.runs import records, run, write_config

FILES = Path(__file__).resolve().parents[2] / "configs/deepspeed"


@pytest.mark.parametrize("path", sorted(FILES.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_takes_the_file(path: Path) -> None:
    """Fails if a key is misspelt or no longer exists: DeepSpeed forbids those that it does not know."""
    zero = json.loads(path.read_text())["zero_optimization"]
    config = DeepSpeedZeroConfig(**zero)
    assert int(config.stage) == int(path.stem[4])
    assert {key for key in zero if key.startswith("offload")} <= set(config.model_dump(exclude_none=True))


@pytest.mark.distributed
def test_secondary_partitions_learn_as_zero_3_does(tmp_path: Path) -> None:
    """Fails if weights gathered from the partitions of a node differ, or weights do not reach engine and checkpoint.

    The quantised half of ZeRO++ (zero3_plus.json) needs kernels for a GPU.
    """
    config = write_config(tmp_path)
    file = tmp_path / "hpz.json"
    content = json.loads((FILES / "zero3_hpz.json").read_text())
    content["zero_optimization"]["zero_hpz_partition_size"] = 2  # of the ranks here
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file.write_text(json.dumps(content))
    common = ("ranks=2", "train.steps=2", "model.dtype=bfloat16", "cold_start.steps=4", "world.eval_questions=2")
    run(config, *common, f"deepspeed={file}")
    found = records(tmp_path / "run", "train")
    run(config, *common, f"run_dir={tmp_path / 'plain'}")
    plain = records(tmp_path / "plain", "train")
    assert found.keys() == plain.keys() == {1, 2}
    for step, record in plain.items():
        assert found[step]["policy/loss"] == record["policy/loss"]
        assert found[step]["policy/grad_norm"] == record["policy/grad_norm"]
