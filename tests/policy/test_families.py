"""Every family of models on packed trees equals transformers on flat trajectories, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, Llama4TextConfig, LlamaConfig

from atpo_fast import pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import depth_first
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.policy.attention import check_supported
from tests.helpers.families import FAMILIES, SIZES, WINDOW, make
from tests.helpers.family_table import (
    HEADER,
    OBJECTIVE,
    PAGE,
    Gradients,
    collect,
    flat_gradients,
    forest,
    packed_gradients,
    row,
)
from tests.helpers.hybrid_models import in_float64

EXACT = 1e-9  # of the largest gradient; float64 leaves about 1e-14


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)  # or trees as small as these would rather repeat their ancestors
    with in_float64():
        yield


def assert_flat(name: str, found: Gradients) -> None:
    expected = flat_gradients(name)
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=EXACT * largest)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_packed_tree_equals_its_flat_trajectories(name: str) -> None:
    """Fails if a family's layers get another window, cap, sink or scale than transformers gives them, if its windows
    count siblings, or its logits are made in another way."""
    assert_flat(name, packed_gradients(name, torch.float64))


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, family in FAMILIES.items() for choice in family.checkpointing]
)
def test_rows_with_prefixes_and_checkpointing(name: str, choice: GradientCheckpointing) -> None:
    """Fails if a window does not reach into the rows above or reaches too far, if a gradient of keys that layers share
    is lost, or if what is computed again leaves out a token that a window needs."""
    rows = pack_trees(forest(), OBJECTIVE, 20, dtype=torch.float64, max_prefix=500)
    assert max(row.prefix_tokens for row in rows) > 2 * WINDOW
    policy = Policy(make(name), gradient_checkpointing=choice).train()
    loss = accumulate_gradients(policy, rows, OBJECTIVE)
    assert_flat(name, collect(policy.model, loss))


def test_shared_keys_are_not_computed_again() -> None:
    """Fails if layers whose keys come from another layer are checkpointed: their gradients would be lost in silence."""
    with pytest.raises(ValueError, match=r"last 2 layers read keys.*gradient_checkpointing=mlp"):
        Policy(make("gemma4-small"), gradient_checkpointing="layer")


def test_what_trees_do_not_run_through_is_refused_by_layer() -> None:
    """Fails if chunked attention, a state beside the attention, dropout or frequencies by length are computed as if
    they were something else."""
    chunked = Llama4TextConfig(
        **SIZES,
        head_dim=8,
        num_hidden_layers=4,
        num_local_experts=2,
        intermediate_size_mlp=16,
        no_rope_layers=[1, 1, 1, 0],
    )
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    cases = [
        (chunked, "layers 0-2 of type chunked_attention: not supported on trees"),
        (FalconH1Config(num_hidden_layers=2), "layers 0-1 of type hybrid: not supported on trees"),
        (LlamaConfig(**SIZES, num_hidden_layers=1, attention_dropout=0.1), "attention_dropout=0.1"),
        (LlamaConfig(**SIZES, num_hidden_layers=1, rope_parameters=rope), "rope_type=dynamic"),
    ]
    for config, message in cases:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match=message):
            check_supported(model)


def test_a_state_beside_the_attention_is_refused() -> None:
    """Fails if a layer that the configuration calls attention also mixes tokens in another way."""
    model = make("llama")
    model.model.layers[1].self_attn.mix = torch.nn.Conv1d(32, 32, 4)
    with pytest.raises(ValueError, match="layer 1: a recurrent or convolutional part beside the attention"):
        check_supported(model)


def test_a_window_that_only_the_masks_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an architecture that keeps its window from the attention function runs with full attention."""
    model = make("gemma3")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    (packed,) = pack_trees(forest(), OBJECTIVE, 4096, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"layer 0 attends with sliding_window=None.*says {WINDOW}"):
        Policy(model)(packed)


def test_the_page_has_every_family() -> None:
    """Fails if docs/supported_models.md names other families than are tested, or says something else of one."""
    lines = PAGE.read_text().partition(HEADER)[2].strip().splitlines()[1:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    assert len(table) == len(FAMILIES)
    for line, name in zip(table, FAMILIES, strict=True):
        numbers = [cell.strip() for cell in line.split("|")[4:-1]]
        assert line == row(name, numbers)
        assert float(numbers[0]) <= EXACT
