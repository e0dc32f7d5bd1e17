"""LoRA adapters in the engines: merged into their weights, or beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from atpo_fast.adapters import AdapterSettings, adapter_weights, add_adapters, whole_weights
from atpo_fast.config import Config, LoRAConfig, PagedConfig
from atpo_fast.engines import make_engine
from atpo_fast.engines.paged.engine import PagedEngine
from tests.helpers.adapters import wake_adapters
from tests.helpers.engine_requests import VOCABULARY, check_logprobs, grow, roots
from tests.helpers.policies import make
from tests.helpers.small_tokenizers import numbered

SETTINGS = AdapterSettings(rank=3, alpha=7.0)


def adapted(*, awake: bool) -> Any:
    model = add_adapters(make("llama"), SETTINGS, seed=0).eval()
    if awake:
        wake_adapters(model)
    return model


# Fails if an adapter is left out of prefill or decode, stays as it was before an update, or is merged twice; or if a
# token of a tree is forwarded more than once.
@pytest.mark.parametrize("held", [True, False])
def test_the_engine_writes_with_the_policys_adapters(held: bool) -> None:
    engine = PagedEngine(adapted(awake=False) if held else make("llama"), numbered(VOCABULARY), cache_tokens=5000)
    assert engine.holds_adapters == held
    first = roots(2)
    grow(engine, first, rounds=1)
    check_logprobs(make("llama").eval(), first, 1e-9)
    policy = adapted(awake=True)
    weights = adapter_weights(policy) if held else whole_weights(policy)
    engine.update_weights((weight.name, weight.make().clone()) for weight in weights)
    for tree in range(len(first)):
        engine.release(f"t{tree}")
    before, trees = engine.counters.prefilled_tokens, roots(2)
    grow(engine, trees, rounds=1)
    check_logprobs(policy, trees, 1e-9)
    assert engine.counters.prefilled_tokens - before == sum(tree.unique_tokens for tree in trees)
    differ = [a.logprobs.tolist() != b.logprobs.tolist() for a, b in zip(first[0].turns, trees[0].turns, strict=False)]
    assert any(differ)


# Fails if an engine goes on with a part of the old adapters, or takes the weights below them, which it would not use.
def test_wrong_adapters_are_refused() -> None:
    engine = PagedEngine(adapted(awake=False), numbered(VOCABULARY), cache_tokens=5000)
    weights: list[tuple[str, Tensor]] = [
        (weight.name, weight.make()) for weight in adapter_weights(adapted(awake=True))
    ]
    with pytest.raises(ValueError, match=r"lack 1 parameters: model\.layers\.1\.mlp\.down_proj\.lora_B"):
        engine.update_weights(weights[:-1])
    with pytest.raises(KeyError, match=r"no parameter 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        engine.update_weights([("model.layers.0.self_attn.q_proj.weight", torch.zeros(32, 32)), *weights])


# Fails if a bfloat16 engine gets merged weights, which small adapters do not change: the policy would move alone.
@pytest.mark.parametrize(
    ("dtype", "in_engine", "held"),
    [
        ("bfloat16", "auto", True),
        ("float32", "auto", False),
        ("float32", "adapters", True),
        ("bfloat16", "merged", False),
    ],
)
def test_what_the_configured_engine_holds(
    dtype: Literal["bfloat16", "float32"], in_engine: Literal["auto", "merged", "adapters"], held: bool, tmp_path: Path
) -> None:
    tokenizer = numbered(VOCABULARY)
    make("llama").save_pretrained(tmp_path)
    config = Config(engine=PagedConfig(cache_tokens=1000))
    lora = LoRAConfig(rank=3, in_engine=in_engine)
    config = replace(config, model=replace(config.model, dtype=dtype, lora=lora))
    engine = make_engine(config, tmp_path, tokenizer, torch.device("cpu"), max_positions=100, adapters=lora.adapters)
    assert engine.holds_adapters == held
    plain = make_engine(config, tmp_path, tokenizer, torch.device("cpu"), max_positions=100)
    assert not plain.holds_adapters
