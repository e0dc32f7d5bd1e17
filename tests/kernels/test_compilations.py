"""No kernel is compiled at a step that nobody could foresee: counted under a fake driver, on the sizes of a GPU."""

from __future__ import annotations

import json

import pytest

from tests.helpers.compiled_kernels import call_with_compiler
from tests.helpers.forked_runs import ForkedProcess, finish

pytest.importorskip("triton")


def test_no_length_finds_a_kernel_uncompiled() -> None:
    """Fails if a kernel is specialised on a number of rows, of ranges or of turns, on a block that lengths decide, or
    on where a slice of a batch begins: ranks would then compile for seconds, each at another step."""
    output = finish(ForkedProcess(call_with_compiler, "tests.helpers.compilations", "main", 12))
    found = json.loads(output.splitlines()[-1])
    assert found["others"] == {}
    # one for each dtype and: stored or not; without entropy or with it; the sums of a loss; the blocks of a turn;
    # attention alone or with a window, sinks and a cap
    kinds = {"_statistics_kernel": 2, "_gradient_kernel": 2, "_softmax_gradient_kernel": 2, "_rows_kernel": 3}
    kinds |= {"_forward_kernel": 2, "_query_gradient_kernel": 2, "_key_gradient_kernel": 2, "_key_sum_kernel": 1}
    assert {name: found["first"][name] for name in kinds} == {name: 3 * number for name, number in kinds.items()}
    assert found["first"]["_merge_kernel"] == found["first"]["_kept_rows_kernel"] == 1
