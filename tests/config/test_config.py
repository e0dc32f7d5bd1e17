"""Configuration files, overrides and the batch arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atpo_fast.config import (
    Config,
    ConfigError,
    PagedConfig,
    RolloutConfig,
    ServerConfig,
    VLLMConfig,
    dump_config,
    load_config,
    read_deepspeed,
    save_config,
)
from atpo_fast.config.arithmetic import batch_arithmetic, longest_path, minibatches_per_step
from atpo_fast.config.names import KEYS
from atpo_fast.config.renamed import OLD_SECTIONS, RENAMED
from atpo_fast.train.zero import OWNED_KEYS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a YAML file and give its path."""

    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return _write


# --- reading -----------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_file_over_defaults(write: Write) -> None:
    # Fails if overrides are applied before the file, or if a section in the file resets its other keys.
    path = write("train: {steps: 7, save_every: 3}\nseed: 4\n")
    config = load_config(path, ["train.steps=9", "train.steps=11"])
    assert (config.train.steps, config.train.save_every, config.seed) == (11, 3, 4)
    assert config.train.eval_every == Config().train.eval_every


@pytest.mark.parametrize(
    ("text", "value"),
    # The first is text in YAML 1.1, which PyYAML follows; the others guard the new number pattern.
    [("1e-6", 1e-6), ("1E-6", 1e-6), (".5e-3", 5e-4), ("3", 3.0), ("+2.", 2.0), ("0.001", 1e-3)],
)
def test_numbers_as_people_write_them(write: Write, text: str, value: float) -> None:
    assert load_config(write(f"optim: {{lr: {text}}}")).optim.lr == value
    assert load_config(None, [f"optim.lr={text}"]).optim.lr == value


def test_words_that_yaml_1_1_takes_for_booleans_stay_words() -> None:
    # Fails if `off` becomes False, which is no legal value of logging.progress, or `none` becomes null.
    config = load_config(None, ["logging.progress=off", "objective.kl=none", "run_dir=no"])
    assert (config.logging.progress, config.objective.kl, config.run_dir) == ("off", "none", "no")


@pytest.mark.parametrize(("text", "choice"), [("true", "layer"), ("false", "none"), ("mlp", "mlp"), ("none", "none")])
def test_gradient_checkpointing_as_a_word_or_a_boolean(text: str, choice: str) -> None:
    # Fails if true and false, as Hugging Face has them and older recipes too, are refused or mean something else.
    assert load_config(None, [f"model.gradient_checkpointing={text}"]).model.gradient_checkpointing == choice
    with pytest.raises(ConfigError, match="'none', 'layer' or 'mlp'"):
        load_config(None, ["model.gradient_checkpointing=1"])


def test_lists_nulls_and_sections_as_overrides() -> None:
    # Fails if override values are taken as plain text.
    config = load_config(
        None, ["data.train_files=[a.json, b.json]", "rollout.samples_per_tree=null", "train={steps: 2}"]
    )
    assert config.data.train_files == ["a.json", "b.json"]
    assert config.rollout.samples_per_tree is None
    assert config.train.steps == 2


def test_an_empty_section_keeps_its_defaults(write: Write) -> None:
    # Fails if `train:` with nothing under it is an error or None.
    assert load_config(write("seed: 1\ntrain:\n")).train == Config().train


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=1", "unknown key rollout.temprature: did you mean rollout.temperature?"),
        (
            "temperature=1",
            "unknown key temperature: did you mean rollout.temperature or eval.temperature?",
        ),  # no section
        ("lr=1", "unknown key lr: did you mean optim.lr or cold_start.lr?"),  # two candidates: both named
        ("trian.steps=1", "unknown key trian.steps: did you mean train.steps"),  # the section misspelt
        ("seed.x=1", "unknown key seed.x: seed is a value, not a section"),
        ("train=5", "train is a section"),
        ("train.steps", "must look like key=value"),
        ("train.steps=[", "malformed YAML"),
    ],
)
def test_a_bad_override_is_named_with_the_nearest_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        load_config(None, [override])
    assert message in str(caught.value)
    assert override in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 0\nrollout:\n  temprature: 1\n", ["run.yaml:3", "rollout.temprature", "rollout.temperature"]),
        ("train:\n  steps: many\n", ["run.yaml:2", "train.steps='many'", "valid integer"]),  # type
        ("train:\n  steps: 0\n", ["run.yaml:2", "train.steps=0", "greater than or equal to 1"]),  # range
        ("device: tpu\n", ["run.yaml:1", "device='tpu'", "'cpu'"]),  # choice
        ("data:\n  train_files: [1]\n", ["run.yaml:2", "data.train_files=[1]", "valid string"]),  # inside a list
        ("model: {heads: 3, kv_heads: 2}\n", ["run.yaml", "model.heads=3", "model.kv_heads=2"]),  # two keys together
        ("seed: 1\nseed: 2\n", ["run.yaml", "seed is given twice", "line 2"]),  # PyYAML would take the last
        ("seed: 1\n  bad: [\n", ["run.yaml:2", "malformed YAML"]),
        ("", ["run.yaml", "empty"]),
        ("# only a comment\n", ["run.yaml", "empty"]),
        ("- a\n- b\n", ["run.yaml:1", "mapping"]),
        ("train: 5\n", ["run.yaml:1", "train is a section"]),
        ("rollout: {samples_per_tree: none}\n", ["rollout.samples_per_tree='none'", "write null"]),
    ],
)
def test_a_bad_file_is_named_with_line_key_and_value(write: Write, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    for part in parts:
        assert part in str(caught.value)


def test_all_faults_are_listed_at_once(write: Write) -> None:
    # Fails if the first fault hides the others.
    with pytest.raises(ConfigError) as caught:
        load_config(write("train: {steps: 0}\noptim: {lr: fast}\n"))
    assert "train.steps=0" in str(caught.value) and "optim.lr='fast'" in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
        assert str(path) in str(caught.value)


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_legal_short_headed_and_round_trip(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fails when a recipe lags behind the schema, grows, or when what is written cannot be read back.
    monkeypatch.chdir(ROOT)
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert [line.startswith("#") for line in lines[:3]] == [True, True, False]
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert batch_arithmetic(config)


@settings(max_examples=30, deadline=None)
@example(text="1e-6", lr=1e-6, seed=0)
@example(text="\x85", lr=5e-324, seed=0)
@example(text="true", lr=0.1, seed=0)
@example(text="~", lr=1e-5, seed=0)
@example(text="", lr=1e22, seed=0)
@example(text="- a: b #", lr=1 / 3, seed=10**12)
@example(text="12:30", lr=1.0, seed=-1)
@given(text=st.text(max_size=12), lr=st.floats(1e-300, 1e300), seed=st.integers(-(10**12), 10**12))
def test_any_text_and_number_round_trips(
    tmp_path_factory: pytest.TempPathFactory, text: str, lr: float, seed: int
) -> None:
    # Fails if text such as "1e-6", "true", "~", "" or U+0085 is written without quotes, or a float loses digits.
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    sections: dict[str, Any] = {"optim": {"lr": lr}, "data": {"train_files": [text]}}
    config = Config(run_dir=text, seed=seed, **sections)
    save_config(config, path)
    assert load_config(path) == config


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if the file is written in place: a full disk would leave half a configuration.
    path = tmp_path / "c.yaml"
    save_config(Config(seed=1), path)
    before = path.read_text()

    def full_disk(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_config(Config(seed=2), path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


# --- recipes -----------------------------------------------------------------------------------------------------


def test_the_published_hyper_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    # The constants of the published script; fails when the recipe or a default it relies on drifts.
    config = load_config(ROOT / "configs/qwen3_4b_multihop.yaml")
    rollout, train, tools, optim = config.rollout, config.train, config.tools, config.optim
    assert (rollout.initial_chains, rollout.expansion_rounds, rollout.expansions_per_round, rollout.leaves) == (
        10,
        2,
        6,
        22,
    )
    assert (rollout.strategy, rollout.branch_penalty) == ("entropy", 0.05)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_turn_tokens) == (1.0, 1.0, 0, None)
    assert (config.data.max_prompt_tokens, rollout.max_response_tokens) == (2000, 6192)
    assert (train.questions_per_step, train.questions_per_minibatch) == (64, 8)
    assert (train.eval_every, train.save_every, config.ranks) == (20, 50, 8)
    assert (optim.lr, optim.weight_decay, optim.grad_clip, optim.warmup_steps) == (1e-6, 0.01, 1.0, 0)
    assert (tools.builtin, tools.call_limit, tools.retries, tools.calls_per_tool) == (["search", "python"], 6, 3, 32)
    assert (tools.timeout_seconds, tools.top_k, tools.passage_chars) == (120, 3, 1000)
    objective = config.objective
    assert (objective.clip_low, objective.clip_high, objective.aggregation) == (3e-3, 4e-3, "seq-mean-token-mean")
    assert (objective.kl, objective.kl_coef, objective.entropy_coef) == ("none", 0.0, 0.0)
    assert (config.credit.value, config.credit.advantage, config.credit.leaf_norm) == (
        "child_softmax",
        "node_value",
        True,
    )
    assert (config.reward.metric, config.reward.format_penalty, config.reward.tool_bonus) == ("em", -1.0, 0.1)
    assert train.steps == 5 * (90447 // 64)  # 5 epochs of HotpotQA's training questions in full batches


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_files_hold_only_what_deepspeed_owns(path: Path) -> None:
    # Fails if a file sets batch sizes, clipping or precision, which the trainer sets and would refuse here.
    content = json.loads(path.read_text())
    assert content["zero_optimization"]["stage"] == int(path.stem[4])
    assert not set(content) & set(OWNED_KEYS)
    assert ("offload_optimizer" in content["zero_optimization"]) == ("offload" in path.stem)
    assert ("offload_param" in content["zero_optimization"]) == (path.stem == "zero3_offload")


# --- arithmetic --------------------------------------------------------------------------------------------------


def test_batch_arithmetic_of_the_published_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = batch_arithmetic(load_config("configs/qwen3_4b_multihop.yaml"))
    assert "64 questions × 22 leaves = 1408 trajectories, 8 mini-batches of 176" in words
    assert "2000 prompt + 6192 response = 8192 tokens" in words
    assert "7065 steps × 8 mini-batches = 56520 optimizer steps" in words
    assert "ZeRO stage 3" in words and "8 ranks" in words
    assert "warning" not in words


def test_batch_arithmetic_of_chains_and_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if chains are counted as expanded, or singular and plural are mixed up.
    monkeypatch.chdir(ROOT)
    chain = ["rollout.strategy=chain", "rollout.initial_chains=1", "train.questions_per_step=1"]
    words = batch_arithmetic(load_config(None, [*chain, "train.questions_per_minibatch=1"]))
    assert "1 question × 1 leaf = 1 trajectory, 1 mini-batch of 1" in words
    assert "no expansion" in words


def test_warns_of_a_path_that_fits_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "model.max_positions=2048" in batch_arithmetic(load_config(None))


def test_a_row_that_cannot_hold_a_path_is_refused() -> None:
    # Fails if such a run starts and dies in packing, after its first rollout.
    with pytest.raises(ConfigError, match=r"train.row_tokens=8191.* 8192"):
        load_config(None, ["train.row_tokens=8191", "train.prefix_memory_gb=0"])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective.importance_cap=2", "train.old_logprobs=rollout"], "train.old_logprobs=recompute"),
        (["train.max_staleness=1"], "objective.importance_cap"),
        (["train.dynamic_sampling.enabled=true", "train.dynamic_sampling.surplus=keep"], "objective.importance_cap"),
        (["train.max_staleness=1", "train.old_logprobs=rollout", "engine.name=vllm"], "engine.sleep=off"),
    ],
)
def test_importance_weights_go_with_recomputed_log_probs(overrides: list[str], named: str) -> None:
    # Fails if older weights' samples are learned from uncorrected, or a correction that does nothing is accepted.
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(None, overrides)


def test_counts() -> None:
    config = Config()
    assert longest_path(config) == 8192
    assert minibatches_per_step(config) == 8
    assert RolloutConfig(samples_per_tree=5).leaves == 5


def test_a_missing_or_broken_deepspeed_file_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    for text, message in (("{", "not JSON"), ("[]", "JSON object")):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_deepspeed(Config(deepspeed=str(bad)))
    with pytest.raises(ConfigError, match="No such file"):
        read_deepspeed(Config(deepspeed=str(tmp_path / "none.json")))


def test_every_field_is_documented() -> None:
    # Fails if a field is added without its docstring, which `--help` readers and the README rely on.
    sections = {type(getattr(Config(), section.name)) for section in fields(Config)}
    for inner in (*sections, PagedConfig, VLLMConfig, ServerConfig):
        for name, info in getattr(inner, "__pydantic_fields__", {}).items():
            assert info.description, f"{inner.__name__}.{name}"


def test_dump_is_whole() -> None:
    # Fails if the resolved configuration leaves out defaults.
    text = dump_config(Config())
    assert "betas:" in text and "branch_penalty: 0.05" in text


# --- the engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", list(permutations(["engine.name=vllm", "engine.sleep=off", "engine.gpus=[]"])))
def test_options_of_an_engine_in_any_order(overrides: tuple[str, ...]) -> None:
    # Fails if the kind has to be chosen before its options are given.
    engine = load_config(None, overrides).engine
    assert isinstance(engine, VLLMConfig) and engine.sleep == "off"


def test_a_file_without_a_name_is_for_the_engine_that_is_chosen(write: Write) -> None:
    # Fails if options of the default engine need its name, or a file cannot leave the choice to the command line.
    assert load_config(write("engine: {cache_tokens: 100}\n")).engine == PagedConfig(cache_tokens=100)
    config = load_config(write("engine: {sleep: drop}\n"), ["engine.name=vllm"])
    assert isinstance(config.engine, VLLMConfig) and config.engine.sleep == "drop"


def test_another_engine_takes_the_place_of_the_files(write: Write) -> None:
    # Fails if the resolved configuration of one run cannot be used with another engine: it names every option.
    engine: Any = {"name": "vllm", "sleep": "drop"}
    path = write(dump_config(Config(engine=engine)))
    config = load_config(path, ["engine.urls=[http://a]", "engine.name=server"])
    assert isinstance(config.engine, ServerConfig) and config.engine.urls == ["http://a"]
    engine = load_config(path, ["engine.name=vllm"]).engine
    assert engine.sleep == "drop"  # the same engine keeps the file's options


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (
            "seed: 1\n",
            ["engine.gpus=[0]"],
            ["override engine.gpus", "belongs to engine.name=vllm", "is paged"],
        ),
        (
            "engine: {name: vllm, urls: [a]}\n",
            [],
            ["run.yaml:1", "belongs to engine.name=server", "is vllm"],
        ),
        ("engine:\n  name: paged\n  retries: 3\n", [], ["run.yaml:3", "engine.retries", "engine.name=server"]),
        ("seed: 1\n", ["engine.bucket_mb=3"], ["engine.name=vllm or engine.name=server", "engine.name is paged"]),
        ("engine: {name: fast}\n", [], ["run.yaml:1", "engine.name='fast'", "must be one of paged, vllm, server"]),
        ("engine: {name: [vllm]}\n", [], ["run.yaml:1", "must be one of paged, vllm, server"]),
        ("engine: {name: transformers}\n", [], ["transformers is now called paged"]),
        ("engine:\n  name: vllm\n  sleep: never\n", [], ["run.yaml:3", "engine.sleep='never'", "'host'"]),
        ("engine: {name: vllm, gpus: [0]}\n", [], ["run.yaml:1", "engine.gpus=[0]", "valid string"]),
        ("engine: {name: vllm, gpus: ['0']}\n", [], ["engine.placement=own_gpus"]),
        ("engine: {name: server}\n", [], ["needs engine.urls"]),
        ("engine: {name: vllm, gpu: 1}\n", [], ["unknown key engine.gpu: did you mean engine.gpus?"]),
        ("engine: paged\n", [], ["engine is a section"]),
    ],
)
def test_options_of_an_engine_that_is_not_chosen_are_refused(
    write: Write, text: str, overrides: list[str], parts: list[str]
) -> None:
    # Fails if they pass in silence, or the message says neither where they are given nor to which engine they belong.
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("engine", [{"name": "paged"}, {"name": "vllm"}, {"name": "server", "urls": ["http://a"]}])
def test_the_dump_has_the_chosen_engine_only(engine: Any, write: Write) -> None:
    # Fails if options that do nothing are written into a run's configuration, or are read back as an error.
    config = Config(engine=engine)
    text = dump_config(config)
    assert ("gpus" in text, "urls" in text) == (engine["name"] == "vllm", engine["name"] == "server")
    assert load_config(write(text)) == config


# --- renamed keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_old_key_names_the_new_one(old: str, write: Write) -> None:
    # Fails if an old file gets a guess in place of the new name, or a name that does not exist.
    key = f"{old}.steps" if old == "sft" else f"{old}.sleep" if old in OLD_SECTIONS else old
    new = RENAMED[old] + key.removeprefix(old)
    assert new in KEYS
    *sections, last = key.split(".")
    text = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    for where, load in (
        (f"run.yaml:{len(sections) + 1}", lambda: load_config(write(f"{text}{'  ' * len(sections)}{last}: 5\n"))),
        (f"override {key}=5", lambda: load_config(None, [f"{key}=5"])),
    ):
        with pytest.raises(ConfigError) as caught:
            load()
        assert f"{where}: {key} is now {new}" in str(caught.value)


def test_old_engines_and_whole_old_sections(write: Write) -> None:
    # Fails if the user of an old file finds out in three steps what one line could say.
    with pytest.raises(ConfigError, match=r"engine\.name, and its value transformers is now paged"):
        load_config(None, ["rollout.engine=transformers"])
    with pytest.raises(ConfigError, match=r"is now engine\.gpus, together with engine\.name=vllm"):
        load_config(None, ["rollout.vllm={gpus: [a]}"])
    for text in ("sft:\n", "sft: 3\n", "sft: {}\n"):  # no key of it to name
        with pytest.raises(ConfigError, match=r"run\.yaml:1: sft is now cold_start"):
            load_config(write(text))
