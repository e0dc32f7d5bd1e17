"""The check at the start of a run: it passes on what is right, in every dtype, and fails loudly on what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atpo_fast.common.errors import InputError
from atpo_fast.policy import Policy, attention
from atpo_fast.train.packing_check import BEYOND_ROUNDING, check_packing, compare
from tests.helpers.families import FAMILIES, make

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_right_models_pass(name: str, dtype: torch.dtype) -> None:
    """Fails if the check stops a run whose trees are right, or leaves the model in another state."""
    policy = Policy(make(name, dtype), temperature=0.7).train()
    found = compare(policy, policy, CPU)
    assert 0 < found.difference <= BEYOND_ROUNDING * found.rounding / 2, found
    assert policy.training and policy.model.config._attn_implementation == attention.TREE_ATTENTION
    assert compare(policy, policy, CPU) == found


def test_a_model_of_small_weights_passes() -> None:
    """Fails if a run is stopped because its layers do so little that rounding them otherwise changes no log-prob, where
    packed and flat log-probs still differ by a unit in the last place."""
    policy = Policy(make("llama", torch.float32))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1e-6 if parameter.dim() > 1 else 1)
    found = compare(policy, policy, CPU)
    assert found.rounding > 1e-7
    assert found.passed, found


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window too long by one": ("gemma3", {"window": lambda window: window and window + 1}),
    "no window": ("mistral", {"window": lambda window: None}),
    "no sinks": ("gpt-oss", {"sinks": lambda sinks: None}),
    "no cap": ("gemma2", {"softcap": lambda cap: None}),
    "another scale": ("llama", {"scale": lambda scale: 1.5 * scale}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_wrong_attention_is_found(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model would be trained whose layers attend to other keys, or by other weights, than they should."""
    name, changes = FAULTS[fault]
    plain = attention.tree_attention

    def wrong(*tensors: Any, blocks: Any, **options: Any) -> Any:
        return plain(*tensors, **(options | {key: change(options[key]) for key, change in changes.items()}))

    monkeypatch.setattr(attention, "tree_attention", wrong)
    policy = Policy(make(name, dtype))
    with pytest.raises(InputError, match=r"log-probs of a packed tree differ.*train\.check_packing=false"):
        check_packing(policy, policy, CPU)


def test_wrong_logits_are_found() -> None:
    """Fails if a rule of the logits that the head does not know goes unnoticed."""
    policy = Policy(make("granite", torch.float32))
    policy.model.lm_head.temperature = 1.0
    with pytest.raises(InputError, match="architecture is computed wrongly"):
        check_packing(policy, policy, CPU)
