"""The repaired interpreter does what a GPU does; on a GPU these tests say what that is."""

# The kernels' parameters are Triton's values, which have no static types.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.helpers import interpreter, interpreter_speed  # first: it skips this module where there is no Triton

DEVICE, INTERPRETED = interpreter.DEVICE, interpreter.INTERPRETED
HALVES = (torch.bfloat16, torch.float16)
# Halfway between two numbers, of bfloat16 and of float16: 1 + 2^-8 and 1 + 2^-11 go down to 1, three times as much
# goes up. Then the largest float32 (infinity), the smallest numbers, infinities and a NaN.
CORNERS: tuple[float, ...]
CORNERS = (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 3 * 2**-8, 3.4028235e38, 1e-45, 1e-40, 6e-8, 0.0)
CORNERS += (-0.0, float("inf"), -float("inf"), float("nan"), 0.1, -1e5)

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs where there is no CUDA device")


@triton.jit
def cast_kernel(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))


@triton.jit
def mask_kernel(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, (tl.load(source + i) > 0.5).to(target.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee")
    tl.store(out + at, product)


@triton.jit
def float_argument_kernel(out, epsilon, N: tl.constexpr):
    wide = tl.zeros((N,), tl.float64) + epsilon.to(tl.float64)
    tl.store(out + tl.arange(0, N), wide)


@triton.jit
def larger_magnitude(a, b):
    return tl.where(a * a > b * b, a, b)


@triton.jit
def arithmetic_kernel(source, out, N: tl.constexpr, OPERATION: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(source + i)
    if OPERATION == "add":
        x = x + x
    elif OPERATION == "fma":
        x = tl.fma(x, x, x)
    elif OPERATION == "sum":
        x = tl.zeros((N,), tl.float32) + tl.sum(x, 0)
    elif OPERATION == "scan":
        x = tl.associative_scan(x, 0, larger_magnitude)
    tl.store(out + i, x)


@triton.jit
def offset_kernel(source, out, by, count, N: tl.constexpr, OPERATION: tl.constexpr):
    i = tl.arange(0, N)
    offset = tl.load(source + i, mask=i < count, other=0)
    if OPERATION == "add":
        offset = offset + by
    elif OPERATION == "sub":
        offset = offset - by
    else:
        offset = offset * by
    tl.store(out + i, offset)


@triton.jit
def smaller_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, tl.where(x < y, x, y))


@triton.jit
def mixed_kernel(a, b, number, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, one = tl.load(a + i), tl.load(b + i), tl.load(number)
    tl.store(out + i, tl.where(x > y, (x - y) * one, y * x))


@triton.jit
def descriptor_kernel(source, target, row, column):
    block = source.load([row, column])
    tl.debug_barrier()
    target.store([row, column], block)


@triton.jit
def compose(a, b, c, d):  # first a·x + b, then c·x + d
    return a * c, b * c + d


@triton.jit
def scan_kernel(factor, shift, factors, shifts, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.associative_scan((tl.load(factor + i), tl.load(shift + i)), 0, compose)
    tl.store(factors + i, total[0])
    tl.store(shifts + i, total[1])


@triton.jit
def loop_kernel(source, out, last, N: tl.constexpr):
    i = tl.arange(0, N)
    sums = tl.cumsum(tl.load(source + i), 0)
    total = tl.zeros((N,), tl.float32)
    for k in tl.range(1, last, flatten=True):
        for _ in tl.range(0, k):
            total += sums
    tl.store(out + i, total)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with zeros of equal sign; NaN equals NaN."""
    return torch.equal(a.nan_to_num(777.0), b.nan_to_num(777.0)) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of the largest float32 in float16
@pytest.mark.parametrize("dtype", HALVES)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Fails without the repair of casts to bfloat16: 1 + 3·2^-8 is cut off instead of rounded up."""
    source = torch.tensor(CORNERS, device=DEVICE)
    target = torch.empty_like(source, dtype=dtype)
    cast_kernel[(1,)](source, target, source.numel())
    expected = source.to(dtype)
    finite = ~source.isnan()  # the sign of a NaN is nobody's business
    assert same_bits(target[finite], expected[finite])
    assert target[~finite].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int32])
def test_casts_between_halves_and_other_types(dtype: torch.dtype, other: torch.dtype) -> None:
    """Fails without the repair of casts: an integer becomes the bfloat16 that has its bits, and the other way round."""
    source = torch.arange(-8, 8, device=DEVICE)
    there, back = source.to(other), source.to(dtype)
    cast_kernel[(1,)](there, back.zero_(), source.numel())
    assert torch.equal(back, source.to(dtype))
    cast_kernel[(1,)](back, there.zero_(), source.numel())
    assert torch.equal(there, source.to(other))


@pytest.mark.parametrize("dtype", HALVES)
def test_masks_become_zeros_and_ones(dtype: torch.dtype) -> None:
    """Fails without the repair of casts to bfloat16: true becomes the number whose bits are 1."""
    source = torch.linspace(0, 1, 16, device=DEVICE)
    target = torch.empty_like(source, dtype=dtype)
    mask_kernel[(1,)](source, target, 16)
    assert torch.equal(target, (source > 0.5).to(dtype))


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_dot(dtype: torch.dtype) -> None:
    """Fails without the repair of dot: products of bfloat16 bits are of the order of 10^8."""
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_float_arguments_are_float32() -> None:
    """Fails without the repair of arguments: a Python float has no `.to`, and would keep 64 bits."""
    out = torch.empty(4, dtype=torch.float64, device=DEVICE)
    float_argument_kernel[(1,)](out, 0.1, 4)
    assert torch.equal(out, torch.full_like(out, torch.tensor(0.1).item()))


def test_comparison_of_bfloat16() -> None:
    """Fails without the repair of comparisons: as unsigned integers, negative numbers are the largest."""
    a = torch.linspace(-1, 1, 16, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    smaller_kernel[(1,)](a, -a, out, 16)
    assert torch.equal(out, -a.abs())


@pytest.mark.parametrize("dtype", (*HALVES, torch.int32, torch.float32))
def test_operands_of_two_types(dtype: torch.dtype) -> None:
    """Fails if a block of another type, or a single number of it, is not made float32 first: as bits it is another."""
    a = torch.arange(-6.5, 9.5, device=DEVICE)
    b = torch.arange(8, -8, -1, device=DEVICE).to(dtype)
    out = torch.empty_like(a)
    mixed_kernel[(1,)](a, b, b[5:6], out, 16)
    assert torch.equal(out, torch.where(a > b, (a - b) * 3, b * a))  # few binary digits: nothing is rounded


@needs_interpreter
@pytest.mark.parametrize("operation", ["add", "fma", "sum", "scan"])
def test_arithmetic_on_bfloat16_is_refused(operation: str) -> None:
    """Fails without the repairs that refuse: such a kernel would calculate with bits, unnoticed."""
    source = torch.ones(16)
    out = torch.empty_like(source)
    arithmetic_kernel[(1,)](source, out, 16, operation)  # float32 is welcome
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast them to float32 first"):
        arithmetic_kernel[(1,)](source.bfloat16(), out.bfloat16(), 16, operation)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
def test_descriptors_stay_inside_the_tensor(dtype: torch.dtype) -> None:
    """Fails if a descriptor reads or writes beyond the last row or column: neighbours of the view would change."""
    source = torch.arange(24 * 48, device=DEVICE).reshape(24, 48).to(dtype)
    target = torch.full_like(source, 7)
    blocks = (TensorDescriptor.from_tensor(x[:20, :40], [16, 32]) for x in (source, target))
    descriptor_kernel[(1,)](*blocks, 16, 32)
    expected = torch.full_like(source, 7)
    expected[16:20, 32:40] = source[16:20, 32:40]
    assert torch.equal(target, expected)


def test_associative_scan_of_pairs() -> None:
    """Fails if a scan with a combination of our own mixes up its operands: composing lines does not commute."""
    torch.manual_seed(0)
    factor, shift = torch.rand(2, 8, device=DEVICE)
    factors, shifts = torch.empty_like(factor), torch.empty_like(shift)
    scan_kernel[(1,)](factor, shift, factors, shifts, 8)
    x = torch.zeros((), device=DEVICE)
    for i in range(8):
        x = x * factor[i] + shift[i]
        torch.testing.assert_close(shifts[i], x)
    torch.testing.assert_close(factors, factor.cumprod(0))


def test_flattened_loops_and_cumulative_sums() -> None:
    """Fails if tl.range with flatten=True or tl.cumsum does something else than without."""
    source = torch.arange(8.0, device=DEVICE)
    out = torch.empty_like(source)
    loop_kernel[(1,)](source, out, 4, 8)
    assert torch.equal(out, source.cumsum(0) * 6)


@needs_interpreter
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_overflow_is_found(operation: str) -> None:
    """Fails if the cheap check misses an offset that leaves 32 bits at either end, or refuses the last that fits."""
    largest = 2**31 - 1
    numbers, by = {"add": (largest - 3, 1), "sub": (-largest + 2, 1), "mul": (largest // 3 - 2, 3)}[operation]
    source = torch.full((4,), numbers, dtype=torch.int32)
    source += torch.arange(4, dtype=torch.int32) * (-1 if operation == "sub" else 1)
    out = torch.empty_like(source)
    offset_kernel[(1,)](source, out, by, 3, 4, operation)  # the first three fit
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"overflow detected for operation {operation}"):
        offset_kernel[(1,)](source, out, by, 4, 4, operation)


@needs_interpreter
@pytest.mark.parametrize("fails", [False, True])
def test_the_language_is_its_own_again(fails: bool) -> None:
    """Fails if a kernel leaves the interpreter's operations in the language: nothing could be compiled after it."""
    source = torch.ones(16, dtype=torch.bfloat16 if fails else torch.float32)
    with pytest.raises(triton.runtime.errors.InterpreterError) if fails else nullcontext():
        arithmetic_kernel[(1,)](source, torch.empty_like(source), 16, "sum")
    operations = interpreter_speed.interpreted_operations()
    assert operations and not any(vars(place).get(name) is value for place, name, value in operations)
