"""The policy's layers on Liger's kernels compute what Hugging Face's do."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atpo_fast import Objective, pack_trees
from atpo_fast.common.choices import GradientCheckpointing, Liger
from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy, layers
from atpo_fast.policy.layers import use_liger
from tests.helpers.flat_reference import exact_norms
from tests.helpers.interpreter import DEVICE, tl
from tests.helpers.policies import MODELS, make, trees

ops = pytest.importorskip("liger_kernel.ops")
KERNELS = ("LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction")


@pytest.fixture
def row() -> PackedTrees:
    """A tree on the kernels' device."""
    (row,) = pack_trees(trees()[:1], Objective.preset("at2po"), 4096)
    return row.to(DEVICE)


@pytest.fixture(autouse=True)
def rsqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """libdevice has no functions in Triton's interpreter: Liger's RMSNorm gets the language's own."""
    if DEVICE == "cpu":
        monkeypatch.setattr(sys.modules["liger_kernel.ops.rms_norm"], "rsqrt", lambda x: tl.rsqrt(x))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of Liger's kernels was called."""
    counts = dict.fromkeys(KERNELS, 0)

    def counted(name: str, function: type[torch.autograd.Function]) -> type:
        def apply(*inputs: object) -> object:
            counts[name] += 1
            return function.apply(*inputs)

        return type(name, (), {"apply": staticmethod(apply)})

    for name in KERNELS:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts


def liger(name: str) -> PreTrainedModel:
    """A float32 model whose layers run on Liger where the tests' kernels do."""
    model = make(name).float()
    assert use_liger(model, DEVICE)
    return model


def results(
    model: PreTrainedModel, row: PackedTrees, choice: GradientCheckpointing = "none", part: slice = slice(None)
) -> list[Tensor]:
    """Log-probs and every gradient of a sum over some of them, in float64 on the host."""
    policy = Policy(model.to(DEVICE), gradient_checkpointing=choice, liger="off").train()
    logprob, _ = policy(row)
    weight = torch.linspace(-1, 1, row.num_actions, device=DEVICE, dtype=logprob.dtype)
    (logprob * weight)[part].sum().backward()
    assert (policy.skipped_tokens > 0) == (choice != "none" and part != slice(None))
    return [x.detach().double().cpu() for x in (logprob, *(p.grad for p in policy.parameters()))]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest error of each, as a share of its largest number."""
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)]


def mean_square(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the errors of all numbers, as shares of the largest number of their tensor."""
    shares = [((f - e) / e.abs().max()).flatten() for f, e in zip(found, expected, strict=True)]
    return float(torch.cat(shares).square().mean())


@pytest.mark.parametrize("name", list(MODELS))
def test_same_as_hugging_face(name: str, row: PackedTrees, calls: dict[str, int]) -> None:
    """Fails if a norm gets another epsilon or offset, RoPE another layout, or an in-place write meets a kept tensor."""
    exact = results(exact_norms(make(name)), row)
    found, plain = results(liger(name), row), results(make(name).float(), row)
    # one largest error is the luck of a few roundings; over thousands of numbers the order of sums averages out
    assert mean_square(found, exact) < 2**2 * mean_square(plain, exact)
    assert max(errors(found, exact)) < 1e-5
    norms = 9 if name == "qwen3" else 5  # of 2 layers; Qwen3 has two for the heads
    assert calls == dict(zip(KERNELS, (norms, 2, 2), strict=True))


def test_checkpointing_over_the_needed_tokens(row: PackedTrees, calls: dict[str, int]) -> None:
    """Fails if the backward's in-place writes reach what is computed again, or cut positions come to RoPE wrongly."""
    part = slice(0, 5)
    expected = results(liger("qwen3"), row, "none", part)
    once = dict(calls)
    choices: dict[GradientCheckpointing, list[int]] = {"layer": [8, 2, 2], "mlp": [0, 2, 0]}
    for choice, again in choices.items():
        calls.update(dict.fromkeys(KERNELS, 0))
        found = results(liger("qwen3"), row, choice, part)
        assert max(errors(found, expected)) < 1e-5, choice
        assert [calls[kernel] - once[kernel] for kernel in KERNELS] == again, choice


def test_one_model_alone(row: PackedTrees, calls: dict[str, int]) -> None:
    """Fails if another model of the process, as the rollout's, is changed, or parameters get other names."""
    first = make("qwen3").float()
    module = sys.modules[type(first).__module__]
    names, forwards = list(first.state_dict()), {k: getattr(v, "forward", v) for k, v in vars(module).items()}
    assert use_liger(first, DEVICE)
    assert list(first.state_dict()) == names
    assert {k: getattr(v, "forward", v) for k, v in vars(module).items()} == forwards
    results(make("qwen3").float(), row)
    assert not any(calls.values())


def test_twice_is_once() -> None:
    """Fails if a second call wraps the layers again."""
    model = liger("llama")
    bound = [module.__dict__.get("forward") for module in model.modules()]
    assert use_liger(model, DEVICE)
    assert all(m.__dict__.get("forward") is f for m, f in zip(model.modules(), bound, strict=True))


def test_a_copy_has_its_own_parameters(row: PackedTrees) -> None:
    """Fails if the layers of a deep copy read the original's weights."""
    model = liger("llama")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = results(liger("llama"), row)
    assert max(errors(results(copied, row), expected)) < 1e-6


def test_left_alone(row: PackedTrees, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Liger runs on another device or in float64, for an unknown architecture, or without being installed."""
    elsewhere = make("llama").float()
    assert use_liger(elsewhere, "meta")
    results(elsewhere, row)
    double = make("llama")
    assert use_liger(double, DEVICE)
    results(double, row)
    unknown = make("llama")
    unknown.config.model_type = "gpt_neox"
    assert not use_liger(unknown, DEVICE)
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    assert not use_liger(make("llama"), DEVICE)
    assert not any(calls.values())


@pytest.mark.parametrize(
    ("choice", "cuda", "used"), [("auto", True, True), ("auto", False, False), ("off", True, False)]
)
def test_choice(choice: Liger, cuda: bool, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `off` or a machine without a GPU still changes the layers, or `auto` never does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    model = make("qwen2")
    Policy(model, liger=choice)
    assert ("forward" in vars(model.model.norm)) == used
