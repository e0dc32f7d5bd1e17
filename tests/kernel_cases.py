"""Random inputs shared by the tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


def assert_as_precise_as(plain: Tensor, ours: Tensor, exact: Tensor) -> None:
    """The gate of every kernel: our error against float64 is no larger than plain PyTorch's in the same dtype."""
    if exact.numel() == 0:
        return
    slack = 1e-6 * float(exact.abs().max())
    for size in (lambda x: float(x.abs().max()), lambda x: float(x.square().mean().sqrt())):
        error, allowed = size(ours.double() - exact), size(plain.double() - exact)
        assert error <= allowed + slack, (error, allowed)


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
        return Head(*(x.to(dtype).double() for x in (self.hidden, self.weight, self.bias)), self.targets)


def random_head(rows: int, width: int, vocab: int, seed: int = 0, peak: float = 1.0) -> Head:
    """A head whose logits have a standard deviation of about `peak`; half of the targets are the likeliest token."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=rng, dtype=torch.float64) * peak / width**0.5
    bias = torch.randn(vocab, generator=rng, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=rng)
    targets[::2] = (hidden @ weight.T + bias).argmax(1)[::2]
    return Head(hidden, weight, bias, targets)


def turn_offsets(lengths: list[int]) -> Tensor:
    """(N+1,) int32 CSR of turns of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
