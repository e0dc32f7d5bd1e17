"""The check at the start of a run: a small packed tree against its trajectories, on the model that is trained.

See docs/supported_models.md#the-check-at-the-start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from atpo_fast.common.errors import InputError
from atpo_fast.models.layers import describe_layers
from atpo_fast.objective import Objective
from atpo_fast.packing import pack_trees
from atpo_fast.policy import Policy
from atpo_fast.policy.plain import perturbed
from atpo_fast.tree import TurnTree
from atpo_fast.tree.packed_rows import PackedTrees

BEYOND_ROUNDING = 5.0
"""How many times the tree may differ as much as a disturbance of every layer by the dtype's rounding does; right trees
of 19 architectures in float32 and bfloat16 differ at most half of that (tests/train/test_packing_check.py)."""
_LONGEST = 8192  # tokens of a path, unless a window is longer: then it is not reached
_TURN = 8  # tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over the action tokens, in nats: a token that rounding sends to another expert is no outlier in them."""

    difference: float
    """Between the log-probs of the packed tree and of the flat trajectories."""
    rounding: float
    """Between those of the flat trajectories and the same with every layer's output rounded otherwise; at least the
    spacing of the log-probs' own numbers, which a model of small weights does not leave."""

    def __str__(self) -> str:
        """Say both in words."""
        return f"log-probs differ by {self.difference:.1e} nats, rounding explains {self.rounding:.1e}"

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= BEYOND_ROUNDING * self.rounding  # and False for NaN


def check_packing(model: nn.Module, policy: Policy, device: torch.device) -> Comparison:
    """Compare, and raise InputError where the packed tree differs by more than rounding.

    Args:
        model: the policy, or DeepSpeed's engine around it; under ZeRO-3 every rank calls.
        policy: the policy.
        device: where the model wants its rows.
    """
    found = compare(model, policy, device)
    if not found.passed:
        raise InputError(
            f"{policy.model.config.model_type}: the log-probs of a packed tree differ by {found.difference:.2g} nats "
            f"from those of its trajectories through transformers, where rounding explains {found.rounding:.2g}. The "
            "architecture is computed wrongly on trees; please report it. train.check_packing=false trains all the same"
        )
    return found


@torch.no_grad()
def compare(model: nn.Module, policy: Policy, device: torch.device) -> Comparison:
    """Score a tree whose paths are longer than every window, packed and trajectory by trajectory."""
    training = model.training
    model.eval()
    config, half_ulp = policy.model.config, torch.finfo(policy.model.dtype).eps / 2
    tree = _tree(config.vocab_size, max(layer.window or 0 for layer in describe_layers(config)))
    row = _pack(tree).to(device)
    packed = _by_turn(row, model(row)[0])
    differences, roundings, flats = [], [], []
    for leaf in tree.leaves:
        path = tree.path(leaf)
        row = _pack(_alone(tree, path)).to(device)
        flat = model(row, plain=True)
        with perturbed(policy.model, half_ulp):
            roundings.append(model(row, plain=True) - flat)
        flats.append(flat)
        differences += [logprob - packed[path[turn]] for turn, logprob in _by_turn(row, flat).items()]
    model.train(training)
    difference, rounding, size = (float(torch.cat(x).double().abs().median()) for x in (differences, roundings, flats))
    return Comparison(difference, max(rounding, size * torch.finfo(flats[0].dtype).eps))


def _tree(vocabulary: int, window: int) -> TurnTree:
    """Make a tree of random tokens: four turns, three trajectories, turns on either side of a window's length."""
    rng = np.random.default_rng(0)

    def tokens(count: int = _TURN) -> list[int]:
        return rng.integers(0, vocabulary, count).tolist()

    tree = TurnTree(tokens(min(window, _LONGEST) + 2 * _TURN))
    first = tree.add_turn(0, tokens(), observation_ids=tokens())
    tree.add_turn(first, tokens())
    tree.add_turn(tree.add_turn(first, tokens(), observation_ids=tokens(3)), tokens())
    tree.add_turn(0, tokens())
    return tree


def _alone(tree: TurnTree, path: Sequence[int]) -> TurnTree:
    """Copy one trajectory into a tree of its own."""
    alone = TurnTree(tree.turns[0].observation_ids)
    for parent, turn in enumerate(tree.turns[n] for n in path[1:]):
        alone.add_turn(parent, turn.action_ids, observation_ids=turn.observation_ids)
    return alone


def _pack(tree: TurnTree) -> PackedTrees:
    tree.advantages = np.ones(len(tree))
    (row,) = pack_trees([tree], Objective.preset("at2po"), tree.unique_tokens)
    return row


def _by_turn(row: PackedTrees, logprob: Tensor) -> dict[int, Tensor]:  # (A,)
    return dict(zip(row.turn_index.tolist(), logprob.split(row.turn_offsets.diff().tolist()), strict=True))
