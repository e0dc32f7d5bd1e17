"""The check at the start of a run: a small packed tree against its trajectories, on the model that is trained.

See docs/supported_models.md#the-check-at-the-start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
_LONGEST_WITH_GRADIENT = 256  # which needs the memory of all layers, and is several blocks of the kernels
_TURN = 8  # tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over tokens: a token that rounding sends to another expert is no outlier in them."""

    compared: str
    """Name of what is compared."""
    unit: str
    """Unit of the two numbers."""
    difference: float
    """Between the packed tree and the flat trajectories."""
    rounding: float
    """Between the flat trajectories and the same with every layer's output rounded otherwise; at least the spacing of
    the numbers themselves, which a model of small weights does not leave."""

    def __str__(self) -> str:
        """Say both in words."""
        return f"{self.compared} differ by {self.difference:.1e} {self.unit}, rounding explains {self.rounding:.1e}"

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= BEYOND_ROUNDING * self.rounding  # and False for NaN


def check_packing(policy: Policy, device: torch.device) -> list[Comparison]:
    """Compare log-probs and gradients, and raise InputError where the packed tree differs by more than rounding.

    The policy is called itself, without DeepSpeed's engine, which would count the pass as one of training. ZeRO-3
    gathers weights by hooks of the policy's own modules; every rank calls.

    Args:
        policy: the policy.
        device: where it wants its rows.
    """
    passed = []
    for compare in (compare_logprobs, compare_gradients):
        found = compare(policy, device)
        if not found.passed:
            raise InputError(
                f"{policy.model.config.model_type}: the {found.compared} of a packed tree differ by "
                f"{found.difference:.2g} {found.unit} from those of its trajectories through transformers, where "
                f"rounding explains {found.rounding:.2g}. The architecture is computed wrongly on trees; please report "
                "it. train.check_packing=false trains all the same"
            )
        passed.append(found)
    return passed


@torch.no_grad()
def compare_logprobs(policy: Policy, device: torch.device) -> Comparison:
    """Score a tree whose paths are longer than every window, packed and trajectory by trajectory."""
    config = policy.model.config
    window = max(layer.window or 0 for layer in describe_layers(config))
    tree = _tree(config.vocab_size, min(window, _LONGEST))
    row = _pack(tree).to(device)
    differences, roundings, flats = [], [], []
    with _evaluating(policy):
        packed = _by_turn(row, policy(row)[0])
        for leaf in tree.leaves:
            path = tree.path(leaf)
            row = _pack(_alone(tree, path)).to(device)
            flat = policy(row, plain=True)
            with _rounded_otherwise(policy.model):
                roundings.append(policy(row, plain=True) - flat)
            flats.append(flat)
            differences += [logprob - packed[path[turn]] for turn, logprob in _by_turn(row, flat).items()]
    difference, rounding, size = (float(torch.cat(x).double().abs().median()) for x in (differences, roundings, flats))
    return Comparison("log-probs", "nats", difference, max(rounding, size * torch.finfo(flats[0].dtype).eps))


def compare_gradients(policy: Policy, device: torch.device) -> Comparison:
    """Compare gradients of the sum of the log-probs of all trajectories: those of the embeddings of the tokens.

    They have come through all layers. No parameter gets a gradient.
    """
    tree = _tree(policy.model.config.vocab_size, _LONGEST_WITH_GRADIENT)
    row = _pack(tree).to(device)
    rows = [_pack(_alone(tree, tree.path(leaf))).to(device) for leaf in tree.leaves]
    tokens = row.input_ids.unique()

    def flat() -> Tensor:  # (U, D)
        return torch.stack([_gradient(policy, one, tokens, plain=True) for one in rows]).sum(0)

    with _evaluating(policy):
        packed = _gradient(policy, row, tokens, plain=False)
        written_out = flat()
        with _rounded_otherwise(policy.model):
            disturbed = flat()
    difference, rounding = (_relative(other, written_out) for other in (packed, disturbed))
    return Comparison("gradients", "of their size", difference, max(rounding, torch.finfo(policy.model.dtype).eps))


def _gradient(policy: Policy, row: PackedTrees, tokens: Tensor, *, plain: bool) -> Tensor:  # (U,) -> (U, D) float64
    """Compute the gradient of the log-probs for the embeddings of sorted tokens, summed where they recur."""
    leaves = []

    def cut(module: nn.Module, inputs: object, out: Tensor) -> Tensor:  # (1, T, D) -> (1, T, D)
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    hook = policy.model.get_input_embeddings().register_forward_hook(cut)
    try:
        logprob = policy(row, plain=True) if plain else policy(row)[0]
        (gradient,) = torch.autograd.grad((logprob * row.trajectory_count).sum(), leaves)
    finally:
        hook.remove()
    found = gradient.new_zeros(len(tokens), gradient.shape[-1], dtype=torch.float64)
    return found.index_add_(0, torch.searchsorted(tokens, row.input_ids), gradient[0].double())


def _relative(one: Tensor, other: Tensor) -> float:  # (U, D), (U, D)
    """Compute the median difference of two lists of gradients, relative to their mean sizes; at most 2."""
    sizes = (one.norm(dim=-1) + other.norm(dim=-1)) / 2
    reached = sizes != 0  # a window may leave tokens without effect
    return float(((one - other).norm(dim=-1) / sizes)[reached].median())


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """Put the policy into evaluation mode, in which nothing is computed again."""
    training = policy.training
    policy.eval()
    yield
    policy.train(training)


def _rounded_otherwise(model: PreTrainedModel) -> AbstractContextManager[None]:
    return perturbed(model, torch.finfo(model.dtype).eps / 2)


def _tree(vocabulary: int, window: int) -> TurnTree:
    """Make a tree of random tokens: four turns, three trajectories, turns on either side of a window's length."""
    rng = np.random.default_rng(0)

    def tokens(count: int = _TURN) -> list[int]:
        return rng.integers(0, vocabulary, count).tolist()

    tree = TurnTree(tokens(window + 2 * _TURN))
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
