"""One question's search while it is going on (design, section 2).

Branches of one round may write and wait in any order. Their turns enter the tree together when the round ends, in an
order that does not depend on it: level by level, and within a level in the order of the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, zip_longest

import numpy as np

from atpo_fast.engines.base import Completion, PathNode
from atpo_fast.tree.turn_tree import TokenIds, TurnTree


@dataclass(slots=True, eq=False)
class Search:
    """The state of one question's search."""

    tree: TurnTree
    order: int  # among the questions of the call
    seed: tuple[int, str, int]  # (seed, question id, how many equal ids came before)
    token_limit: int  # longest path
    reserve: int  # tokens left for the policy after an observation
    rng: np.random.Generator  # for expansion and pruning
    round: list[Branch] = field(default_factory=list)  # branches of the round that is going on
    live: int = 0  # those of them that have not ended
    answering: int = 0  # those of them that wait for a tool
    rounds: int = 0  # begun so far
    branches: int = 0  # begun so far
    numbers: list[int] = field(default_factory=lambda: [0])  # by turn of the tree: its number at the engine
    requests: int = 0  # made so far
    tokens: int = 0  # of the prompt and of all turns so far, each counted once
    straggling_since: float | None = None
    straggling_seconds: float = 0.0  # of this round, without the time since `straggling_since`

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens

    @property
    def key(self) -> str:
        """The engine's name for the tree."""
        return f"{self.order}:{self.tree.question_id}"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.tree.turns[0].observation_ids)

    @property
    def straggling(self) -> bool:
        """Whether at least half of the round's branches have ended and only tools keep the others."""
        return self.live == self.answering > 0 and 2 * self.live <= len(self.round)

    def begin_round(self, turns: Sequence[int]) -> list[Branch]:
        """One new branch for each of `turns` of the tree, which it continues."""
        self.round = [self._branch(turn) for turn in turns]
        self.live, self.straggling_since, self.straggling_seconds = len(turns), None, 0.0
        self.rounds += 1
        return self.round

    def end_round(self) -> None:
        """Put the turns that the branches have written into the tree."""
        ends = [branch.turn for branch in self.round]
        for level in zip_longest(*(branch.turns for branch in self.round)):
            for index, turn in enumerate(level):
                if turn is not None:
                    ends[index] = self.tree.add_turn(
                        ends[index],
                        turn.action_ids,
                        turn.logprobs,
                        turn.observation_ids,
                        finish_reason=turn.finish_reason,
                        tool=turn.tool,
                    )
                    self.numbers.append(turn.number)
        self.round = []

    def next_number(self) -> int:
        """Number of a new request."""
        self.requests += 1
        return self.requests

    def _branch(self, turn: int) -> Branch:
        turns = self.tree.path(turn)
        lengths = [len(self.tree.turns[n].action_ids) + len(self.tree.turns[n].observation_ids) for n in turns]
        ends = accumulate(lengths)
        path = tuple(PathNode(key=(self.key, self.numbers[n]), end=end) for n, end in zip(turns, ends, strict=True))
        self.branches += 1
        return Branch(self, self.branches - 1, turn, path, self.tree.path_ids(turn))


@dataclass(slots=True, eq=False)
class WrittenTurn:
    """A turn that is not in the tree yet; see `Turn`."""

    number: int  # at the engine: `Request.turn_key[1]`
    action_ids: TokenIds
    logprobs: list[float]
    finish_reason: str
    tool: str | None = None
    observation_ids: TokenIds = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(slots=True, eq=False)
class Branch:
    """A chain being written, the `number`-th of its search; it continues `turn` of the tree."""

    search: Search
    number: int
    turn: int
    path: tuple[PathNode, ...]  # the turns that have their observation: what the next turn continues
    prompt_ids: TokenIds  # (path[-1].end,) their tokens
    turns: list[WrittenTurn] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls on the path: every observation but the prompt answers one."""
        return len(self.path) - 1

    @property
    def place(self) -> tuple[int, int]:
        """By what branches are put in order."""
        return self.search.order, self.number

    @property
    def seed(self) -> int:
        """Of the next turn."""
        return hashed(*self.search.seed, self.number, len(self.path))

    @property
    def room(self) -> int:
        """Tokens that the observation of the newest turn may have."""
        return self.search.token_limit - self.search.reserve - len(self.prompt_ids) - len(self.turns[-1].action_ids)

    def write(self, number: int, completion: Completion) -> WrittenTurn:
        """Append a turn."""
        ids = np.asarray(completion.token_ids, dtype=np.int64)
        self.search.tokens += len(ids)
        turn = WrittenTurn(number, ids, completion.policy_logprobs, completion.finish_reason)
        self.turns.append(turn)
        return turn

    def observe(self, observation: TokenIds) -> None:
        """Attach the observation of the newest turn, to be continued."""
        turn = self.turns[-1]
        turn.observation_ids = observation
        self.search.tokens += len(observation)
        self.prompt_ids = np.concatenate([self.prompt_ids, turn.action_ids, observation])
        self.path = (*self.path, PathNode(key=(self.search.key, turn.number), end=len(self.prompt_ids)))


def hashed(*parts: int | str) -> int:
    """A 63-bit seed from what it shall depend on; the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
