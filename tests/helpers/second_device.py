"""A second device on a machine that has none: tensors that say they are elsewhere, with their numbers on the CPU.

Code that leaves a tensor behind on the CPU works on a machine without a GPU and fails on one that has it. While
`SecondDevice` is active, tensors made on DEVICE or moved there are `Elsewhere`: they compute like others, refuse to be
combined with tensors of the CPU in PyTorch's words, and wait to be moved back before NumPy reads them. Triton's
interpreter reads and writes their numbers.

DEVICE is PyTorch's type "meta", the one besides "cpu" that every build lets autograd work on. The tests of the kernels
run on it with `ATPO_TEST_DEVICE=meta pytest tests/kernels/...`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
_MOVES = ("aten::_to_copy", "aten::copy_", "aten::index_put_")  # may combine devices, as far as PyTorch's own do


class Elsewhere(Tensor):
    """A tensor on DEVICE, whose numbers are in `numbers`."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        """Make a tensor without memory of its own."""
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            numbers.stride(),
            numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(DEVICE),
        )
        made.numbers = numbers
        return made

    def data_ptr(self) -> int:
        """Address of the numbers."""
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        """Lists of the numbers, read from the device."""
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Carry out an operation on the numbers."""
        return _carry_out(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Moves tensors that are made of numbers to DEVICE; PyTorch would make them there without asking any mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Make them on the CPU first."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class SecondDevice(TorchDispatchMode):
    """Makes tensors on DEVICE `Elsewhere` while active."""

    def __enter__(self) -> SecondDevice:
        """Begin to make them."""
        self._literals = _Literals()
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave DEVICE to PyTorch again."""
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Carry out an operation on the numbers."""
        return _carry_out(func, args, kwargs or {})


class Autocast(torch.autocast):
    """Autocast, which PyTorch does not have for DEVICE: there as on the CPU."""

    def __init__(self, device_type: str, **options: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE else device_type, **options)


def numbers_of(value: Any) -> Any:
    """The numbers of a tensor wherever it is; anything else as it is."""
    return value.numbers if isinstance(value, Elsewhere) else value


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    asked = kwargs.get("device")
    if asked is None and not there:
        return func(*args, **kwargs)
    if there and not func.name().startswith(_MOVES):
        here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
        if here:
            raise RuntimeError(
                f"{func.name()}: expected all tensors to be on the same device, but found {DEVICE} and cpu"
            )
    goes_there = bool(there) if asked is None else torch.device(asked).type == DEVICE
    plain_args, plain_kwargs = tree_map(numbers_of, (args, kwargs))
    if asked is not None:
        plain_kwargs = plain_kwargs | {"device": torch.device("cpu")}
    out = func(*plain_args, **plain_kwargs)
    if not goes_there:
        return out
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped
