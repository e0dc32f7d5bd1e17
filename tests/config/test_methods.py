"""Methods by name, and files that depart from others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from atpo_fast.commands.cli import main
from atpo_fast.common.choices import MethodName, Preset
from atpo_fast.common.presets import PRESETS
from atpo_fast.config import Config, ConfigError, dump_config, load_config
from atpo_fast.config.arithmetic import method_lines
from atpo_fast.config.method_table import HEADINGS, method_rows
from atpo_fast.config.methods import METHODS, setting
from atpo_fast.config.names import KEYS

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_loads_and_sets_what_it_says() -> None:
    # Fails if a method is missing in one of the lists, sets a key that does not exist, or is refused by a check.
    assert tuple(METHODS) == get_args(MethodName) and tuple(PRESETS) == get_args(Preset)
    for name, method in METHODS.items():
        assert set(method.settings) <= set(KEYS) and method.source
        config = load_config(None, [f"method={name}"])
        assert {key: setting(config, key) for key in method.settings} == method.settings


def test_the_default_method_is_what_the_sections_default_to() -> None:
    # Fails if a configuration without `method` says that it follows a method which its sections do not follow.
    assert load_config(None) == Config()
    assert len(method_lines(Config())) == 2  # its source, what differs; no departure


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_method_stands_over_the_file_and_under_the_other_overrides(tmp_path: Path) -> None:
    # Fails if what the file says about its own method outvotes one given by hand (a clip range of turns for tokens), if
    # the method outvotes what was given beside it, or takes away what is no matter of methods.
    text = "method: at2po\nrollout: {initial_chains: 6, top_p: 0.9}\ncredit: {value: leaf_mean}\n"
    path = write(tmp_path / "a.yaml", text + "objective: {preset: at2po, clip_low: 3e-3}\n")
    config = load_config(path, ["objective.clip_high=0.1", "method=grpo", "credit.method=rloo"])
    assert (config.objective.preset, config.objective.clip_low, config.objective.clip_high) == ("grpo", None, 0.1)
    assert (config.credit.method, config.credit.value) == ("rloo", "child_softmax")
    assert (config.rollout.strategy, config.rollout.initial_chains, config.rollout.top_p) == ("chain", 16, 0.9)
    config = load_config(write(tmp_path / "b.yaml", "objective: {preset: sapo}\nmethod: grpo\n"))
    assert (config.objective.preset, config.rollout.strategy) == ("sapo", "chain")


def test_a_second_method_takes_back_what_the_first_set(tmp_path: Path) -> None:
    # Fails if settings of the file's method stay when another is given: then `method=` would mean different things.
    path = write(tmp_path / "a.yaml", "method: react\n")
    assert load_config(path).rollout.initial_chains == 1
    assert load_config(path, ["method=at2po"]).rollout == Config().rollout


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    # Fails if the method in a run's config.yaml outvotes the keys that were given beside it.
    config = load_config(None, ["method=tree_grpo", "credit.method=grpo"])
    assert load_config(write(tmp_path / "config.yaml", dump_config(config))) == config


def test_departures_are_told() -> None:
    # Fails if a run leaves its method without a word, or without the name of the method that it amounts to.
    def told(*overrides: str) -> str:
        return method_lines(load_config(None, overrides))[-1]

    assert "but with credit.method=rloo: no method" in told("credit.method=rloo")
    words = "rollout.strategy=chain", "credit.method=rloo", "objective.preset=ppo"
    assert told(*words).endswith("this is what method=rloo sets")
    assert "but with" not in told("method=rloo", "rollout.initial_chains=4")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_published_run(name: str) -> None:
    # Fails if a recipe leaves its method, or keeps the shape or the clip range that its base has for another one.
    path = ROOT / "configs" / "methods" / f"{name}.yaml"
    config = load_config(path)
    assert config.method == name and not any("but with" in line for line in method_lines(config))
    assert {key: setting(config, key) for key in METHODS[name].settings} == METHODS[name].settings
    lines = path.read_text().splitlines()
    assert len(lines) <= 30 and [line[0] for line in lines[:3]] == ["#", "#", "b"]


def test_unknown_methods_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"method='grop': .*'grpo'"):
        load_config(None, ["method=grop"])


def test_a_file_departs_from_its_base(tmp_path: Path) -> None:
    # Fails if a base outvotes the file, is looked for beside the working directory, or its method the file's.
    (tmp_path / "deep").mkdir()
    write(tmp_path / "root.yaml", "method: gspo\ntrain: {steps: 7, save_every: 3}\nseed: 4\n")
    write(tmp_path / "middle.yaml", "base: root.yaml\ntrain: {steps: 8}\n")
    path = write(tmp_path / "deep" / "leaf.yaml", "base: ../middle.yaml\nmethod: sapo\n")
    config = load_config(path, ["train.save_every=5"])
    assert (config.train.steps, config.train.save_every, config.seed) == (8, 5, 4)
    assert config.objective.preset == "sapo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml\n", r"a\.yaml:1: base=none\.yaml: there is no such file"),
        ("base: a.yaml\n", "is its own base"),
        ("base: 3\n", r"a\.yaml:1: base=3: must be the path"),
    ],
)
def test_bad_bases_are_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path / "a.yaml", text))


def test_the_verb_prints_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    # Fails if a method or its source is left out of the table.
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == list(HEADINGS)
    for line, row in zip(lines[1:], method_rows(), strict=False):
        assert re.split(r"\s{2,}", line) == list(row)
    text = " ".join(" ".join(lines).split())
    assert all(" ".join(method.source.split()) in text for method in METHODS.values())
