"""Repairs of Triton's interpreter, made on import; nothing is touched where there is a CUDA device.

The interpreter runs kernels in numpy, which has no bfloat16: it keeps such numbers as their 16 bits in a uint16 and
then calculates with those integers, without an error. It also leaves out, or does otherwise, some of what the compiled
language does. Each repair below says what goes wrong without it. They reach into private classes, which are alike in
Triton 3.6 and 3.7.

A test module of kernels begins with `import interpreter  # noqa: F401` and makes its tensors on DEVICE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from types import SimpleNamespace
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

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

stock_cast = InterpreterBuilder.cast_impl
stock_dot = InterpreterBuilder.create_dot
stock_binary = InterpreterBuilder.binary_op
stock_fma = InterpreterBuilder.create_fma
stock_reduce = ReduceOps.apply_impl
stock_argument = stock._implicit_cvt
stock_launch = stock.GridExecutor.__call__
stock_patch = stock._patch_lang
stock_block = tl.block_type.__init__
stock_equal = tl.dtype.__eq__
stock_operands = stock.interpreter_semantic.binary_op_type_checking_impl
numpy_scalar = cache(stock._get_np_dtype)

PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
"""Where the interpreter puts its own operations in place of the language's."""
INTEGERS = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
ARITHMETIC = INTEGERS | {"fp32", "fp64"}
"""Types of which an operation of two has the same type; halves are divided in float32."""
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def is_bfloat16(handle: TensorHandle) -> bool:
    """Whether the handle's data are the bits of bfloat16 numbers."""
    return handle.dtype.scalar == tl.bfloat16


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


def numpy_type(kind: tl.dtype) -> np.dtype:
    """Numpy's type of a scalar, a block or pointers. Stock: writes a table of them to look one up."""
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else numpy_scalar(kind.scalar)


@cache
def shape_and_size(sizes: tuple[int, ...]) -> tuple[Any, tl.constexpr]:
    """The shape of a block of such sizes, as a tensor has it, and its number of elements."""
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(prod(sizes))


def make_tensor(made: tl.tensor, handle: TensorHandle, kind: tl.dtype) -> None:
    """A tensor of the language. Stock: makes an object for each of its sizes, and for each type of them."""
    made.handle, made.type, made.dtype = handle, kind, kind.scalar
    made.shape, made.numel = shape_and_size(tuple(kind.shape.values) if kind.is_block() else ())


@cache
def block_parts(element: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What blocks of such sizes and elements of such a name have in common."""
    made = object.__new__(tl.block_type)
    stock_block(made, element, list(sizes))
    return {name: value for name, value in vars(made).items() if name != "element_ty"}


def make_block(made: tl.block_type, element: tl.dtype, sizes: Any) -> None:
    """The type of a block. Stock: checks its sizes and writes its name each time that it is made."""
    given = getattr(sizes, "values", sizes)
    plain = tuple(size.value if isinstance(size, tl.constexpr) else size for size in given)
    vars(made).update(block_parts(element.name, plain), element_ty=element)


def operands(left: Any, right: Any, *rules: Any, **more: Any) -> tuple[tl.tensor, tl.tensor]:
    """The operands of an operation, brought to one type and shape. Stock: looks for what to do where nothing is."""
    if isinstance(left, tl.tensor) and isinstance(right, tl.tensor):
        kind = left.type
        if kind.name == right.type.name and kind.scalar.name in ARITHMETIC:
            return left, right
    return stock_operands(left, right, *rules, **more)


def is_equal(one: tl.dtype, other: object) -> bool:
    """Whether two types are the same. Stock: unwraps a constant first."""
    return one is other or stock_equal(one, other)


def is_integer(kind: tl.dtype) -> bool:
    """Whether a type is one of integers. Stock: joins two lists to look it up."""
    return kind.name in INTEGERS


def put_operation(place: Any, name: str, member: Callable[..., Any], builder: object, scope: Any) -> None:
    """Put an operation into the language. Stock: it copies its keywords at each call, to leave one out."""

    def operation(*arguments: Any, _semantic: object = None, **options: Any) -> Any:
        return member(*arguments, **options, _semantic=stock.interpreter_semantic)

    scope.set_attr(place, name, operation)


def check_overflow(left: tl.tensor, right: tl.tensor, operation: Callable[..., Any]) -> None:
    """Checks narrow integers for overflow. Stock: the same in operations of the language, at many times the cost."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = EXACT[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    assert kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value(), (
        f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"
    )


@cache
def interpreted_operations() -> list[tuple[Any, str, Any]]:
    """Find what the interpreter puts into the language: (where, name, operation)."""
    before = [dict(vars(place)) for place in PATCHED]
    stock_patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    found = [
        (place, name, value)
        for place, old in zip(PATCHED, before, strict=True)
        for name, value in vars(place).items()
        if old.get(name) is not value
    ]
    for place, name, _ in found:
        old = before[PATCHED.index(place)]
        setattr(place, name, old[name]) if name in old else delattr(place, name)
    return found


class InterpretedLanguage:
    """The language while a kernel runs. Stock: patched from the ground up by every function that a kernel calls."""

    running = False

    def __init__(self, function: Callable[..., Any]):
        self._before: list[tuple[Any, str, Any]] = []
        if InterpretedLanguage.running:  # the kernel that calls this function has done it
            return
        InterpretedLanguage.running = True
        for place, name, operation in interpreted_operations():
            self._before.append((place, name, vars(place).get(name)))
            setattr(place, name, operation)

    def restore(self) -> None:
        """Put the language's own operations back, when the kernel has ended."""
        for place, name, operation in self._before:
            if operation is None:
                delattr(place, name)
            else:
                setattr(place, name, operation)
        InterpretedLanguage.running = False


def repair() -> None:
    """Put the functions above in place of the interpreter's."""
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.create_fma = fused_multiply_add
    ReduceOps.apply_impl = reduce
    stock._implicit_cvt = argument
    stock.GridExecutor.__call__ = launch
    stock._patch_lang = InterpretedLanguage
    stock._get_np_dtype = numpy_type
    stock._patch_attr = put_operation
    tl.tensor.__init__ = make_tensor
    tl.block_type.__init__ = make_block
    tl.dtype.is_int = is_integer
    tl.dtype.__eq__ = is_equal
    stock.interpreter_semantic.binary_op_type_checking_impl = operands
    stock.interpreter_semantic.binary_op_sanitize_overflow_impl = check_overflow


if INTERPRETED:
    repair()
