"""Gradients of packed trees and of flat trajectories for every family; writes the table of docs/supported_models.md.

python -m tests.helpers.family_table
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.policy import Policy
from tests.helpers.families import FAMILIES, VOCAB, make
from tests.helpers.flat_reference import flat_loss, flatten
from tests.helpers.hybrid_models import in_float64

PAGE = Path(__file__).resolve().parents[2] / "docs/supported_models.md"
HEADER = (
    "| family | layers | checkpointing | float64: tree − flat | bfloat16: tree − flat | tree − exact | flat − exact |"
)
OBJECTIVE = Objective.preset("at2po", clip_low=5.0, clip_high=5.0, entropy_coef=0.01)
Gradients = dict[str, Tensor]


def forest() -> list[TurnTree]:
    """Two trees whose paths are several windows long, with siblings of unequal lengths."""
    rng = np.random.default_rng(3)
    out = []
    for t, prompt in enumerate((7, 15)):
        tree = TurnTree(rng.integers(0, VOCAB, prompt), question_id=str(t))
        a = tree.add_turn(0, rng.integers(0, VOCAB, 5), observation_ids=rng.integers(0, VOCAB, 6))
        b = tree.add_turn(a, rng.integers(0, VOCAB, 1), observation_ids=rng.integers(0, VOCAB, 4))
        leaves = [
            tree.add_turn(b, rng.integers(0, VOCAB, 9)),
            tree.add_turn(b, rng.integers(0, VOCAB, 2)),
            tree.add_turn(a, rng.integers(0, VOCAB, 4)),
            tree.add_turn(0, rng.integers(0, VOCAB, 3)),
        ]
        for leaf, reward in zip(leaves, (1.0, 0.0, 0.5, 0.0), strict=True):
            tree.set_reward(leaf, reward)
        out.append(tree)
    assign_credit(out)
    return out


@cache
def flat_gradients(name: str, dtype: torch.dtype = torch.float64, rounded: bool = False) -> Gradients:
    """Loss and gradients of the flat trajectories through transformers' own model, one at a time."""
    model = make(name, dtype, rounded)

    def logits(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        return model(input_ids=ids[None], use_cache=False).logits[0].double()

    loss = flat_loss(logits, flatten(forest()), OBJECTIVE)
    loss.backward()
    return collect(model, loss)


def packed_gradients(name: str, dtype: torch.dtype) -> Gradients:
    """Loss and gradients of the trees in one row."""
    policy = Policy(make(name, dtype))
    (row,) = pack_trees(forest(), OBJECTIVE, 4096, dtype=torch.promote_types(dtype, torch.float32))
    loss = policy(row, OBJECTIVE).loss
    loss.backward()
    return collect(policy.model, loss)


def collect(model: torch.nn.Module, loss: Tensor) -> Gradients:
    """Loss and the gradients of the parameters that have one, in float64."""
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().double()}


def difference(a: Gradients, b: Gradients) -> float:
    """Relative difference of all gradients as one vector."""
    names = [name for name in b if name != "loss"]
    squares = [[float((x[n] - y[n]).square().sum()) for n in names] for x, y in ((a, b), (b, {n: 0 * b[n] for n in b}))]
    return (sum(squares[0]) / sum(squares[1])) ** 0.5


def measure(name: str) -> tuple[float, ...]:
    """The numbers of a family's row."""
    with in_float64():
        in_double = difference(packed_gradients(name, torch.float64), flat_gradients(name))
        exact = flat_gradients(name, rounded=True)
    tree, flat = packed_gradients(name, torch.bfloat16), flat_gradients(name, torch.bfloat16)
    return in_double, difference(tree, flat), difference(tree, exact), difference(flat, exact)


def row(name: str, numbers: Sequence[str]) -> str:
    """One line of the table."""
    family = FAMILIES[name]
    return "| " + " | ".join([family.title, family.about, ", ".join(family.checkpointing), *numbers]) + " |"


def main() -> None:
    """Measure every family and put the table in its place on the page."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for name in FAMILIES:
        double, *half = measure(name)
        lines.append(row(name, [f"{double:.0e}", *(f"{x:.1%}" for x in half)]))
        print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text().partition(HEADER)
    after = rest.partition("\n\n")[2]
    PAGE.write_text(before + "\n".join(lines) + "\n\n" + after)


if __name__ == "__main__":
    main()
