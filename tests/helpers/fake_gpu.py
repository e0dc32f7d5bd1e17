"""A GPU of generation 9.0 that is not there: kernels are bound and looked up for it, neither compiled nor launched.

As a plugin of pytest it runs the tests that are marked for a GPU, without one and without their comparisons:

    TRITON_INTERPRET= python -m pytest -p tests.helpers.fake_gpu -m gpu tests/kernels

All else of them runs: their inputs and references, the choice of tiles, grids and descriptors, the arguments of every
kernel, autograd. Results are whatever is in memory, so shapes and dtypes are all that is compared.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from atpo_kernels.linear_logprob import launch as head_launch
from atpo_kernels.linear_turn_policy_loss import launch as fused_launch
from atpo_kernels.tree_attention import launch as attention_launch
from atpo_kernels.turn_policy_loss import tiles as loss_tiles
from tests.helpers import attention_precision, turn_loss_cases

TARGET = "sm_90"
COMPARISONS = ("assert_within", "assert_no_less_precise", "assert_equal")  # of the tests marked for a GPU
SIZES = {"HEAD": (300, 136, 700), "ROWS": ((1, 0), (150, 65))}
"""Smaller inputs, since nothing that is calculated is compared."""
variants: Counter[str] = Counter()
"""How often Triton would have compiled a kernel of a name."""


class FakeDriver:
    """A driver of a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


class Launched:
    """A kernel that does nothing."""

    function, packed_metadata = None, None

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None


def count(self, key, *_):
    """Note a variant where Triton would compile it."""
    variants[self.fn.__name__] += 1
    kernel = self.device_caches[0][0][key] = Launched()
    return kernel


def kept_rows(self, grad_logprob, start, rows) -> None:
    """Launch the search for rows with gradient, and find a random number of them."""
    fused_launch._kept_rows_kernel[(1,)](grad_logprob, self.index, self.count, start, rows, BLOCK=1024, num_warps=8)
    self.number = random.randint(0, rows)
    self.index[: self.number] = torch.arange(self.number)


def pretend_to_be_a_gpu() -> None:
    """Choose the tiles of a GPU for CPU tensors, and Triton's kernels without a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"  # operators then take CPU tensors; the kernels, imported before, are compiled
    driver.set_active(FakeDriver())
    JITFunction._do_compile = count
    for module in (head_launch, attention_launch):
        module.target_of, module.processors = (lambda _: TARGET), (lambda _: 132)  # type: ignore[attr-defined]
    for table in (loss_tiles._PACKED_BLOCKS, loss_tiles._PADDED_BLOCKS, loss_tiles._FINISH_BLOCKS):
        table.clear()  # type: ignore[attr-defined]
    fused_launch.KeptRows.find = kept_rows  # type: ignore[method-assign]
    fused_launch.KeptRows.wait = lambda self: self.number  # type: ignore[method-assign, attr-defined]


def same_shapes(values, expected, *_, **__) -> None:
    """Take the place of a comparison: the shapes have to agree, and nothing may be on another device."""
    pairs = [(values, expected)] if isinstance(values, torch.Tensor) else zip(values, expected, strict=True)
    for value, truth in pairs:
        assert value.shape == truth.shape and value.device == truth.device


def no_bounds(*arguments: object, **_: object) -> list[SimpleNamespace]:
    """Take the place of the bounds of some results, the last list among the arguments; they would cost most of all."""
    lists = [x for x in arguments if isinstance(x, list)]
    return [SimpleNamespace(worst=0.0)] * len(lists[-1])


STAND_INS: dict[str, object] = {
    **dict.fromkeys(COMPARISONS, same_shapes),
    **dict.fromkeys(("attention_bounds", "head_bounds", "linear_loss_bounds"), no_bounds),
    "loss_bounds": lambda *_, **__: defaultdict(SimpleNamespace),
    **SIZES,
}


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for the GPU before any test module is imported."""
    pretend_to_be_a_gpu()
    torch.Tensor.cuda = torch.Tensor.clone  # type: ignore[method-assign, assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that are marked for a GPU, without their comparisons."""
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        item.own_markers = [mark for mark in item.own_markers if mark.name != "skipif"]
        for module in (item.module, attention_precision, turn_loss_cases):  # type: ignore[attr-defined]
            for name in STAND_INS.keys() & vars(module).keys():
                setattr(module, name, STAND_INS[name])
