"""The gradient does not depend on ranks, rows, accumulation or ZeRO stage (docs/design.md#loop)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.helpers.distributed_gradients import ALONE, CHECKPOINTED, WITH_STATES, cases, write_gradients
from tests.helpers.families import FAMILIES
from tests.helpers.forked_runs import fork_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Gradients of every case on each of its numbers of ranks, by file stem."""
    folder = tmp_path_factory.mktemp("gradients")
    for ranks in (1, 2, 3):
        fork_ranks(write_gradients, ranks, folder)
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


def names(wanted: str) -> list[str]:
    """Names of the cases of a pattern, each with every number of ranks on which it runs."""
    found = [f"{name}_ranks{count}" for name, ranks, _ in cases() for count in ranks if re.fullmatch(wanted, name)]
    assert found
    return found


# Depth-first, ranks wait for each other and open empty rows for each other's sake.
# A wrong factor (ranks not averaged, accumulation divided twice), a row lost or doubled by spreading, a tied weight
# whose head or embedding part is dropped under partitioning: each shows as a difference far above float32 rounding.
# Five trees on three ranks: a rank that has nothing to do while the others open a row would hang, or count twice. With
# one row for all, two of them have nothing; with short rows a tree that is over the budget lies on one rank.
@pytest.mark.parametrize("tied", [0, 1])
def test_gradient_is_the_same_everywhere(gradients: dict[str, dict[str, np.ndarray]], tied: int) -> None:
    reference = gradients[f"stage0_tied{tied}_budget4096_none_ranks1"]
    for name in names(f"stage._tied{tied}_budget.*_none"):
        assert_same(gradients[name], reference, name)


# Of five questions four are filtered, as all their trajectories earn the same: ranks without a row, some or all of the
# passes of which are empty, must neither hang nor count, and the mean is over what is left.
def test_gradient_of_ranks_whose_questions_are_filtered(gradients: dict[str, dict[str, np.ndarray]]) -> None:
    reference = gradients["filtered_stage0_budget4096_none_ranks1"]
    for name in names("filtered_stage3_budget.*_layer"):
        assert_same(gradients[name], reference, name)


# Layers, or their MLPs, computed again over some of the tokens only, inside a backward in which parameters are gathered
# and released.
@pytest.mark.parametrize("choice", CHECKPOINTED)
@pytest.mark.parametrize(("tied", "budget"), [(1, "40"), (0, "deep")])
def test_checkpointing_under_partitioning(
    gradients: dict[str, dict[str, np.ndarray]], tied: int, budget: str, choice: str
) -> None:
    reference = gradients[f"stage0_tied{tied}_budget4096_none_ranks1"]
    for name in names(f"stage3_tied{tied}_budget{budget}_{choice}"):
        assert_same(gradients[name], reference, name)


# Every family, in rows that continue others and with checkpointing; experts, windows, capped logits, layers that share
# keys. Fails if a gradient depends on where weights lie, on how trees are cut, or on which rank a token's experts run.
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_under_partitioning(gradients: dict[str, dict[str, np.ndarray]], family: str) -> None:
    assert_same(gradients[f"{family}_stage3_cut_ranks2"], gradients[f"{family}_{ALONE}_ranks1"], family, tolerance=1e-9)


# Layers with a state use the weights of their convolution without calling it: partitioned, those must be gathered too.
@pytest.mark.parametrize("family", WITH_STATES)
def test_layers_with_a_state_under_partitioning(gradients: dict[str, dict[str, np.ndarray]], family: str) -> None:
    assert_same(gradients[f"{family}_stage3_ranks2"], gradients[f"{family}_{ALONE}_ranks1"], family, tolerance=1e-9)


# The loss of the routers is over the unique tokens of all ranks. Fails if a rank takes its own tokens for all of them,
# or if the factor that undoes DeepSpeed's mean over ranks is missing.
def test_losses_of_routers_are_over_all_ranks(gradients: dict[str, dict[str, np.ndarray]]) -> None:
    reference = gradients[f"routers_{ALONE}_ranks1"]
    for ranks in (1, 2):
        assert_same(gradients[f"routers_stage3_ranks{ranks}"], reference, ranks, tolerance=1e-9)
    without, router = gradients[f"qwen3-moe_{ALONE}_ranks1"], "model.layers.0.mlp.gate.weight"
    assert np.abs(reference[router] - without[router]).max() > 1e-3 * np.abs(without[router]).max()


# The same for FusedLinearTurnPolicyLoss in the head of another trainer, called in the policy's forward or after it: a
# weight that is partitioned when the loss or the backward runs, a loss_type "dapo" whose mean is not over all ranks.
@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("inside", [0, 1])
def test_module_in_another_trainer(gradients: dict[str, dict[str, np.ndarray]], tied: int, inside: int) -> None:
    reference = gradients[f"module_stage0_tied{tied}_inside1_ranks1"]
    for name in names(f"module_stage._tied{tied}_inside{inside}"):
        assert_same(gradients[name], reference, name)


def assert_same(
    other: dict[str, np.ndarray], reference: dict[str, np.ndarray], *case: object, tolerance: float = 5e-6
) -> None:
    """Every parameter's gradient to a part of its largest entry; the default is rounding of float32."""
    assert max(np.abs(g).max() for g in reference.values()) > 1e-4  # a fifth of the questions leaves 6e-4
    assert other.keys() == reference.keys()
    for name, value in reference.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(other[name], value, rtol=0, atol=tolerance * scale, err_msg=f"{case} {name}")
