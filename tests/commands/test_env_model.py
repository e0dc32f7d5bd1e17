"""`atpo-fast env --model FOLDER` says by layer what trees run through."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import FalconH1Config

from atpo_fast.commands.cli import main
from tests.helpers.families import FAMILIES, WINDOW


def test_every_layer_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a window, a layer with a state or an unsupported layer is not told apart, or the exit code is wrong."""
    for name, expected in (
        ("gemma3", f"layer 0   attention over a window of {WINDOW}\n  layer 1   full attention"),
        ("qwen3_5", "layer 0   a layer with a state\n  layer 1   full attention"),
    ):
        FAMILIES[name].config().save_pretrained(tmp_path / name)
        assert main(["env", "--model", str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out
        assert expected in printed and "trees run through every layer" in printed
    FalconH1Config(num_hidden_layers=2).save_pretrained(tmp_path / "falcon")
    assert main(["env", "--model", str(tmp_path / "falcon")]) == 1
    printed = capsys.readouterr().out
    assert "layer 1   hybrid: not supported on trees" in printed
    assert "BAD  layers 0-1 of type hybrid: not supported on trees" in printed
    assert main(["env", "--model", str(tmp_path)]) == 2
    assert "no config.json there" in capsys.readouterr().err
