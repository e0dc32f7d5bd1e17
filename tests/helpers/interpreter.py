"""Repairs of Triton's interpreter, made on import; nothing is touched where there is a CUDA device.

The interpreter runs kernels in numpy, which has no bfloat16: it keeps such numbers as their 16 bits in a uint16 and
then calculates with those integers, without an error. It also leaves out, or does otherwise, some of what the compiled
language does. Each repair below says what goes wrong without it. They reach into private classes, which are alike in
Triton 3.6 and 3.7.

A test module of kernels begins with `import interpreter  # noqa: F401` and makes its tensors on DEVICE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers.devices import DEVICE as DEVICE
from tests.helpers.devices import INTERPRETED as INTERPRETED
from tests.helpers.second_device import Elsewhere

triton = pytest.importorskip("triton")  # skips the importing test module

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter as stock  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tests.helpers import interpreter_speed  # noqa: E402

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

stock_cast = InterpreterBuilder.cast_impl
stock_dot = InterpreterBuilder.create_dot
stock_binary = InterpreterBuilder.binary_op
stock_fma = InterpreterBuilder.create_fma
stock_reduce = ReduceOps.apply_impl
stock_argument = stock._implicit_cvt
stock_launch = stock.GridExecutor.__call__


def is_bfloat16(handle: TensorHandle) -> bool:
    """Whether the handle's data are the bits of bfloat16 numbers."""
    return handle.dtype.name == "bf16"


def widen(handle: TensorHandle) -> TensorHandle:
    """The same numbers in float32, exactly, if they are bfloat16."""
    if not is_bfloat16(handle):
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def round_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 numbers, ties to even."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    last_kept = (bits >> 16) & 1
    rounded = (bits + (0x7FFF + last_kept)) >> 16  # the carry may run into the exponent, which is right
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def refuse_bfloat16(operation: str, *handles: TensorHandle) -> None:
    """Kernels load, cast to float32 and calculate there: what was not cast was forgotten."""
    if any(is_bfloat16(handle) for handle in handles):
        raise TypeError(f"{operation} of bfloat16 numbers: cast them to float32 first")


def cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    """Casts to and from bfloat16. Stock: float32 is truncated, other types are not converted at all."""
    if target.scalar == tl.bfloat16 and not is_bfloat16(source):
        return TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
    if is_bfloat16(source) and target.scalar != tl.bfloat16:
        return stock_cast(builder, widen(source), target)
    return stock_cast(builder, source, target)


def dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, total: TensorHandle, *options: Any) -> Any:
    """tl.dot of bfloat16 blocks. Stock: multiplies their bits."""
    return stock_dot(builder, widen(a), widen(b), total, *options)


def binary(builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle, operation: Callable[..., Any]) -> Any:
    """Compares bfloat16 numbers; refuses to calculate with them. Stock: both on their bits."""
    if operation not in COMPARISONS:
        refuse_bfloat16(operation.__name__, left, right)
    return stock_binary(builder, widen(left), widen(right), operation)


def fused_multiply_add(builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> Any:
    """Refuses bfloat16 numbers. Stock: calculates with their bits."""
    refuse_bfloat16("fma", x, y, z)
    return stock_fma(builder, x, y, z)


def reduce(operation: ReduceOps, tensors: tuple[tl.tensor, ...]) -> Any:
    """Refuses to reduce bfloat16 numbers. Stock: tl.sum adds their bits. (tl.max casts by itself.)"""
    refuse_bfloat16("reduction", *(tensor.handle for tensor in tensors))
    return stock_reduce(operation, tensors)


def argument(value: Any) -> Any:
    """Arguments of a kernel. Stock: a float stays a Python float, of 64 bits and without `.to`; compiled: float32."""
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return stock_argument(value)


def launch(executor: Any, *arguments: Any, **options: Any) -> None:
    """Launches with tensors of the second device of tests. Stock: reads the storage, which such a tensor has not."""
    stock_launch(executor, *map(on_cpu, arguments), **{name: on_cpu(value) for name, value in options.items()})


def on_cpu(value: Any) -> Any:
    """The numbers of a tensor, or a descriptor of them; anything else as it is."""
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(on_cpu(value.base), value.shape, value.strides, value.block_shape)
    return value.numbers if isinstance(value, Elsewhere) else value


def repair() -> None:
    """Put the functions above in place of the interpreter's."""
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.create_fma = fused_multiply_add
    ReduceOps.apply_impl = reduce
    stock._implicit_cvt = argument
    stock.GridExecutor.__call__ = launch
    interpreter_speed.install()


if INTERPRETED:
    repair()
