"""LoRA adapters in vLLM on CPU against PEFT's own model (`make test-vllm`; skipped without vLLM)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from atpo_fast.adapters import AdapterSettings, adapter_weights, add_adapters, whole_weights
from atpo_fast.config import VLLMConfig
from atpo_fast.engines.vllm.adapters import adapter_options
from atpo_fast.engines.vllm.engine import VLLMEngine
from tests.engines.test_vllm_engine import TOKENIZER, make_model
from tests.helpers.adapters import wake_adapters
from tests.helpers.engine_requests import check_logprobs, grow, roots

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (`make test-vllm` does)")
SETTINGS = AdapterSettings(rank=3, alpha=7.0)


def adapted(seed: int) -> PreTrainedModel:
    """A policy after an update: other adapters for every seed."""
    model = add_adapters(make_model(tied=False), SETTINGS, seed=seed).eval()
    wake_adapters(model)
    return model


# Fails if vLLM samples without the adapters, with those of the update before, at another scale, or leaves out layers
# that it fuses; if what was cached before an update is used after it; or if merged weights are not taken.
@needs_vllm
def test_vllm_writes_with_the_policys_adapters(tmp_path: Path) -> None:
    make_model(tied=False).save_pretrained(tmp_path)
    options = {"cache_tokens": 20_000, "max_positions": 512, "adapters": SETTINGS}
    engine = VLLMEngine(tmp_path, TOKENIZER, VLLMConfig(), **options)  # type: ignore[arg-type]
    assert engine.holds_adapters
    policies = [make_model(tied=False), adapted(1), adapted(2)]
    for number, policy in enumerate(policies):
        if number:
            engine.update_weights((weight.name, weight.make()) for weight in adapter_weights(policy))
        trees = roots(3, lengths=(40, 80))
        grow(engine, trees, rounds=1)
        check_logprobs(policy, trees, 1e-4)
        for tree in range(len(trees)):
            engine.release(f"t{tree}")
    with pytest.raises(ValueError, match="lack 27 parameters"):
        engine.update_weights((weight.name, weight.make()) for weight in list(adapter_weights(policies[1]))[:1])
    engine.close()


@needs_vllm
def test_vllm_takes_merged_weights(tmp_path: Path) -> None:
    """Fails if a merged weight has PEFT's name or misses its adapter."""
    make_model(tied=False).save_pretrained(tmp_path)
    engine = VLLMEngine(tmp_path, TOKENIZER, VLLMConfig(), cache_tokens=20_000, max_positions=512)
    policy, trees = adapted(1), roots(2, lengths=(40, 80))
    engine.update_weights((weight.name, weight.make()) for weight in whole_weights(policy))
    grow(engine, trees, rounds=1)
    check_logprobs(policy, trees, 1e-4)
    engine.close()


def test_room_for_a_rank() -> None:
    """Fails if vLLM is given a rank that it does not know, or one that the adapters do not fit."""
    assert adapter_options(AdapterSettings(rank=16, alpha=1.0))["max_lora_rank"] == 16
    assert adapter_options(AdapterSettings(rank=17, alpha=1.0))["max_lora_rank"] == 32
    with pytest.raises(ValueError, match="rank=513: vLLM has room for 512"):
        adapter_options(AdapterSettings(rank=513, alpha=1.0))
