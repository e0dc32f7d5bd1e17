"""The search of one question in progress: its tree, and the branches of its current round (docs/design.md#search).

Branches of one round may write and wait in any order. Their turns enter the tree together when the round ends, in an
order that does not depend on it: level by level, and within a level in the order of the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from itertools import accumulate, zip_longest

import numpy as np

from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Completion, PathNode
from atpo_fast.environment import ToolCall, ToolResult
from atpo_fast.tree.turn_tree import TokenIds, TurnTree

_RESERVE_TOKENS = 100  # tokens left for the policy after a result that had to be cut (published)


class BranchState(Enum):
    """State of a branch: READY, WRITING, perhaps CALLING and ANSWERING, then READY again, until ENDED."""

    READY = auto()  # to be given to the engine
    WRITING = auto()  # in flight at the engine
    CALLING = auto()  # to be given to the tools
    ANSWERING = auto()  # in flight at the tools
    ENDED = auto()  # its last turn is a leaf


@dataclass(slots=True, eq=False)
class QuestionSearch:
    """The state of one question's search: its tree, its limits and its current round."""

    tree: TurnTree
    order: int  # index of the question in the call
    seed: tuple[int, str, int]  # (seed, question id, how many equal ids came before)
    token_limit: int  # tokens of the longest path
    reserve: int  # tokens left for the policy after an observation
    rng: np.random.Generator  # random numbers of expansion and pruning
    round: list[Branch] = field(default_factory=list)  # branches of the current round
    rounds: int = 0  # rounds begun so far
    branches: int = 0  # branches begun so far
    numbers: list[int] = field(default_factory=lambda: [0])  # number at the engine of each turn of the tree
    requests: int = 0  # requests numbered so far
    tokens: int = 0  # tokens of the prompt and of all turns so far, each counted once
    blocked_since: float | None = None  # time at which tools began to keep the round waiting (see `blocked`)
    blocked_seconds: float = 0.0  # time for which the round was blocked before `blocked_since`

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens

    @classmethod
    def of(
        cls, question: Question, repeat: int, prompt: Sequence[int], order: int, seed: int, room: int
    ) -> QuestionSearch:
        """Begin the search of a question, whose id came `repeat` times before, with `room` tokens after the prompt."""
        tree = TurnTree(
            prompt, question_id=question.id, meta={"question": question.text, "answers": list(question.answers)}
        )
        rng = np.random.default_rng(hashed(int(seed), question.id, repeat, "expansion"))
        reserve = max(1, min(_RESERVE_TOKENS, room // 10))
        return cls(tree, order, (int(seed), question.id, repeat), len(prompt) + room, reserve, rng)

    @property
    def key(self) -> str:
        """Name of the tree at the engine."""
        return f"{self.order}:{self.tree.question_id}"

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the question's prompt."""
        return len(self.tree.turns[0].observation_ids)

    @property
    def ended(self) -> bool:
        """Whether all branches of the round have ended."""
        return all(branch.state is BranchState.ENDED for branch in self.round)

    @property
    def blocked(self) -> bool:
        """Whether at least half of the round's branches have ended and only tools keep the others."""
        going_on = [branch.state for branch in self.round if branch.state is not BranchState.ENDED]
        return 0 < 2 * len(going_on) <= len(self.round) and set(going_on) == {BranchState.ANSWERING}

    def begin_round(self, turns: Sequence[int]) -> None:
        """Begin one new branch for each of `turns` of the tree, which it continues."""
        self.round = [self._branch(turn) for turn in turns]
        self.blocked_since, self.blocked_seconds = None, 0.0
        self.rounds += 1

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
        """Return the number of a new request."""
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
    """A turn that is not in the tree yet; the fields are those of `Turn`."""

    number: int  # number at the engine: `Request.turn_key[1]`
    action_ids: TokenIds
    logprobs: list[float]
    finish_reason: str
    tool: str | None = None
    observation_ids: TokenIds = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(slots=True, eq=False)
class Branch:
    """A chain being written, the `number`-th of its search; it continues `turn` of the tree."""

    search: QuestionSearch
    number: int
    turn: int
    path: tuple[PathNode, ...]  # turns with their observations, which the next turn continues
    prompt_ids: TokenIds  # (path[-1].end,) tokens of the path
    turns: list[WrittenTurn] = field(default_factory=list)
    state: BranchState = BranchState.READY
    call: ToolCall | None = None  # tool call while CALLING
    answer: Future[ToolResult] | None = None  # tool result while ANSWERING

    @property
    def calls(self) -> int:
        """Number of calls on the path: every observation but the prompt answers one."""
        return len(self.path) - 1

    @property
    def seed(self) -> int:
        """Sampling seed of the branch's next turn."""
        return hashed(*self.search.seed, self.number, len(self.path))

    @property
    def room(self) -> int:
        """Number of tokens that the observation of the newest turn may have."""
        return self.search.token_limit - self.search.reserve - len(self.prompt_ids) - len(self.turns[-1].action_ids)

    def write(self, number: int, completion: Completion) -> WrittenTurn:
        """Append the turn `number` that the engine has written."""
        ids = np.asarray(completion.token_ids, dtype=np.int64)
        self.search.tokens += len(ids)
        turn = WrittenTurn(number, ids, completion.policy_logprobs, completion.finish_reason)
        self.turns.append(turn)
        return turn

    def observe(self, observation: TokenIds) -> None:
        """Attach an observation to the newest turn, which is then to be continued."""
        turn = self.turns[-1]
        turn.observation_ids = observation
        self.search.tokens += len(observation)
        self.prompt_ids = np.concatenate([self.prompt_ids, turn.action_ids, observation])
        self.path = (*self.path, PathNode(key=(self.search.key, turn.number), end=len(self.prompt_ids)))


def hashed(*parts: int | str) -> int:
    """Derive a 63-bit seed from the values that it depends on; it is the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
