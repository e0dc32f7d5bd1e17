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
from math import nan

import numpy as np

from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Completion, PathNode
from atpo_fast.environment import ToolCall, ToolResult
from atpo_fast.environment.sessions import Place, SessionAnswer, StateTree
from atpo_fast.tree.turn_tree import TokenIds, TurnTree

_RESERVE_TOKENS = 100  # tokens left for the policy after a result that had to be cut (published)


class BranchState(Enum):
    """State of a branch: READY, WRITING, perhaps CALLING and ANSWERING, then READY again, until ENDED."""

    READY = auto()  # to be given to the engine
    WRITING = auto()  # in flight at the engine
    CALLING = auto()  # to be given to the tools
    ANSWERING = auto()  # in flight at the tools, or at the session that scores the trajectory
    ENDED = auto()  # its round is over for it: its last turn is a leaf, or goes on in a later round


@dataclass(frozen=True, slots=True)
class Start:
    """Where a branch begins, and how far it goes in its round."""

    turn: int  # turn of the tree that it continues, after its observation; 0 is the root
    turns: int | None = None  # most turns that it writes; none: until it ends
    tokens: int | None = None  # most tokens of each of its turns, where `rollout.max_turn_tokens` is not less
    calls: bool = True  # whether its calls are answered; otherwise its first turn is its last


@dataclass(frozen=True, slots=True)
class BranchEnd:
    """What a strategy is told of a branch when its round is over."""

    turn: int  # its last turn in the tree; where the round is not kept, the one that it continued
    active: bool  # whether it could go on: its last turn has an observation
    entropies: tuple[float, ...]  # opening entropy of each turn that it wrote; empty where nobody asked for them


@dataclass(slots=True, eq=False)
class QuestionSearch:
    """The state of one question's search: its tree, its limits and its current round."""

    tree: TurnTree
    order: int  # index of the question in the call
    seed: tuple[
        int | str, ...
    ]  # seed, question id, how many equal ids came before; number of the tree but for the first
    token_limit: int  # tokens of the longest path
    reserve: int  # tokens left for the policy after an observation
    rng: np.random.Generator  # random numbers of expansion and pruning
    number: int = 0  # number of the tree among those of its question
    round: list[Branch] = field(default_factory=list)  # branches of the current round
    kept: bool = True  # whether the turns of the current round enter the tree
    branches: int = 0  # branches begun so far
    numbers: list[int] = field(default_factory=lambda: [0])  # number at the engine of each turn of the tree
    states: StateTree | None = None  # states of the environment, where it has any
    places: list[Place | None] = field(default_factory=lambda: [None])  # state after each turn of the tree
    requests: int = 0  # requests numbered so far
    tokens: int = 0  # tokens of the prompt and of all turns so far, each counted once
    blocked_since: float | None = None  # time at which tools began to keep the round waiting (see `blocked`)
    blocked_seconds: float = 0.0  # time for which the round was blocked before `blocked_since`

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens

    @classmethod
    def of(
        cls,
        question: Question,
        repeat: int,
        prompt: Sequence[int],
        order: int,
        seed: int,
        room: int,
        number: int = 0,
        states: StateTree | None = None,
    ) -> QuestionSearch:
        """Begin the `number`-th tree of a question, whose id came `repeat` times before.

        There are `room` tokens after the prompt.
        """
        meta = {"question": question.text, "answers": list(question.answers)}
        tree = TurnTree(prompt, question_id=question.id, meta=meta)
        seeds: tuple[int | str, ...] = (int(seed), question.id, repeat)
        seeds += (number,) if number else ()
        rng = np.random.default_rng(hashed(*seeds, "expansion"))
        reserve = max(1, min(_RESERVE_TOKENS, room // 10))
        places = [None if states is None else states.root]
        return cls(tree, order, seeds, len(prompt) + room, reserve, rng, number, states=states, places=places)

    @property
    def key(self) -> str:
        """Name of the tree at the engine."""
        place = f"{self.order}.{self.number}" if self.number else f"{self.order}"
        return f"{place}:{self.tree.question_id}"

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

    def generator(self, purpose: str, round_number: int) -> np.random.Generator:
        """Make the generator of one decision: it depends on the question, the purpose and the round alone."""
        return np.random.default_rng(hashed(*self.seed, purpose, round_number))

    def begin_round(self, starts: Sequence[Start], kept: bool = True) -> None:
        """Begin one new branch for each of `starts`; `kept` says whether their turns enter the tree."""
        self.round, self.kept = [self._branch(start) for start in starts], kept
        self.blocked_since, self.blocked_seconds = None, 0.0

    def end_round(self) -> list[BranchEnd]:
        """Put the turns that the branches have written into the tree, if they are kept; return how each has ended."""
        ends = [branch.start.turn for branch in self.round]
        levels = zip_longest(*(branch.turns for branch in self.round)) if self.kept else ()
        for level in levels:
            for index, turn in enumerate(level):
                if turn is not None:
                    ends[index] = self._add(ends[index], turn)
        reports = [branch.report(end) for branch, end in zip(self.round, ends, strict=True)]
        self.round = []
        return reports

    def _add(self, parent: int, turn: WrittenTurn) -> int:
        self.numbers.append(turn.number)
        self.places.append(turn.place)
        return self.tree.add_turn(
            parent,
            turn.action_ids,
            turn.logprobs,
            turn.observation_ids,
            finish_reason=turn.finish_reason,
            tool=turn.tool,
            step_reward=turn.step_reward,
            score=turn.score,
        )

    def next_number(self) -> int:
        """Return the number of a new request."""
        self.requests += 1
        return self.requests

    def _branch(self, start: Start) -> Branch:
        turns = self.tree.path(start.turn)
        lengths = [len(self.tree.turns[n].action_ids) + len(self.tree.turns[n].observation_ids) for n in turns]
        ends = accumulate(lengths)
        path = tuple(PathNode(key=(self.key, self.numbers[n]), end=end) for n, end in zip(turns, ends, strict=True))
        self.branches += 1
        place = self.places[start.turn]
        if place is not None:
            place.waiting += 1
        return Branch(self, self.branches - 1, start, path, self.tree.path_ids(start.turn), place)


@dataclass(slots=True, eq=False)
class WrittenTurn:
    """A turn that is not in the tree yet; the fields are those of `Turn`."""

    number: int  # number at the engine: `Request.turn_key[1]`
    action_ids: TokenIds
    logprobs: list[float]
    finish_reason: str
    entropy: float | None = None  # opening entropy, where it is asked for
    tool: str | None = None
    step_reward: float | None = None
    score: float | None = None
    place: Place | None = None  # state of the environment after it
    observation_ids: TokenIds = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(slots=True, eq=False)
class Branch:
    """A chain being written, the `number`-th of its search; it continues a turn of the tree."""

    search: QuestionSearch
    number: int
    start: Start
    path: tuple[PathNode, ...]  # turns with their observations, which the next turn continues
    prompt_ids: TokenIds  # (path[-1].end,) tokens of the path
    place: Place | None = None  # state of the environment that its next action begins in
    turns: list[WrittenTurn] = field(default_factory=list)
    state: BranchState = BranchState.READY
    call: ToolCall | None = None  # tool call while CALLING
    answer: Future[ToolResult] | Future[SessionAnswer] | Future[float | None] | None = None  # while ANSWERING
    acted: bool = False  # whether it has left the state that it began in
    done: bool = False  # whether the episode of its session has ended
    lost: bool = False  # whether its session is gone, or has not answered in time
    scoring: bool = False  # whether `answer` is the score of its trajectory

    @property
    def calls(self) -> int:
        """Number of calls on the path: every observation but the prompt answers one."""
        return len(self.path) - 1

    @property
    def active(self) -> bool:
        """Whether its newest turn has an observation, after which it can go on."""
        return bool(self.turns and len(self.turns[-1].observation_ids)) and not (self.done or self.lost)

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
        turn = WrittenTurn(number, ids, completion.policy_logprobs, completion.finish_reason, place=self.place)
        self.turns.append(turn)
        return turn

    def end_with(self, token: int) -> None:
        """Append a token that was not sampled to the newest turn, if there is room for it; its log-prob is NaN."""
        turn = self.turns[-1]
        if len(self.prompt_ids) + len(turn.action_ids) < self.search.token_limit:
            turn.action_ids = np.append(turn.action_ids, token)
            turn.logprobs = [*turn.logprobs, nan]
            turn.finish_reason = "eos"
            self.search.tokens += 1

    def report(self, turn: int) -> BranchEnd:
        """Report the end of its round; `turn` is its last turn in the tree."""
        entropies = tuple(written.entropy for written in self.turns if written.entropy is not None)
        return BranchEnd(turn, self.active, entropies)

    def leave(self) -> None:
        """Leave the state that it began in, if it is there: nobody waits for it there any more."""
        if self.place is not None and not self.acted:
            self.acted = True
            self.place.waiting -= 1

    def acted_in(self, answer: SessionAnswer) -> None:
        """Take note of what its action led to."""
        turn, outcome = self.turns[-1], answer.outcome
        self.place = turn.place = answer.place
        turn.step_reward, self.done, self.lost = outcome.reward, outcome.done, answer.lost

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
