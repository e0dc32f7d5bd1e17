"""The check at the start of a run: it passes on what is right, in every dtype, and fails loudly on what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atpo_fast.common.errors import InputError
from atpo_fast.policy import Policy, attention
from atpo_fast.train import packing_check
from atpo_fast.train.packing_check import BEYOND_ROUNDING, check_packing, compare_logprobs
from tests.helpers.families import FAMILIES, make

CPU = torch.device("cpu")
WHOLE = (("qwen3", torch.float32), ("gemma2", torch.bfloat16), ("qwen3_next", torch.bfloat16))
"""What the check sees at its own length: full attention, windows, layers with a state; either dtype. The rest is
seen at a short length, so that every two of length, dtype and kind of layers meet."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give gradients a prompt of 48 tokens in place of 272, still eight windows of the tiny models."""
    monkeypatch.setattr(packing_check, "_LONGEST_WITH_GRADIENT", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_right_models_pass(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Fails if the check stops a run whose trees are right, or leaves the model in another state."""
    if (name, dtype) not in WHOLE:
        request.getfixturevalue("short")
    policy = Policy(make(name, dtype), temperature=0.7).train()
    logprobs, gradients = check_packing(policy, CPU)
    for found in (logprobs, gradients):
        assert 0 < found.difference <= BEYOND_ROUNDING * found.rounding / 2, found
    assert policy.training and policy.model.config._attn_implementation == attention.TREE_ATTENTION
    assert all(parameter.grad is None for parameter in policy.parameters())
    if (list(FAMILIES).index(name) % 2 == 0) == (dtype == torch.float32):  # either dtype, by turns
        assert compare_logprobs(policy, CPU) == logprobs


def test_a_model_of_small_weights_passes() -> None:
    """Fails if a run is stopped because its layers do so little that rounding them otherwise changes no log-prob, where
    packed and flat log-probs still differ by a unit in the last place."""
    policy = Policy(make("llama", torch.float32))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1e-6 if parameter.dim() > 1 else 1)
    assert all(found.rounding > 1e-7 for found in check_packing(policy, CPU))


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
        check_packing(policy, CPU)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["queries", "keys", "values"])
def test_a_wrong_backward_is_found(wrong: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model would be trained whose log-probs are right and whose gradients are not."""
    plain = attention.tree_attention

    def halved(*tensors: torch.Tensor, **options: Any) -> Any:
        watched = [tensor.view_as(tensor) for tensor in tensors[:3]]
        if watched[wrong].requires_grad:
            watched[wrong].register_hook(lambda gradient: gradient / 2)
        return plain(*watched, *tensors[3:], **options)

    monkeypatch.setattr(attention, "tree_attention", halved)
    policy = Policy(make("llama", dtype))
    assert compare_logprobs(policy, CPU).passed
    with pytest.raises(InputError, match=r"gradients of a packed tree differ.*train\.check_packing=false"):
        check_packing(policy, CPU)


def test_wrong_logits_are_found() -> None:
    """Fails if a rule of the logits that the head does not know goes unnoticed."""
    policy = Policy(make("granite", torch.float32))
    policy.model.lm_head.temperature = 1.0
    with pytest.raises(InputError, match="architecture is computed wrongly"):
        check_packing(policy, CPU)
