"""Configurations of any text: a configuration that is saved and read back equal, or one error per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.common.errors import ConfigError
from atpo_fast.config import load_config, save_config
from atpo_fast.config.load import dump_config, read_deepspeed
from atpo_fast.config.names import KEYS
from tests.helpers.fuzzing import FUZZ, damaged, values

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = (ROOT / "configs" / "quickstart.yaml").read_bytes()
NAMES = sorted(KEYS)
PIECES = [
    *("!!int", "!!float", "!!bool", "!!binary", "!!timestamp", "!!set", "!!omap", "!!pairs", "!!str", "!!null"),
    *("!x", "&a", "*a", "<<:", "? ", ": ", "- ", "[", "]", "{", "}", ",", "|", ">", "'", '"', "#", "\n", "  ", "---"),
    *("1", "-1", "abc", "null", "~", "2026-11-30", "1e-6", ".inf", "0x1", "seed", "data", "engine", "name", "paged"),
]


def check(folder: Path, load: Any) -> None:
    try:
        config = load()
    except ConfigError as error:
        assert str(error).strip() and all(len(line) < 2000 for line in str(error).splitlines())
        return
    save_config(config, folder / "saved.yaml")
    assert dump_config(load_config(folder / "saved.yaml")) == dump_config(config)


@FUZZ
@given(st.sampled_from(NAMES), st.lists(st.sampled_from(PIECES), max_size=6), st.sampled_from(["", " "]))
def test_overrides(tmp_path: Path, name: str, pieces: list[str], between: str) -> None:
    """Fails if a value of the wrong kind, or no YAML at all, ends in an error that is not the project's."""
    check(tmp_path, lambda: load_config(None, [f"{name}={between.join(pieces)}"]))


@FUZZ
@given(st.sampled_from(NAMES), values(["command", "url", "env", "headers", "name", "tools"]))
def test_values_of_any_type(tmp_path: Path, name: str, value: Any) -> None:
    """Fails if a key accepts what it cannot save, or refuses it in a traceback."""
    text = yaml.safe_dump({"x": value}, allow_unicode=False).partition("x:")[2].strip()
    path = tmp_path / "given.yaml"
    outer, dot, inner = name.rpartition(".")
    indented = text.replace("\n", "\n    ")
    path.write_text(f"{outer}:\n  {inner}: {indented}\n" if dot else f"{name}: {indented}\n", encoding="utf-8")
    check(tmp_path, lambda: load_config(path))


@FUZZ
@given(damaged(QUICKSTART))
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    """Fails if a damaged file ends in an error that is not the project's."""
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    check(tmp_path, lambda: load_config(path))


@FUZZ
@given(st.one_of(st.binary(max_size=30), damaged(b'{"zero_optimization": {"stage": 3}}'), st.just(b"[" * 9999)))
def test_deepspeed_files(tmp_path: Path, content: bytes) -> None:
    """Fails if the JSON of DeepSpeed ends in another error."""
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_deepspeed(load_config(None, [f"deepspeed={path}"])), dict)
    except ConfigError as error:
        assert "ds.json" in str(error)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=!!int abc", "seed: not a value of its YAML type: invalid literal for int"),
        ("seed=!!bool 7", "seed: not a value of its YAML type"),
        ("seed=!!timestamp x", "seed: not a value of its YAML type"),
        ("seed=" + "[" * 1000, "nested too deeply"),  # beyond 1024 the YAML library takes ten times as long
        ("data.train_files=[&a [*a]]", "more than 10,000 parts"),
        ("engine=&a {name: *a}", "more than 10,000 parts"),
        ("seed=!!binary 3", "malformed YAML"),
        ("seed=" + "9" * 5000, "seed"),
    ],
)
def test_findings(override: str, words: str) -> None:
    """Fails if one of the values that once ended in a traceback does so again, or its error fills the screen."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert words in str(caught.value) and len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
