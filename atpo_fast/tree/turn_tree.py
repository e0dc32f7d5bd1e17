"""The search tree of one question: what rollout writes and everything after it reads (docs/design.md#tree).

A turn is what the policy wrote between two observations, plus the observation that the environment answered.
Turn 0 is the root: no action, the prompt as its observation. Turns are numbered in the order of `add_turn`, so a
parent's index is always smaller than its child's. Token ids are the only truth: nothing here is ever re-encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Floats = NDArray[np.float64]

SCORES = ("values", "advantages", "leaf_advantages")
"""Arrays that credit gives a tree, one float per turn."""
CLIP_RANGES = ("clip_low", "clip_high")
"""Arrays that a tree has where its turns have clip ranges of their own, one float per turn."""


@dataclass(slots=True)
class Turn:
    """An action of the policy between two observations, and the observation that it caused.

    `action_ids` (a,) int64 sampled tokens; `logprobs` (a,) float64 the engine's log-prob of each, NaN for a token
    that was appended and not sampled; `observation_ids` (o,) int64 tokens the environment inserted after the action
    (never trained on).
    """

    parent: int
    action_ids: TokenIds
    logprobs: Floats
    observation_ids: TokenIds
    finish_reason: str = "stop"  # end of the action: stop (a tool's closing tag), eos, length or error
    tool: str | None = None  # name of the tool that the action called
    children: list[int] = field(default_factory=list)
    reward: float | None = None  # reward of a leaf
    step_reward: float | None = None  # reward that the environment gave for the turn's action
    score: float | None = None  # score that the environment gave the trajectory that ends with the turn
    multiplicity: int = 1  # number of times that a leaf counts

    @property
    def nll(self) -> float:
        """Mean negative log-prob of the sampled tokens: the entropy estimate H(n). 0 where none was sampled."""
        return mean_nll(self.logprobs)


def mean_nll(
    logprobs: Floats,  # (a,)
) -> float:
    """Average the negative log-probs of sampled tokens; those that are NaN were not sampled. 0 for none."""
    if np.isnan(logprobs.sum()):
        logprobs = logprobs[~np.isnan(logprobs)]
    return -float(logprobs.mean()) if logprobs.size else 0.0


def stored_fields(turn: Turn) -> dict[str, Any]:
    """Collect what files keep of a turn; its children follow from the parents of the others."""
    return {
        "parent": turn.parent,
        "action_ids": turn.action_ids,
        "logprobs": turn.logprobs,
        "observation_ids": turn.observation_ids,
        "finish_reason": turn.finish_reason,
        "tool": turn.tool,
        "reward": turn.reward,
        "step_reward": turn.step_reward,
        "score": turn.score,
        "multiplicity": turn.multiplicity,
    }


class TurnTree:
    """A question's search tree.

    Args:
        prompt_ids: (p,) token ids of the prompt: the root's observation.
        question_id: name of the question, for reports and error messages.
        meta: anything JSON can hold (question text, answers, texts of turns).

    After scoring, `values` and `advantages` hold one float per turn; `leaf_advantages` (N,) is set instead of being
    None when the credit is per trajectory (entries of turns that are not leaves are nan). `clip_low` and `clip_high`
    are set where turns have clip ranges of their own: one float per turn, nan for the objective's. Four more (N,)
    arrays are None unless a method needs them; files do not keep them, since they follow from the tree and the policy:

    * `turn_rewards`: reward of a turn itself, beside the outcome of the leaf.
    * `gold_logprob`: mean log-prob of the gold answer's tokens after the turn, nan on leaves (`igpo`, `a2tgpo`).
    * `clip_scale`: factor of the clip range of a turn (`a2tgpo`).
    * `turn_weight`: factor of a turn's weight in each of its trajectories (`shared_turns` of `assign_credit`).
    """

    def __init__(
        self, prompt_ids: Sequence[int] | TokenIds, *, question_id: str = "", meta: dict[str, Any] | None = None
    ):
        self.question_id = question_id
        self.meta: dict[str, Any] = meta or {}
        empty: list[int] = []
        self.turns: list[Turn] = [Turn(-1, _ids(empty), _floats(empty), _ids(prompt_ids), finish_reason="root")]
        self.values: Floats | None = None
        self.advantages: Floats | None = None
        self.leaf_advantages: Floats | None = None
        self.clip_low: Floats | None = None
        self.clip_high: Floats | None = None
        self.turn_rewards: Floats | None = None
        self.gold_logprob: Floats | None = None
        self.clip_scale: Floats | None = None
        self.turn_weight: Floats | None = None

    def __len__(self) -> int:
        return len(self.turns)

    def add_turn(
        self,
        parent: int,
        action_ids: Sequence[int] | TokenIds,
        logprobs: Sequence[float] | Floats | None = None,
        observation_ids: Sequence[int] | TokenIds | None = None,
        *,
        finish_reason: str = "stop",
        tool: str | None = None,
        step_reward: float | None = None,
        score: float | None = None,
    ) -> int:
        """Append a turn under `parent` and return its index.

        Raises:
            IndexError: `parent` is not a turn of this tree.
            ValueError: `logprobs` and `action_ids` differ in length.
        """
        if not 0 <= parent < len(self.turns):
            raise IndexError(f"tree {self.question_id!r}: parent {parent} is not one of its {len(self.turns)} turns")
        action = _ids(action_ids)
        logp = np.zeros(len(action)) if logprobs is None else _floats(logprobs)
        if len(logp) != len(action):
            raise ValueError(
                f"tree {self.question_id!r}: a turn with {len(action)} action tokens was given {len(logp)} log-probs"
            )
        index = len(self.turns)
        observation = _ids([] if observation_ids is None else observation_ids)
        turn = Turn(parent, action, logp, observation, finish_reason, tool, step_reward=step_reward, score=score)
        self.turns.append(turn)
        self.turns[parent].children.append(index)
        return index

    def set_observation(self, turn: int, observation_ids: Sequence[int] | TokenIds) -> None:
        """Attach the environment's answer to a turn. Raises ValueError when the turn has children already."""
        if self.turns[turn].children:
            raise ValueError(f"tree {self.question_id!r}: turn {turn} already has children; its observation is fixed")
        self.turns[turn].observation_ids = _ids(observation_ids)

    def set_reward(self, turn: int, reward: float) -> None:
        """Give a leaf its outcome reward. Raises ValueError when the turn is not a leaf."""
        self._require_leaf(turn)
        self.turns[turn].reward = float(reward)

    def set_multiplicity(self, turn: int, multiplicity: int) -> None:
        """Let a leaf count `multiplicity` times; its tokens are not copied.

        Raises ValueError when the turn is not a leaf, or for a multiplicity below 1.
        """
        self._require_leaf(turn)
        if multiplicity < 1:
            raise ValueError(
                f"tree {self.question_id!r}: multiplicity of turn {turn} must be at least 1, got {multiplicity}"
            )
        self.turns[turn].multiplicity = int(multiplicity)

    @property
    def leaves(self) -> list[int]:
        """Indices of turns without children, the root excepted, in order."""
        return [i for i, turn in enumerate(self.turns) if i and not turn.children]

    def path(self, turn: int) -> list[int]:
        """List the turns from the root to `turn`, both included."""
        path = []
        while turn >= 0:
            path.append(turn)
            turn = self.turns[turn].parent
        return path[::-1]

    def path_ids(self, turn: int) -> TokenIds:
        """Join all tokens from the prompt through the observation of `turn`: (L,)."""
        return np.concatenate(
            [part for n in self.path(turn) for part in (self.turns[n].action_ids, self.turns[n].observation_ids)]
        )

    @property
    def unique_tokens(self) -> int:
        """Tokens of the tree, each counted once."""
        return sum(len(t.action_ids) + len(t.observation_ids) for t in self.turns)

    @property
    def flat_tokens(self) -> int:
        """Tokens of all trajectories written out one by one, multiplicity included."""
        lengths = np.zeros(len(self.turns), dtype=np.int64)
        for i, t in enumerate(self.turns):
            lengths[i] = len(t.action_ids) + len(t.observation_ids) + (lengths[t.parent] if i else 0)
        return int(sum(lengths[i] * self.turns[i].multiplicity for i in self.leaves))

    @property
    def num_trajectories(self) -> int:
        """Number of trajectories: leaves counted with multiplicity."""
        return sum(self.turns[i].multiplicity for i in self.leaves)

    def _require_leaf(self, turn: int) -> None:
        if turn == 0 or self.turns[turn].children:
            raise ValueError(f"tree {self.question_id!r}: turn {turn} is not a leaf")


def overlap(trees: Sequence[TurnTree]) -> float:
    """Compute `1 - T_tree / T_flat` over a forest (docs/design.md#overlap); 0 for an empty one."""
    flat = sum(tree.flat_tokens for tree in trees)
    return 1.0 - sum(tree.unique_tokens for tree in trees) / flat if flat else 0.0


def _ids(values: Sequence[int] | TokenIds) -> TokenIds:
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _floats(values: Sequence[float] | Floats) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape(-1)
