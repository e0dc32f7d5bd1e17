"""Shortcuts for what Triton's interpreter spends its time on: types, sizes and constants, not numbers.

A kernel is some thousand operations on small blocks. Stock, each of them goes through the whole front end of the
compiler. The functions here do the same as what they replace, and leave to that whatever is not in front of them: rare
types, and everything that is an error. They are put in place by `interpreter.repair`; their private names are alike in
Triton 3.6 and 3.7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import ScanOps, TensorHandle

stock_numpy_type = stock._get_np_dtype
stock_patch = stock._patch_lang
stock_block = tl.block_type.__init__
stock_equal = tl.dtype.__eq__
stock_where = stock.interpreter_semantic.where
stock_operands = stock.interpreter_semantic.binary_op_type_checking_impl

PATCHED = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
"""Where the interpreter puts its own operations in place of the language's."""
INTEGERS = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
FLOATS = frozenset({"fp32", "fp64"})
ARITHMETIC = INTEGERS | FLOATS
"""Types of which an operation of two has the same type; halves are divided in float32."""
SCALARS = {name: getattr(tl, name) for name in (*INTEGERS, "float16", "bfloat16", "float32", "float64")}
NUMPY_TYPES = {kind.name: stock_numpy_type(kind) for kind in SCALARS.values()}
LIMITS = {name: (kind.get_int_min_value(), kind.get_int_max_value()) for name, kind in SCALARS.items() if kind.is_int()}
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
LARGEST_BYTES = 8
RESULTS = {"__add__": np.add, "__sub__": np.subtract, "__mul__": np.multiply, "__truediv__": np.divide}
"""Of two numbers of one type in float32 or float64."""
REFLECTED = {"__radd__": "__add__", "__rsub__": "__sub__", "__rmul__": "__mul__", "__rtruediv__": "__truediv__"}
COMPARISONS = {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}
"""Of two numbers of one type, floats or integers."""


def numpy_type(kind: tl.dtype) -> np.dtype:
    """Numpy's type of a scalar, a block or pointers. Stock: writes a table of them to look one up."""
    found = NUMPY_TYPES.get(kind.scalar.name)
    return stock_numpy_type(kind.scalar) if found is None else found


def fits(data: np.ndarray, kind: tl.dtype) -> bool:
    """Whether numbers of an array are as wide as a type, or less. Stock: multiplies and compares bits."""
    known = NUMPY_TYPES.get(kind.name)
    return data.itemsize <= (LARGEST_BYTES if known is None else known.itemsize)


def make_handle(made: TensorHandle, data: np.ndarray, kind: tl.dtype, attributes: dict[str, Any] | None = None) -> None:
    """The numbers of a block. Stock: a dataclass that checks itself in three calls."""
    if not fits(data, kind):
        raise ValueError(f"numbers of {data.itemsize} bytes are wider than {kind}")
    made.data, made.dtype, made.attr = data, kind, {} if attributes is None else attributes


@cache
def block_parts(element: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What blocks of such sizes and elements of such a name have in common."""
    made = object.__new__(tl.block_type)
    stock_block(made, element, list(sizes))
    parts = {name: value for name, value in vars(made).items() if name != "element_ty"}
    return parts | {"sizes": sizes, "of_tensor": shape_and_size(sizes)}


def shape_and_size(sizes: tuple[int, ...]) -> tuple[Any, tl.constexpr]:
    """The shape of a block of such sizes, as a tensor has it, and its number of elements."""
    return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(prod(sizes))


def make_block(made: tl.block_type, element: tl.dtype, sizes: Any) -> None:
    """The type of a block. Stock: checks its sizes and writes its name each time that it is made."""
    given = getattr(sizes, "values", sizes)
    plain = tuple(size.value if isinstance(size, tl.constexpr) else size for size in given)
    vars(made).update(block_parts(element.name, plain), element_ty=element)


def block(element: tl.dtype, sizes: tuple[int, ...]) -> tl.block_type:
    """The type of a block, of sizes that are numbers."""
    made = object.__new__(tl.block_type)
    vars(made).update(block_parts(element.name, sizes), element_ty=element)
    return made


def with_element(kind: tl.block_type, element: tl.dtype) -> tl.block_type:
    """The type of a block of the same sizes. Stock: unwraps each of them."""
    return block(element, kind.sizes)


def make_tensor(made: tl.tensor, handle: TensorHandle, kind: tl.dtype) -> None:
    """A tensor of the language. Stock: makes an object for each of its sizes, and for each type of them."""
    made.handle, made.type, made.dtype = handle, kind, kind.scalar
    made.shape, made.numel = kind.of_tensor


def operands(left: Any, right: Any, *rules: Any, **more: Any) -> tuple[tl.tensor, tl.tensor]:
    """The operands of an operation, brought to one type and shape. Stock: looks for what to do where nothing is."""
    if isinstance(left, tl.tensor):
        kind = left.dtype
        if isinstance(right, tl.tensor):
            if kind.name == right.dtype.name and kind.name in ARITHMETIC:
                return broadcast(left, right)
            if kind.is_ptr() and right.dtype.name in INTEGERS and rules[:1] == (True,):  # pointers are allowed there
                return broadcast(left, right)
        elif takes(kind.name, right):
            return left, filled(left.type, right)
    elif isinstance(right, tl.tensor) and takes(right.dtype.name, left):
        return filled(right.type, left), right
    return stock_operands(left, right, *rules, **more)


def takes(kind: str, number: Any) -> bool:
    """Whether a number becomes one of that type where it meets it, as PyTorch's do. (Truth values: rare.)"""
    if type(number) is int:
        least, largest = LIMITS["int32" if kind in FLOATS else kind] if kind in ARITHMETIC else (1, 0)
        return least <= number <= largest
    return type(number) is float and kind in FLOATS


@cache
def constant(kind: str, sizes: tuple[int, ...], number: float) -> np.ndarray:
    """A read-only block of one number; zeros are positive, as those of the language."""
    return np.broadcast_to(np.array([number or 0], dtype=NUMPY_TYPES[kind]), sizes or (1,))


def filled(kind: tl.dtype, number: float) -> tl.tensor:
    """A scalar or a block of that type, of one number. Stock: makes several on the way."""
    element = kind.scalar
    return tl.tensor(TensorHandle(constant(element.name, kind.sizes, number), element), kind)


joint_sizes = cache(np.broadcast_shapes)


def broadcast(left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both in the shape of their operation. Stock: compares sizes that it unwraps, and copies."""
    sizes, others = left.type.sizes, right.type.sizes
    if sizes == others:
        return left, right
    joint = joint_sizes(sizes, others)
    return stretched(left, joint), stretched(right, joint)


def stretched(value: tl.tensor, sizes: tuple[int, ...]) -> tl.tensor:
    """A scalar or a block as a block of such sizes. (Numpy takes longer for a view than for a copy of so little.)"""
    if value.type.sizes == sizes:
        return value
    data = np.empty(sizes, value.handle.data.dtype)
    data[...] = value.handle.data
    return tl.tensor(TensorHandle(data, value.handle.dtype), block(value.dtype, sizes))


def is_equal(one: tl.dtype, other: object) -> bool:
    """Whether two types are the same. Stock: unwraps a constant first."""
    return one is other or stock_equal(one, other)


def is_integer(kind: tl.dtype) -> bool:
    """Whether a type is one of integers. Stock: joins two lists to look it up."""
    return kind.name in INTEGERS


def check_overflow(left: tl.tensor, right: tl.tensor, operation: Callable[..., Any]) -> None:
    """Checks narrow integers for overflow. Stock: the same in operations of the language, at many times the cost."""
    kind = left.dtype
    if kind.int_bitwidth >= 64:
        return
    least, largest = LIMITS[kind.name]
    exact = EXACT[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
    assert least <= exact.min() and exact.max() <= largest, (
        f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"
    )


def alike(left: tl.tensor, right: Any, kinds: frozenset[str]) -> np.ndarray | None:
    """The numbers of the right side where both have one of these types, or where it is a number that takes it."""
    kind = left.dtype.name
    if kind not in kinds:
        return None
    if type(right) is tl.tensor:
        return right.handle.data if right.dtype.name == kind else None
    return constant(kind, (), right) if takes(kind, right) else None


def sizes_of_both(left: tl.tensor, right: Any) -> tuple[int, ...]:
    """The sizes of an operation's result."""
    sizes = left.type.sizes
    others = right.type.sizes if type(right) is tl.tensor else ()
    return sizes if sizes == others or not others else joint_sizes(sizes, others)


def elementwise(name: str, plain: Callable[..., tl.tensor]) -> Callable[..., tl.tensor]:
    """An operator of blocks. Stock: looks for types and copies to one shape before numpy, which does so itself."""
    reflected = name in REFLECTED
    function = RESULTS.get(REFLECTED.get(name, name)) or COMPARISONS[name]
    compares = name in COMPARISONS
    kinds = ARITHMETIC if compares else FLOATS  # sums of integers are checked for overflow

    def operation(left: tl.tensor, right: Any, _semantic: object = None) -> tl.tensor:
        others = alike(left, right, kinds)
        if others is None:
            return plain(left, right)
        numbers = left.handle.data
        data = function(others, numbers) if reflected else function(numbers, others)
        element = left.dtype
        sizes = sizes_of_both(left, right)
        kind = tl.int1 if compares else element
        return tl.tensor(TensorHandle(data, element), block(kind, sizes) if sizes else kind)

    return operation


def where(condition: tl.tensor, one: Any, other: Any) -> tl.tensor:
    """One or the other number. Stock: copies all three to one shape before numpy, which does so itself."""
    if condition.dtype.name != "int1":
        return stock_where(condition, one, other)
    if not isinstance(one, tl.tensor) or not isinstance(other, tl.tensor) or one.type != other.type:
        one, other = operands(one, other, True, True)
    numbers, others = one.handle.data, other.handle.data
    sizes = joint_sizes(condition.type.sizes, one.type.sizes)
    data = np.where(condition.handle.data, numbers, others)
    element = one.dtype
    return tl.tensor(TensorHandle(data, element), block(element, sizes) if sizes else element)


def scan(operation: ScanOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """A scan with a combination of one's own. Stock: one element after the other. Here as on a GPU, where results
    of 1, 2, 4... neighbours are combined, for all elements at once."""
    length, axis = inputs[0].type.sizes[operation.axis], operation.axis
    values, span = list(inputs), 1
    while span < length:
        heads = [np.split(value.handle.data, [span], axis)[0] for value in values]
        starts = [np.split(value.handle.data, [length - span], axis)[0] for value in values]
        earlier = [np.concatenate(parts, axis) for parts in zip(heads, starts, strict=True)]
        before = [operation.to_tensor(*given) for given in zip(earlier, (value.dtype for value in values), strict=True)]
        found = operation.combine_fn.fn(*before, *values)
        found = found if isinstance(found, tuple) else (found,)
        tails = [np.split(value.handle.data, [span], axis)[1] for value in found]
        joined = [np.concatenate(parts, axis) for parts in zip(heads, tails, strict=True)]
        values = [operation.to_tensor(*given) for given in zip(joined, (value.dtype for value in inputs), strict=True)]
        span *= 2
    return values


def put_operation(place: Any, name: str, member: Callable[..., Any], builder: object, scope: Any) -> None:
    """Put an operation into the language. Stock: it copies its keywords at each call, to leave one out, and goes
    through a function that checks that it was given."""
    plain = getattr(member, "__wrapped__", member)

    def operation(*arguments: Any, _semantic: object = None, **options: Any) -> Any:
        return plain(*arguments, **options, _semantic=stock.interpreter_semantic)

    scope.set_attr(place, name, operation)


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
    quick = RESULTS.keys() | REFLECTED.keys() | COMPARISONS.keys()
    return [
        (place, name, elementwise(name, value) if place is tl.tensor and name in quick else value)
        for place, name, value in found
    ]


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


def install() -> None:
    """Put the functions above in place of the interpreter's."""
    tl.dtype.sizes, tl.dtype.of_tensor = (), shape_and_size(())  # of scalars and pointers; blocks have their own
    tl.dtype.is_int = is_integer
    tl.dtype.__eq__ = is_equal
    tl.tensor.__init__ = make_tensor
    tl.block_type.__init__ = make_block
    tl.block_type.with_element_ty = with_element
    TensorHandle.__init__ = make_handle
    ScanOps.generic_scan = scan
    stock._get_np_dtype = numpy_type
    stock._validate_np_data_size = fits
    stock._patch_attr = put_operation
    stock._patch_lang = InterpretedLanguage
    semantic = stock.interpreter_semantic
    semantic.binary_op_type_checking_impl = operands
    semantic.binary_op_sanitize_overflow_impl = check_overflow
    semantic.broadcast_impl_value = broadcast
    semantic.where = where
