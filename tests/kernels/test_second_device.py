"""Nothing of the operators or of their tests is left behind on the CPU: found on a second device, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.devices import DEVICE
from tests.helpers.forked_runs import ForkedProcess, finish, run_tests
from tests.helpers.second_device import DEVICE as SECOND
from tests.helpers.second_device import Elsewhere, SecondDevice

pytest.importorskip("triton")

# One test of every helper and operator; all others pass there too, but take minutes.
CHOSEN = {
    "test_turn_policy_loss_triton.py": (
        "test_padded_clips[turn-clip3]", "test_clip_ranges_of_turns[turn-hard]", "test_denominator[token-mean]",
        "test_few_packed_tokens[[0, 1, 0]-sequence]", "test_same_bits_every_time[turn]",
    ),
    "test_linear_logprob_triton.py": ("test_peaked_logits[torch.bfloat16-8.0]", "test_strided_inputs"),
    "test_linear_turn_policy_loss_triton.py": (
        "test_as_precise_as_plain_pytorch[torch.bfloat16-turn]", "test_sequences_in_one_pass_where_they_fit[lengths1]",
    ),
    "test_tree_attention_triton.py": ("test_lengths[63]", "test_prefixes[1-64]"),
    "test_interpreter.py": ("test_descriptors_stay_inside_the_tensor[dtype0]",),
}  # fmt: skip
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="tests on a GPU or a second device need no second one")


@needs_cpu
def test_kernel_tests_leave_nothing_on_the_cpu() -> None:
    """Fails if an operator, its test or a helper combines tensors of two devices, as none can on a GPU."""
    chosen = [f"tests/kernels/{file}::{name}" for file, names in CHOSEN.items() for name in names]
    output = finish(ForkedProcess(run_tests, ["-q", "-p", "no:cacheprovider", *chosen], {"ATPO_TEST_DEVICE": SECOND}))
    assert f"{len(chosen)} passed" in output


@needs_cpu
def test_the_second_device_is_one() -> None:
    """Fails if tensors of both devices may be combined, a result comes to lie elsewhere, or numbers are lost."""
    with SecondDevice():
        there = torch.tensor([1.0, 2.0], device=SECOND).requires_grad_()
        assert isinstance(there, Elsewhere) and there.device.type == SECOND
        (gradient,) = torch.autograd.grad((there * 3).sum(), there)
        assert gradient.device.type == SECOND and gradient.cpu().tolist() == [3.0, 3.0]
        assert torch.zeros(2, device=SECOND).add_(2).tolist() == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        assert (there + torch.ones(())).tolist() == [2.0, 3.0]  # PyTorch takes single numbers from anywhere
