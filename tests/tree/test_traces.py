"""Rollouts that verifiers and OpenEnv recorded, as trees: their tokens, their loss, the verb `atpo-fast import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atpo_fast import Objective, TurnTree, assign_credit, from_trajectories, pack_trees
from atpo_fast.commands.cli import main
from atpo_fast.policy import Policy
from atpo_fast.report import build_report
from atpo_fast.tree.storage import read_forest
from atpo_fast.tree.traces import grow_trees, read_openenv, read_verifiers
from tests.helpers.policies import make


def given(parent: int | None, ids: list[int]) -> dict[str, Any]:
    """A message that the policy did not write."""
    return {"parent": parent, "sampled": False, "token_ids": ids, "mask": [False] * len(ids), "logprobs": []}


def sampled(parent: int | None, before: list[int], ids: list[int], after: tuple[int, ...] = ()) -> dict[str, Any]:
    """A message of the policy, with the tokens of its template."""
    mask = [False] * len(before) + [True] * len(ids) + [False] * len(after)
    logprobs = [-0.1 * i for i in ids]
    return {"parent": parent, "sampled": True, "token_ids": [*before, *ids, *after], "mask": mask, "logprobs": logprobs}


def trace(nodes: list[dict[str, Any]], score: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    rewards = {"a": {"score": score, "weight": 0.5}, "b": None} if score is not None else {"a": None}
    return {"task": {"data": {"prompt": "Q?"}, "key": "k1"}, "nodes": nodes, "rewards": rewards, **fields}


NODES = [
    given(None, [1, 2, 3]),
    sampled(0, [9], [10, 11], (8,)),
    given(1, [20, 21]),
    sampled(2, [9], [12]),
    given(1, [20, 22]),  # another answer to the same call
    sampled(4, [9], [13, 14]),
    sampled(0, [9], [15]),
    given(6, [30]),  # the environment had the last word
]
TOKENS = {
    (1, 2, 3, 9, 10, 11, 8, 20, 21, 9, 12),
    (1, 2, 3, 9, 10, 11, 8, 20, 22, 9, 13, 14),
    (1, 2, 3, 9, 15, 30),
}


def trajectories(tree: TurnTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path_ids(leaf).tolist()) for leaf in tree.leaves}


def test_a_trace_of_verifiers() -> None:
    """Fails if a token of the template is lost or trained on, if two answers to one call are taken for one, or a weight
    of the reward is left out."""
    episode, other = read_verifiers(trace(NODES)), read_verifiers(trace(NODES[:4], score=0.0))
    assert episode is not None and other is not None
    (tree,) = grow_trees([episode, other])
    assert trajectories(tree) == TOKENS and len(tree.leaves) == 4
    assert [tree.turns[leaf].reward for leaf in tree.leaves].count(0.5) == 3
    actions = {tuple(turn.action_ids.tolist()) for turn in tree.turns}
    assert actions == {(), (10, 11), (12,), (13, 14), (15,)}
    assert all(turn.logprobs == pytest.approx(-0.1 * turn.action_ids) for turn in tree.turns)


def test_what_is_no_training_data() -> None:
    """Fails if a rollout that was not scored counts as one with reward 0, or a judge's tokens as the policy's."""
    assert read_verifiers(trace(NODES, score=None)) is None
    assert read_verifiers(trace(NODES, agent={"trainable": False})) is None
    with pytest.raises(ValueError, match="token ids"):
        read_verifiers(trace([given(None, []), sampled(0, [], [])]))
    broken = sampled(0, [9], [10, 11, 12])
    broken["mask"][2] = False
    with pytest.raises(ValueError, match="consecutive"):
        read_verifiers(trace([NODES[0], broken]))


def entry(prompt: list[int], ids: list[int], learn: int = 1, **fields: Any) -> dict[str, Any]:
    mask = [0] * len(prompt) + [learn] * len(ids)
    names = ("prompt_token_ids", "completion_token_ids", "per_token_logps", "loss_mask")
    return dict(zip(names, (prompt, ids, [-0.5] * len(ids), mask), strict=True)) | fields


def test_a_trace_of_openenv() -> None:
    """Fails if a turn is hung under a shorter prefix than its own, if calls that are not the agent's are trained on, or
    an unscored episode is."""
    start, first = [1, 2, 3], [10, 11]
    turns = [
        entry(start, first),
        entry([*start, *first, 20], [12], metadata={"task_id": 7, "reward": 0.25}),
        entry([*start, *first, 20, 12, 21], [13]),
        entry([5, 5], [6], learn=0),
        entry([*start, 10], [14]),  # no continuation: `first` has another token here
    ]
    episode = read_openenv({"schema_version": 1, "turns": turns}, "record 1")
    assert episode is not None and (episode.question_id, episode.reward) == ("7", 0.25)
    trees = grow_trees([episode])
    assert [trajectories(tree) for tree in trees] == [{(*start, *first, 20, 12, 21, 13)}, {(*start, 10, 14)}]
    assert read_openenv({"turns": turns[:1]}, "record 1") is None
    turns[0]["loss_mask"][-1] = 0
    with pytest.raises(ValueError, match="1 of 2 sampled tokens"):
        read_openenv({"turns": turns, "reward": 1}, "record 1")


def test_an_imported_tree_has_the_loss_of_its_trajectories() -> None:
    """Fails if an imported tree does not train as its rollouts written out one by one do."""
    episodes = [read_verifiers(trace(NODES)), read_verifiers(trace(NODES[:4], score=0.0))]
    (tree,) = grow_trees([episode for episode in episodes if episode is not None])
    assign_credit([tree], method="grpo")
    assert tree.leaf_advantages is not None
    policy = Policy(make("qwen3"))
    objective = Objective.preset("grpo")
    flat = {"input_ids": [], "loss_mask": [], "old_logprobs": [], "advantages": []}  # type: ignore[var-annotated]
    for leaf in tree.leaves:
        turns = [tree.turns[n] for n in tree.path(leaf)]
        flat["input_ids"].append(np.concatenate([np.r_[t.action_ids, t.observation_ids] for t in turns]))
        flat["loss_mask"].append(np.concatenate([np.r_[t.action_ids * 0 + 1, t.observation_ids * 0] for t in turns]))
        flat["old_logprobs"].append(np.concatenate([np.r_[t.logprobs, t.observation_ids * 0.0] for t in turns]))
        flat["advantages"].append(float(tree.leaf_advantages[leaf]))
    losses, gradients = [], []
    for rows in (
        pack_trees([tree], objective, 64, dtype=torch.float64),
        from_trajectories(flat, objective, 64, dtype=torch.float64),
    ):
        policy.zero_grad()
        loss = sum((policy(row, objective).loss for row in rows), torch.zeros((), dtype=torch.float64))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert np.isfinite(losses[0]) and abs(losses[0]) > 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    rounding = 2**-24 * 11  # the model's norms pass gradients on in float32; a longest path of 11 tokens adds them up
    assert (gradients[0] - gradients[1]).abs().max() <= rounding * gradients[0].abs().max()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the verb writes what the report and training cannot read, or overwrites what is there."""
    source, out = tmp_path / "traces.jsonl", tmp_path / "trees.jsonl"
    records = [trace(NODES), trace(NODES[:4], score=None), {"turns": [entry([4], [5])], "reward": 1}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["import", str(source), "--out", str(out)]) == 0
    assert "2 trees of 2 questions, with 4 trajectories, from 2 rollouts" in capsys.readouterr().out
    assert [tree.question_id for tree in read_forest(out)] == ["k1", "record 3"]
    assert build_report(out).exists()
    assert main(["import", str(source), "--out", str(out)]) == 2
    source.write_text('{"some": "thing"}\n')
    assert main(["import", str(source), "--out", str(tmp_path / "other.jsonl")]) == 2
    assert "record 1: neither a trace of verifiers nor of OpenEnv" in capsys.readouterr().err
