"""Trees over the row budget, computed depth-first with their ancestors' keys and values.

See docs/design.md#opened-rows.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import PackedTrees, depth_first, empty_row, spread_rows
from atpo_fast.policy import Policy, accumulate_gradients, score_rows
from atpo_fast.policy.opened_rows.plan import Pass, plan_passes
from atpo_fast.policy.opened_rows.prefix import OpenedRow
from tests.helpers.flat_reference import exact_norms, visible_keys
from tests.helpers.policies import MODELS, VOCAB, grad_of, make
from tests.helpers.strategies import forests

TURN = Objective.preset("at2po", clip_low=0.3, clip_high=0.3)
KL = Objective.preset("at2po", kl="k3", kl_coef=0.1)  # nothing is pruned


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise trees as small as these would rather repeat their ancestors."""
    monkeypatch.setattr(depth_first, "ROW_TOKENS", 0)


def deep_forest(count: int = 2) -> list[TurnTree]:
    """Trees of four levels with uneven branches and a turn without tokens, of about 150 tokens."""
    rng = np.random.default_rng(0)
    trees = []
    for t in range(count):
        tree = TurnTree(rng.integers(0, VOCAB, 9), question_id=str(t))
        inner = [0]
        for n in range(14):
            parent = int(inner[rng.integers(max(0, len(inner) - 4), len(inner))])
            action = rng.integers(0, VOCAB, int(rng.integers(1, 6)))
            turn = tree.add_turn(parent, action, -rng.random(len(action)), rng.integers(0, VOCAB, n % 7))
            if n % 3 != 2:
                inner.append(turn)
        silent = tree.add_turn(inner[-1], [])
        for _ in range(3):
            tree.add_turn(silent, rng.integers(0, VOCAB, 4), -rng.random(4))
        for leaf in tree.leaves:
            tree.set_reward(leaf, float(rng.integers(0, 2)))
        trees.append(tree)
    assign_credit(trees)
    return trees


def stacks(rows: list[PackedTrees]) -> Iterator[tuple[PackedTrees, list[PackedTrees]]]:
    """Every row and the opened rows above it."""
    opened: list[PackedTrees] = []
    for row in rows:
        opened = opened[: row.depth]
        yield row, opened
        opened = [*opened, row]


@settings(max_examples=50, deadline=None)
@given(trees=forests(max_turns=12), budget=st.integers(8, 16))
def test_rows_and_their_prefixes_are_the_trees(trees: list[TurnTree], budget: int) -> None:
    """Fails if a token is in two rows, a prefix is not the path above, or a predictor is not the token before."""
    rows = pack_trees(trees, KL, budget, max_prefix=1000)
    seen: Counter[tuple[int, int]] = Counter()
    for row, above in stacks(rows):
        assert row.num_tokens <= budget
        assert row.prefix_tokens == sum(other.num_tokens for other in above)
        prefix = [token for other in above for token in other.input_ids.tolist()]
        visible = visible_keys(row)
        for turn in range(row.num_turns):
            low, high = int(row.turn_offsets[turn]), int(row.turn_offsets[turn + 1])
            tree, at = trees[int(row.turn_tree[turn])], int(row.turn_index[turn])
            path = tree.path_ids(at)[: -len(tree.turns[at].observation_ids) or None].tolist()
            before = row.predictor[low:high].tolist()
            assert row.targets[low:high].tolist() == path[len(path) - (high - low) :]
            for n, query in enumerate(before):
                read = prefix + (row.input_ids[visible[query]].tolist() if query >= 0 else [])
                assert read == path[: len(path) - (high - low) + n]
                assert query < 0 or row.position_ids[query] == len(read) - 1
        seen.update(zip(row.turn_tree.tolist(), row.turn_index.tolist(), strict=True))
        mine = row.path_turns.tolist()
        assert all(0 <= turn < row.num_turns for turn in mine)
    if not any(row.unique_tokens < row.num_tokens for row in rows):  # else some tree repeats its ancestors
        assert set(seen.values()) <= {1}
    assert sum(row.unique_tokens for row in rows) == sum(tree.unique_tokens for tree in trees)
    assert sum(row.flat_tokens for row in rows) == sum(tree.flat_tokens for tree in trees)


def gradients_in(name: str, choice: GradientCheckpointing, rows: list[PackedTrees]) -> dict[str, torch.Tensor]:
    """Loss and gradients of a model over rows."""
    policy = Policy(exact_norms(make(name)), gradient_checkpointing=choice).train()
    loss = accumulate_gradients(policy, rows, TURN)
    return {n: grad_of(p) for n, p in policy.named_parameters()} | {"loss": loss}


@cache
def gradients_in_one_row(name: str) -> dict[str, torch.Tensor]:
    """The same, nothing being computed again, over one row."""
    (row,) = pack_trees(deep_forest(), TURN, 4096, dtype=torch.float64)
    return gradients_in(name, "none", [row])


CHOICES: tuple[GradientCheckpointing, ...] = ("none", "layer", "mlp")
BUDGETS = (60, 30, 12)
# every two of a model, a choice and a budget
TOGETHER = [
    (name, choice, BUDGETS[(i + j) % 3]) for (i, name), (j, choice) in product(enumerate(MODELS), enumerate(CHOICES))
]


@pytest.mark.parametrize(("name", "choice", "budget"), TOGETHER)
def test_gradients_are_those_of_one_row(name: str, choice: GradientCheckpointing, budget: int) -> None:
    """Fails if a gradient of an ancestor's keys, values or last hidden state is lost, doubled, or of another layer."""
    rows = pack_trees(deep_forest(), TURN, budget, dtype=torch.float64, max_prefix=500)
    assert sum(row.num_tokens for row in rows) == sum(tree.unique_tokens for tree in deep_forest())
    assert max(row.depth for row in rows) >= {60: 1, 30: 2, 12: 3}[budget]
    found = gradients_in(name, choice, rows)
    for parameter, value in gradients_in_one_row(name).items():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=1e-11 * float(value.abs().max()))


@pytest.mark.parametrize("level", ["token", "turn"])
def test_levels_entropy_and_kl(level: str) -> None:
    """Fails if a closed row's own loss, or a term that every token has, is lost."""
    objective = Objective.preset(
        "at2po", level=level, clip_low=0.1, clip_high=0.1, kl="k3", kl_coef=0.1, entropy_coef=0.1
    )
    gradients = []
    for budget in (4096, 20):
        policy = Policy(exact_norms(make("qwen3")))
        accumulate_gradients(
            policy, pack_trees(deep_forest(), objective, budget, dtype=torch.float64, max_prefix=500), objective
        )
        gradients.append(torch.cat([grad_of(p).flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("level", ["sequence", "turn"])
def test_trajectories_that_have_to_lie_whole_in_a_row_repeat_their_ancestors(level: str) -> None:
    """Fails if a ratio of a trajectory, or a mean over a row, runs over a part of it."""
    objective = TURN.with_(level=level) if level == "sequence" else TURN.with_(denominator="local")
    rows = pack_trees(deep_forest(), objective, 60, max_prefix=500)
    assert all(row.depth == 0 for row in rows)


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one way is taken always: long prompts are worth opening a row for, short ones are not."""
    monkeypatch.undo()
    for prompt, opened in ((100, False), (6000, True)):
        tree = TurnTree(np.zeros(prompt, dtype=np.int64))
        for leaf in range(10):
            tree.set_reward(tree.add_turn(0, [1] * 1000), float(leaf % 2))
        assign_credit([tree])
        rows = pack_trees([tree], TURN, 8000, max_prefix=100_000)
        assert (max(row.depth for row in rows) > 0) == opened
        assert max(row.depth for row in pack_trees([tree], TURN, 8000, max_prefix=prompt - 1)) == 0


def test_a_path_longer_than_a_row() -> None:
    """Fails if a path must fit a row although its keys may be kept; the message must say what to raise."""
    tree = TurnTree(range(10))
    leaf = tree.add_turn(tree.add_turn(0, [1] * 10), [2] * 10)
    tree.set_reward(leaf, 1.0)
    tree.advantages = np.ones(3)
    rows = pack_trees([tree], TURN, 12, max_prefix=20)
    assert [(row.num_tokens, row.depth, row.prefix_tokens) for row in rows] == [(10, 0, 0), (10, 1, 10), (10, 2, 20)]
    with pytest.raises(ValueError, match=r"train\.row_tokens to at least 30, or train\.prefix_memory_gb"):
        pack_trees([tree], TURN, 12, max_prefix=19)
    with pytest.raises(ValueError, match="at least 30"):
        pack_trees([tree], TURN, 9, max_prefix=1000)


def test_a_row_without_its_prefix_is_refused() -> None:
    """Fails if rows that continue others are computed as if nothing came before them."""
    rows = pack_trees(deep_forest(), TURN, 30, max_prefix=500)
    with pytest.raises(ValueError, match="plan_passes"):
        Policy(make("llama"))(rows[1])


@pytest.mark.parametrize("choice", ["none", "layer"])
def test_how_often_tokens_are_forwarded_and_what_is_held(choice: GradientCheckpointing) -> None:
    """Fails if an ancestor is forwarded more than once plus its recomputation, or scored when it is opened too, or if
    opened rows are held too long."""
    policy = Policy(make("qwen3"), gradient_checkpointing=choice).train()
    rows = pack_trees(deep_forest(), TURN, 30, dtype=torch.float64, max_prefix=500)
    forwarded: list[int] = []
    held: list[int] = []
    scored: list[int] = []

    def count(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        forwarded.append(inputs[0].shape[-2])
        held.append(sum(type(x) is OpenedRow for x in gc.get_objects()))

    gc.freeze()  # what is there already is not looked through at every forward
    policy.model.model.layers[0].mlp.register_forward_hook(count)
    policy.model.lm_head.register_forward_hook(lambda _, inputs, __: scored.append(len(inputs[0])))
    accumulate_gradients(policy, rows, TURN)
    opened = {p.row for p in plan_passes([rows])[0] if p.kind == "open" and p.row is not None}
    once = sum(row.num_tokens for row in rows)
    again = sum(rows[i].num_tokens for i in opened)
    least = once + again if choice == "none" else 2 * once - policy.skipped_tokens
    assert sum(forwarded) == least
    assert sum(scored) == sum(row.num_actions for row in rows)
    assert max(held) <= 1 + max(row.depth for row in rows)
    gc.collect()
    assert not any(type(x) is OpenedRow for x in gc.get_objects())
    gc.unfreeze()


def test_scores_are_those_of_one_row() -> None:
    """Fails if log-probs without gradient miss the prefix."""
    policy = Policy(exact_norms(make("qwen3")))
    found: list[dict[tuple[int, int], torch.Tensor]] = []
    for budget in (4096, 30):
        rows = pack_trees(deep_forest(), TURN, budget, dtype=torch.float64, max_prefix=500)
        by_turn: dict[tuple[int, int], torch.Tensor] = {}
        for row, (logprob, _) in zip(rows, score_rows(policy, rows, policy.device), strict=True):
            names = zip(row.turn_tree.tolist(), row.turn_index.tolist(), strict=True)
            by_turn |= dict(zip(names, logprob.split(row.turn_offsets.diff().tolist()), strict=True))
        found.append(by_turn)
    assert found[0].keys() == found[1].keys()
    for turn, logprob in found[0].items():
        torch.testing.assert_close(found[1][turn], logprob, rtol=0, atol=1e-12)


def row_of_depth(depth: int) -> PackedTrees:
    row = empty_row()
    row.depth = depth
    return row


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_ranks_pass_alike(data: st.DataObject) -> None:
    """Fails if ranks pass rows in different ways at a time, lose a row, or close a row before those below it."""
    plan_rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        depths: list[int] = []
        for _ in range(data.draw(st.integers(1, 7))):
            depths.append(data.draw(st.integers(0, depths[-1] + 1 if depths else 0)))
        plan_rows.append([row_of_depth(depth) for depth in depths])
    plan = plan_passes(plan_rows)
    assert len({tuple(p.kind for p in passes) for passes in plan}) == 1
    assert plan[0][-1].kind != "open"
    for rows, passes in zip(plan_rows, plan, strict=True):
        differentiated = [p.row for p in passes if p.kind != "open" and p.row is not None]
        assert sorted(differentiated) == list(range(len(rows)))
        opened: list[int] = []
        balance = 0
        for step in passes:
            balance += (step.kind == "open") - (step.kind == "close") if step.row is None else 0
            assert balance >= 0  # an empty row is closed after it was opened; some are left open and forgotten
            if step.row is None:
                continue
            if step.kind == "close":
                assert opened.pop() == step.row
            assert len(opened) == rows[step.row].depth
            opened += [step.row] if step.kind == "open" else []
        assert not opened


def test_one_rank_has_no_empty_pass() -> None:
    """Fails if rows that need no opening are passed more than once."""
    assert plan_passes([[row_of_depth(d) for d in (0, 1, 0)]])[0] == [
        Pass("open", 0),
        Pass("whole", 1),
        Pass("close", 0),
        Pass("whole", 2),
    ]


def test_rows_below_stay_with_the_row_above() -> None:
    """Fails if spreading parts a row from its prefix, or ranks get unequal numbers of rows."""
    rows = pack_trees(deep_forest(3), TURN, 40, max_prefix=500)
    spread = spread_rows(rows, 2)
    assert len(spread[0]) == len(spread[1])
    total = 0
    for mine in spread:
        for row, above in stacks(mine):
            assert len(above) == row.depth
            assert row.prefix_tokens == sum(other.num_tokens for other in above)
            total += row.unique_tokens
    assert total == sum(row.unique_tokens for row in rows)
