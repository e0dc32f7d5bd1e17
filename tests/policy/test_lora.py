"""A policy with LoRA adapters over packed rows equals PEFT's own model over flat trajectories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from atpo_fast import Objective, pack_trees
from atpo_fast.adapters import AdapterSettings, add_adapters, whole_weights, without_adapters
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import depth_first
from atpo_fast.policy import Policy, accumulate_gradients, score_rows
from tests.helpers.adapters import peft_model, wake_adapters
from tests.helpers.flat_reference import exact_norms, flat_loss, flatten
from tests.helpers.hybrid_models import in_float64, make_hybrid
from tests.helpers.policies import MODELS, make, trees

OBJECTIVE = Objective.preset("at2po", clip_low=0.5, clip_high=0.5)


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise trees as small as these would rather repeat their ancestors than open a row."""
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)


def adapter_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """By name within the causal LM; nothing but adapters may have one."""
    found = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in found)
    return found


# Fails if an adapter is left out of a forward or backward, is scaled twice, sees other tokens than its layer, loses the
# gradient that rows below an opened row send back, or if a frozen weight is differentiated.
@pytest.mark.parametrize("name", list(MODELS))
def test_tree_equals_flat_through_peft(name: str) -> None:
    forest = trees()
    plain = peft_model(name)

    def logits(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        out: Tensor = plain(input_ids=ids[None]).logits[0]
        return out

    expected_loss = flat_loss(logits, flatten(forest), OBJECTIVE)
    expected_loss.backward()
    expected = adapter_gradients(plain)
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    choices: tuple[GradientCheckpointing, ...] = ("none", "layer", "mlp")
    budgets = ((4096, 0), (22, 0), (12, 500))
    # every choice with every budget over the models, and each of both with every model
    first = list(MODELS).index(name)
    for choice, (row_tokens, max_prefix) in zip(choices, budgets[first:] + budgets[:first], strict=True):
        policy = Policy(peft_model(name), gradient_checkpointing=choice).train()
        rows = pack_trees(forest, OBJECTIVE, row_tokens, dtype=torch.float64, max_prefix=max_prefix)
        assert (max(row.depth for row in rows) > 0) == bool(max_prefix)
        loss = accumulate_gradients(policy, rows, OBJECTIVE)
        assert abs(float(loss - expected_loss.detach())) < 1e-9
        found = adapter_gradients(policy.model)
        assert found.keys() == expected.keys() and len(found) == 2 * 2 * 7  # A and B of seven layers in two blocks
        for parameter, gradient in expected.items():
            difference = float((found[parameter] - gradient).abs().max())
            assert difference < 1e-9 * size, (name, choice, row_tokens, parameter)


# Fails if an adapter in a layer with a state, or beside stacked experts, is passed over where the layer's functions are
# exchanged, or its gradient is lost between rows.
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "granitemoehybrid"])
def test_tree_equals_flat_in_layers_with_a_state(name: str) -> None:
    def adapted() -> PeftModel:
        torch.manual_seed(1)
        model = get_peft_model(make_hybrid(name), LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
        wake_adapters(model)
        return model

    with in_float64():
        plain = adapted()
        flat_loss(
            lambda ids, _, __: plain(ids[None], use_cache=False).logits[0], flatten(trees()), OBJECTIVE
        ).backward()
        expected = adapter_gradients(plain)
        policy = Policy(adapted(), gradient_checkpointing="layer").train()
        rows = pack_trees(trees(), OBJECTIVE, 12, dtype=torch.float64, max_prefix=500)
        accumulate_gradients(policy, rows, OBJECTIVE)
        found = adapter_gradients(policy.model)
    assert found.keys() == expected.keys() and len(found) >= 20
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        assert float((found[parameter] - gradient).abs().max()) < 1e-9 * size, parameter


# Fails if what cannot be merged is found out after the first rollout, not when the run starts.
def test_stacked_experts_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"mlp\.gate is a peft\..*ParamWrapper: .*in model\.lora\.targets"):
        add_adapters(make_hybrid("qwen3_next"), AdapterSettings(rank=3, alpha=7.0), seed=0)
    add_adapters(make_hybrid("qwen3_next"), AdapterSettings(3, 7.0, ("q_proj", "v_proj")), seed=0)


# Fails if adapters begin otherwise than as the model they are put on, depend on random numbers drawn before, get
# gradients in another dtype, or are put on the head.
def test_adapters_that_are_configured() -> None:
    (row,) = pack_trees(trees(), OBJECTIVE, 4096, dtype=torch.float64)
    settings = AdapterSettings(rank=3, alpha=7.0)
    before = torch.get_rng_state()
    first = Policy(add_adapters(make("qwen3"), settings, seed=5))
    torch.manual_seed(int(before[0]) + 1)
    second = Policy(add_adapters(make("qwen3"), settings, seed=5))
    other = Policy(add_adapters(make("qwen3"), settings, seed=6))
    assert torch.equal(first(row)[0], Policy(make("qwen3"))(row)[0])
    trained = {n: p for n, p in first.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and {p.dtype for p in trained.values()} == {torch.float64}
    for name, parameter in second.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name])
    assert any(not torch.equal(p, trained[n]) for n, p in other.named_parameters() if n in trained)
    with pytest.raises(ValueError, match="LM head cannot have an adapter"):
        add_adapters(make("qwen2"), AdapterSettings(3, 7.0, ("q_proj", "lm_head")), seed=0)
    with pytest.raises(ValueError, match="not found in the base model"):
        add_adapters(make("qwen2"), AdapterSettings(3, 7.0, ("query",)), seed=0)


# Fails if the reference policy is the adapted one, or adapters stay off or frozen afterwards.
def test_without_adapters_it_is_the_starting_model() -> None:
    policy = Policy(peft_model("qwen3")).train()
    rows = pack_trees(trees(), OBJECTIVE, 22, dtype=torch.float64)
    plain = score_rows(Policy(exact_norms(make("qwen3"))), rows, policy.device)
    adapted = score_rows(policy, rows, policy.device)
    with without_adapters(policy):
        off = score_rows(policy, rows, policy.device)
    for one, two, three in zip(plain, off, adapted, strict=True):
        assert torch.equal(one[0], two[0]) and not torch.allclose(one[0], three[0])
    for one, two in zip(adapted, score_rows(policy, rows, policy.device), strict=True):
        assert torch.equal(one[0], two[0])
    accumulate_gradients(policy, rows, OBJECTIVE)
    assert len(adapter_gradients(policy.model)) == 28


# Fails if a merged weight misses its scale, goes to another layer, has PEFT's name, or a tied one comes twice.
@pytest.mark.parametrize("name", list(MODELS))
def test_whole_weights_are_those_that_peft_merges(name: str) -> None:
    policy = Policy(peft_model(name))
    merged = peft_model(name).merge_and_unload()
    found = {weight.name: weight.make() for weight in whole_weights(policy.model)}
    assert found.keys() == dict(merged.named_parameters()).keys()
    for parameter, value in merged.named_parameters():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=1e-14)


# Fails if a small adapter is lost before it is added: each factor is exact in float32, the sum is rounded once.
def test_whole_weights_in_bfloat16_are_rounded_once() -> None:
    model = add_adapters(make("llama").bfloat16(), AdapterSettings(rank=3, alpha=7.0), seed=0)
    wake_adapters(model)
    layer: Any = model.model.layers[0].mlp.down_proj
    parts = (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight)
    base, a, b = (parameter.detach().double() for parameter in parts)
    exact = base + 7 / 3 * (b @ a)
    (weight,) = [w for w in whole_weights(model) if w.name == "model.layers.0.mlp.down_proj.weight"]
    found = weight.make()
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and the roundings of a sum of four numbers in float32.
    half = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
    bound = half + 8 * 2**-24 * (base.abs() + 7 / 3 * (b.abs() @ a.abs()))
    assert ((found.double() - exact).abs() <= bound).all()


# Fails if a row that is forwarded twice draws its dropout anew, or branches share what flat rows would draw each for
# themselves, and nobody is told.
@pytest.mark.parametrize("choice", ["none", "layer", "mlp"])
def test_active_dropout_is_refused(choice: GradientCheckpointing) -> None:
    with pytest.raises(
        ValueError, match=r"lora_dropout\.default is a torch\.nn\.modules\.dropout\.Dropout with p=0\.1"
    ):
        Policy(peft_model("llama", lora_dropout=0.1), gradient_checkpointing=choice)


# Fails if the message names no class that one can look up, or does not say what to leave out.
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"peft\.tuners\.lora\.layer\.Linear"),
        ({"modules_to_save": ["lm_head"]}, r"peft\.utils\.other\.ModulesToSaveWrapper"),
    ],
)
def test_adapters_of_the_head_are_refused(options: dict[str, Any], kind: str) -> None:
    with pytest.raises(TypeError, match=rf"lm_head is a {kind}; expected torch\.nn\.Linear; leave lm_head out"):
        Policy(peft_model("llama", **options))


# Fails if virtual tokens, which no packed row has, are dropped in silence.
def test_prompt_tuning_is_refused() -> None:
    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"PromptTuningConfig puts virtual tokens"):
        Policy(model)


# Fails if what cannot be merged is sent to the engine without its adapter.
def test_only_plain_lora_is_merged() -> None:
    dora = Policy(peft_model("llama", use_dora=True))
    with pytest.raises(ValueError, match="only plain LoRA on linear layers can be merged"):
        list(whole_weights(dora.model))
    two = peft_model("llama")
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has the adapters \['default', 'second'\]"):
        list(whole_weights(Policy(two).model))


def test_a_plain_peft_model_is_as_before() -> None:
    """Fails if this file's reference is one of ours: PEFT's model is to keep transformers' attention and head."""
    assert isinstance(peft_model("llama"), PeftModel)
    assert peft_model("llama").get_base_model().config._attn_implementation != "atpo_tree"
