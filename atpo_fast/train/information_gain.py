"""The probability of the gold answer after every turn, in one packed forward (docs/design.md#turn-rewards).

Below every turn with children a copy of the tree gets a leaf: a fixed text that begins an answer, and the gold answer.
All copies are packed and scored like any other batch, so the tree's own tokens are forwarded once, and only the tokens
of answers pass the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import deepspeed
import numpy as np
import torch

from atpo_fast.common.ranks import reduce_over_ranks
from atpo_fast.environment.tags import TAGS, close_tag, open_tag
from atpo_fast.objective import Objective
from atpo_fast.packing import pack_trees, spread_rows
from atpo_fast.policy import score_rows
from atpo_fast.task.demonstrations import continued
from atpo_fast.train.run import Run
from atpo_fast.train.scoring import ScoredTree
from atpo_fast.train.zero import device_of
from atpo_fast.tree import TurnTree
from atpo_fast.tree.packed_rows import PackedTrees

ANSWER_BEGINS = f"{open_tag(TAGS.think)}{close_tag(TAGS.think)}{open_tag(TAGS.answer)} \\boxed{{"
"""Text before the gold answer; only what the format itself consists of, which every tokenizer of a task knows."""

Encode = Callable[[str], list[int]]
_Scores = Sequence[torch.Tensor]


def measure_gold(run: Run, zero: deepspeed.DeepSpeedEngine, scored: Sequence[ScoredTree]) -> None:
    """Fill `gold_logprob` of the trees of all ranks by the policy's present weights; a collective.

    It is the mean log-prob of the tokens of the question's first answer after each turn with children, nan on leaves.
    """
    trees = [each.tree for each in scored]

    def encode(text: str) -> list[int]:
        ids: list[int] = run.task.tokenizer.encode(text, add_special_tokens=False)
        return ids

    opening = run.task.encode_prompt.opening
    probes = [with_gold_leaves(each.tree, each.question.answers[0], encode, opening) for each in scored]
    rows = pack_probes(probes, run.config.train.row_tokens)
    mine = spread_rows(rows, run.world)[run.rank] if rows else []
    scores = [logprob for logprob, _ in score_rows(zero, mine, device_of(zero))]
    store_gold(trees, reduce_over_ranks(gold_by_turn(trees, mine, scores)).numpy())


def with_gold_leaves(tree: TurnTree, answer: str, encode: Encode, opening: str = "") -> TurnTree:
    """Copy a tree without its leaves, with the answer below every turn that has children.

    `opening` is what the chat template has begun the reply with; where that is a thought, the answer after the prompt
    continues it.

    The copy of the i-th such turn, counted from 0, is turn 3i, the text before the answer turn 3i + 1, and the answer
    turn 3i + 2. Only answers are actions.
    """
    probe = TurnTree(tree.turns[0].observation_ids, question_id=tree.question_id)
    begins, gold = encode(ANSWER_BEGINS), encode(f" {answer}")
    first = encode(continued(ANSWER_BEGINS, opening))
    copy_of: dict[int, int] = {}
    for index, turn in enumerate(tree.turns):
        if not turn.children:
            continue
        seen = np.concatenate([turn.action_ids, turn.observation_ids])
        copy_of[index] = probe.add_turn(copy_of[turn.parent], [], None, seen) if index else 0
        probe.add_turn(probe.add_turn(copy_of[index], [], None, begins if index else first), gold)
    probe.advantages = np.ones(len(probe))
    return probe


def pack_probes(probes: Sequence[TurnTree], row_tokens: int) -> list[PackedTrees]:
    """Pack the copies; a row is longer than `row_tokens` only where a path and its answer need it."""
    longest = max((len(probe.path_ids(leaf)) for probe in probes for leaf in probe.leaves), default=0)
    return pack_trees(probes, Objective(aggregation="token-mean"), max(row_tokens, longest), prune=False)


def gold_by_turn(trees: Sequence[TurnTree], rows: Sequence[PackedTrees], logprobs: _Scores) -> torch.Tensor:
    """Add the mean log-probs of the rows' answers to the turns that they follow: (N,) over all trees, float64."""
    starts = np.cumsum([0, *map(len, trees)])
    inner = [[n for n, turn in enumerate(tree.turns) if turn.children] for tree in trees]
    total = torch.zeros(int(starts[-1]), dtype=torch.float64)
    for row, logprob in zip(rows, logprobs, strict=True):
        bounds = row.turn_offsets.tolist()
        for n, (tree, turn) in enumerate(zip(row.turn_tree.tolist(), row.turn_index.tolist(), strict=True)):
            if tree >= 0:  # not of a row that only fills up a rank
                total[starts[tree] + inner[tree][turn // 3]] += logprob[bounds[n] : bounds[n + 1]].double().mean()
    return total


def store_gold(trees: Sequence[TurnTree], gold: np.ndarray) -> None:
    """Write (N,) log-probs of all trees to the turns with children; those of leaves become nan."""
    start = 0
    for tree in trees:
        mine = gold[start : start + len(tree)]
        tree.gold_logprob = np.where([bool(turn.children) for turn in tree.turns], mine, np.nan)
        start += len(tree)
