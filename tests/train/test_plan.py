"""The plan of a training: its memory beside what is really held, what fits, and times from an earlier run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from atpo_fast.commands.cli import main
from atpo_fast.common.errors import InputError
from atpo_fast.config import Config, load_config, save_config
from atpo_fast.train.plan import MemoryPlan, ModelSize, model_size, parse_memory, plan_memory
from atpo_fast.train.plan.advice import advise
from atpo_fast.train.plan.memory import LAYERS, ROLLOUT, STEP
from atpo_fast.train.plan.records import read_measured, step_time
from bench.systems.memory import BOUND

ROOT = Path(__file__).resolve().parents[2]
QWEN3_4B = [
    "model.hidden_size=2560",
    "model.intermediate_size=9728",
    "model.layers=36",
    "model.heads=32",
    "model.kv_heads=8",
    "model.head_dim=128",
    "model.vocab_size=151936",
    "model.gradient_checkpointing=layer",
    "data.source=files",
    "data.train_files=[a.jsonl]",
    "data.eval_files=[a.jsonl]",
    "data.max_prompt_tokens=2000",
    "rollout.max_response_tokens=6192",
    "train.row_tokens=32768",
]


def large(*more: str, stage: str = "zero3") -> Config:
    """The configuration of a model with the sizes of Qwen3-4B."""
    return load_config(None, [*QWEN3_4B, f"deepspeed={ROOT}/configs/deepspeed/{stage}.json", *more])


@cache
def large_size() -> ModelSize:
    """The sizes of the model of every `large` configuration: what differs between them is no size of a model."""
    return model_size(large())


def plan(config: Config, ranks: int = 8) -> MemoryPlan:
    """Plan the memory of a `large` configuration."""
    return plan_memory(config, large_size(), ranks=ranks, dtype="bfloat16", on_gpu=True)


def part(found: MemoryPlan, name: str) -> float:
    return sum(component.bytes for component in found.components if component.name == name)


def test_the_record_is_within_its_bound() -> None:
    """Fails if the committed comparison is not of all stages and both numbers of ranks, or beyond 15 %."""
    record = json.loads((ROOT / "bench/results/cpu/memory_plan.json").read_text())
    assert {(case["stage"], case["ranks"]) for case in record["cases"]} == {(s, r) for s in range(4) for r in (1, 2)}
    assert all(abs(case["ratio"] - 1) <= BOUND for case in record["cases"])


@pytest.mark.parametrize(("stage", "shares"), [("zero0", 1), ("zero1", 1), ("zero2", 1), ("zero3", 8)])
def test_zero_divides_the_states(stage: str, shares: int) -> None:
    """Fails if a stage divides what it does not, or the wrong bytes are counted for a parameter."""
    config = large(stage=stage)
    count, found, number = large_size().parameters, plan(config), int(stage[-1])
    assert part(found, "weights") == 2 * count / shares
    assert part(found, "gradients") == 2 * count / (8 if number >= 2 else 1)
    for name, size in (("master weights", 4), ("moments of AdamW", 8)):
        assert part(found, name) == size * count / (8 if number >= 1 else 1)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    found = plan(large(stage="zero3_offload"))
    assert found.during(STEP, on_host=True) > 12 * large_size().parameters / 8
    assert found.peak < plan(large()).peak


def test_checkpointing_keeps_a_row_small() -> None:
    """Fails if checkpointed layers are counted as if all were kept, or rows and tokens are not proportional."""
    kept, none = plan(large()), plan(large("model.gradient_checkpointing=none"))
    assert part(none, "activations of a row") > 10 * part(kept, "activations of a row")
    half = plan(large("train.row_tokens=16384"))
    assert part(half, "activations of a row") * 2 == part(kept, "activations of a row")


def test_adapters_train_little_and_need_no_reference() -> None:
    """Fails if LoRA's optimizer is counted for all weights, or its reference policy as a copy."""
    kl = ("objective.preset=grpo", "objective.kl=k3", "objective.kl_coef=0.1")
    lora = plan(large(*kl, "model.lora.rank=16"))
    whole = plan(large(*kl))
    assert part(lora, "moments of AdamW") < part(whole, "moments of AdamW") / 50
    assert part(lora, "reference policy") == 0 < part(whole, "reference policy")


def test_the_cache_belongs_to_the_rollout_unless_the_engine_samples_ahead() -> None:
    found = plan(large("engine.cache_tokens=10000"))
    cache = part(found, "engine: cache of keys and values")
    assert cache == 10000 * 36 * 2 * 8 * 128 * 2
    ahead = plan(large("engine.cache_tokens=10000", "train.max_staleness=1", "train.old_logprobs=rollout"))
    assert ahead.during(LAYERS) > found.during(LAYERS) + cache
    assert ahead.during(ROLLOUT) == found.during(ROLLOUT)


def test_advice_fits_and_names_only_what_helps() -> None:
    """Fails if a change is told that does nothing, or what is told does not fit when it is made."""
    config = large("model.gradient_checkpointing=none", stage="zero0")
    plan_of = partial(plan, ranks=8)
    found = advise(config, plan_of, 40e9)
    assert found.plan is not None and found.plan.peak <= 40e9
    assert found.changes[0] == "model.gradient_checkpointing=layer" and any("cache" in c for c in found.changes)
    assert not any("offload" in change for change in found.changes)
    changed = load_config(None, [*QWEN3_4B, *found.changes])
    assert plan(changed) == found.plan
    assert advise(config, plan_of, 1e15).changes == ()
    assert advise(config, plan_of, 1e9).plan is None


def test_a_step_like_that_of_an_earlier_run(tmp_path: Path) -> None:
    """Fails if the step that warms up counts, or times do not follow tokens, parameters and ranks."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["ranks=2"])
    save_config(config, tmp_path / "config.yaml")
    steps = [
        {"phase": "train", "step": n, "time/update": u, "time/rollout": 4.0, "time/total": u + 5.0}
        | {"tokens/trained": 100.0, "tokens/decoded": 50.0}
        for n, u in enumerate((100.0, 2.0, 4.0), start=1)
    ]
    lines = [{"phase": "eval", "step": 0}, *steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    like, size = read_measured(tmp_path), model_size(config)
    same = step_time(like, config, size, ranks=2)
    assert (same.update, same.rollout, same.rest, same.trained) == (3.0, 4.0, 1.0, 100.0)
    questions = replace(config, train=replace(config.train, questions_per_step=64))
    wider = step_time(like, questions, replace(size, parameters=3 * size.parameters), ranks=4)
    assert (wider.update, wider.rest, wider.decoded) == (9.0, 1.0, 100.0)
    with pytest.raises(InputError, match="no metrics"):
        read_measured(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "size"), [("80G", 80e9), ("1.5GB", 1.5e9), ("2GiB", 2**31), ("500M", 5e8)])
def test_sizes(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "G", "-1G", "lots"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--memory="):
        parse_memory(text)


def test_the_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the verb does not say by component what a run takes, whether it fits and what to change."""
    monkeypatch.chdir(ROOT)
    words = ["plan", "--config", "configs/quickstart.yaml", "--ranks", "2"]
    assert main([*words, "--memory", "80G"]) == 0
    text = capsys.readouterr().out
    assert "moments of AdamW" in text and "fits 80.0 GB a device" in text
    assert main([*words, "--memory", "1G", "train.row_tokens=65536"]) == 0
    assert "does NOT fit" in capsys.readouterr().out
    assert main([*words, "--memory", "much"]) == 2
