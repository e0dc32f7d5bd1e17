"""Random inputs shared by the tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atpo_kernels import LeafPaths, LinearTurnLoss, TokenWeights, linear_logprob, linear_turn_policy_loss
from tests.helpers.devices import DEVICE

TEMPERATURE = 0.8  # of `loss_case` and `run_linear_loss`


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest floating tensor that any operation returns while active."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


class NoHostSync(TorchDispatchMode):
    """Fails when an operation would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        waits = (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::unique",
        )
        assert not name.startswith(waits), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def upstream(rows: int) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Upstream gradients of log-prob and entropy, the same numbers in float32 and float64."""
    up = torch.randn(2, rows, generator=torch.Generator().manual_seed(1)).double()
    return up[0], up[1]


@dataclass
class Head:
    """Inputs of an LM head in float64, to be cast down."""

    hidden: Tensor  # (A, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    targets: Tensor  # (A,)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """hidden, weight and bias, to differentiate."""
        return [x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def rounded(self, dtype: torch.dtype) -> Head:
        """The same inputs, in float64, as they are in a lower precision."""
        hidden, weight, bias = (x.to(dtype).double() for x in (self.hidden, self.weight, self.bias))
        return Head(hidden, weight, bias, self.targets)


def random_head(rows: int, width: int, vocab: int, seed: int = 0, peak: float = 1.0) -> Head:
    """A head whose logits have a standard deviation of about `peak`; half of the targets are the likeliest token."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64) * peak / width**0.5
    bias = torch.randn(vocab, generator=rng, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=rng)
    targets[::2] = (hidden @ weight.T + bias).argmax(1)[::2]
    return Head(hidden, weight, bias, targets)


def loss_case(
    lengths: list[int],
    width: int = 5,
    vocab: int = 11,
    seed: int = 0,
    peak: float = 1.0,
    temperature: float = TEMPERATURE,
) -> tuple[Head, dict[str, Any]]:
    """An LM head, its log-probs, and the arguments of a loss on packed turns; a third of the tokens has weight 0."""
    rng = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    head = random_head(tokens, width, vocab, seed, peak)
    logprob, _ = linear_logprob(
        head.hidden, head.weight, head.targets, bias=head.bias, temperature=temperature, impl="reference"
    )
    noise = [0.3 * torch.randn(tokens, generator=rng, dtype=torch.float64) for _ in range(3)]
    share = torch.rand(3, tokens, generator=rng, dtype=torch.float64)
    share[:2] *= torch.rand(tokens, generator=rng) > 0.33
    leaves = [torch.randperm(len(lengths), generator=rng)[: 1 + i] for i in range(3)]
    entries = torch.cat(leaves)
    signs = torch.randn(len(entries), generator=rng, dtype=torch.float64)
    keywords = {
        "logprob": logprob,
        "old_logprob": logprob + noise[0],
        "ref_logprob": logprob + noise[1],
        "rollout_logprob": logprob + noise[2],
        "turn_offsets": turn_offsets(lengths),
        "weights": TokenWeights(*share),
        "paths": LeafPaths(turn_offsets([len(x) for x in leaves]), entries, signs.clamp(min=0), (-signs).clamp(min=0)),
    }
    return head, keywords


def run_linear_loss(
    head: Head,
    keywords: dict[str, Any],
    dtype: torch.dtype,
    device: str = "cpu",
    upstream: float = -4.0,
    bias: bool = True,
    **more: Any,
) -> list[Tensor]:
    """Every output of linear_turn_policy_loss, and the gradients under an upstream gradient other than 1."""
    leaves = [x.detach().to(device).requires_grad_() for x in head.leaves(dtype)][: 3 if bias else 2]
    given = {name: on_device(value, device) for name, value in keywords.items() if name != "logprob"}
    given["turn_offsets"] = keywords["turn_offsets"]  # on the host, as the trainer has them
    out = linear_turn_policy_loss(
        leaves[0],
        leaves[1],
        head.targets.to(device),
        bias=leaves[2] if bias else None,
        temperature=TEMPERATURE,
        **given,
        **more,
    )
    assert isinstance(out, LinearTurnLoss) and not out.logprob.requires_grad and not out.entropy.requires_grad
    grads = torch.autograd.grad(out.loss * upstream, leaves)
    results = [out.loss, out.coef, out.logprob, out.entropy, *out.metrics.values(), *grads]
    return [x.detach().cpu() for x in results]


def run_head(
    head: Head, dtype: torch.dtype, impl: str, temperature: float = 0.7, bias: bool = True, device: str = DEVICE
) -> list[Tensor]:
    """Log-prob, entropy, and gradients of hidden, weight and bias through both; upstream gradients are not 1."""
    leaves = [x.to(device).detach().requires_grad_() for x in head.leaves(dtype)][: 3 if bias else 2]
    logprob, entropy = linear_logprob(
        leaves[0],
        leaves[1],
        head.targets.to(device),
        bias=leaves[2] if bias else None,
        temperature=temperature,
        impl=impl,
    )
    up = [x.to(device, logprob.dtype) for x in upstream(len(head.targets))]
    grads = torch.autograd.grad((up[0] * logprob + up[1] * entropy).sum(), leaves)
    return [x.detach().cpu() for x in (logprob, entropy, *grads)]


def on_device(value: Any, device: str) -> Any:
    """A tensor, or a record of tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return replace(value, **{f.name: getattr(value, f.name).to(device) for f in fields(value)}) if value else value


def turn_offsets(lengths: list[int]) -> Tensor:
    """(N+1,) int32 CSR of turns of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
