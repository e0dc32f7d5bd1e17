"""The turn loop: from questions to search trees (design, section 2).

All live branches of all admitted questions write one turn in one `engine.generate` call, then all their tool calls run
in parallel, then comes the next turn. Nothing mutable is shared between siblings: the number of calls made, the room
left and the seed of a branch all follow from its own path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config.schema import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment.tags import (
    CALL_LIMIT_NOTICE,
    ToolCall,
    close_tag,
    format_result,
    parse_call,
    result_closing,
    result_opening,
)
from atpo_fast.environment.tools import ToolBox, ToolResult
from atpo_fast.rollout.engine import Completion, Engine, PathNode, Request, SamplingParams
from atpo_fast.rollout.expansion import keep_leaves, select_turns
from atpo_fast.tree.turn_tree import TokenIds, TurnTree

Progress = Callable[[int, int, int], None]

_RESERVE_TOKENS = 100  # left for the policy after a result that had to be cut (published)
_USAGE_MARGIN = 1.25  # head room of the next group over the tokens that the last one used


class Timer(Protocol):
    """What the loop asks of a phase timer."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Time a block under a name."""
        ...


@dataclass(slots=True)
class RolloutCounters:
    """Cumulative counts of one turn loop.

    `tool_calls`: calls handed to the tools (those over the limit are not). `failed_tool_calls`: the part of them
    answered with what went wrong. `failed_trees`: trees without a leaf that the policy ended itself.
    """

    turns: int = 0
    tool_calls: int = 0
    failed_tool_calls: int = 0
    trees: int = 0
    failed_trees: int = 0


@dataclass(slots=True)
class _Search:
    """One question's search while it is going on."""

    tree: TurnTree
    key: str  # the engine's name for the tree
    seed: tuple[int, str, int]  # (seed, question id, how many equal ids came before)
    token_limit: int  # longest path
    reserve: int  # tokens left for the policy after an observation
    rng: np.random.Generator  # for expansion and pruning
    branches: int = 0  # branches started so far

    def branch(self, turn: int) -> _Branch:
        """A new branch that continues `turn`."""
        turns = self.tree.path(turn)
        lengths = [len(self.tree.turns[n].action_ids) + len(self.tree.turns[n].observation_ids) for n in turns]
        path = tuple(PathNode(key=(self.key, n), end=end) for n, end in zip(turns, accumulate(lengths), strict=True))
        self.branches += 1
        return _Branch(self, self.branches - 1, turn, path, self.tree.path_ids(turn))


@dataclass(slots=True)
class _Branch:
    """A chain being written, the `number`-th of its tree; `turn` is its newest turn."""

    search: _Search
    number: int
    turn: int
    path: tuple[PathNode, ...]  # the turns that have their observation: what the next turn continues
    prompt_ids: TokenIds  # (path[-1].end,) their tokens

    @property
    def calls(self) -> int:
        """Calls on the path: every observation but the prompt answers one."""
        return len(self.path) - 1

    @property
    def room(self) -> int:
        """Tokens that an observation of `turn` may have."""
        action = len(self.search.tree.turns[self.turn].action_ids)
        return self.search.token_limit - self.search.reserve - len(self.prompt_ids) - action

    def observe(self, observation: TokenIds) -> None:
        """Attach the observation of `turn`, to be continued."""
        tree = self.search.tree
        tree.set_observation(self.turn, observation)
        self.prompt_ids = np.concatenate([self.prompt_ids, tree.turns[self.turn].action_ids, observation])
        self.path = (*self.path, PathNode(key=(self.search.key, self.turn), end=len(self.prompt_ids)))


@dataclass(slots=True)
class _Progress:
    """What the live display is told."""

    callback: Progress | None
    total_leaves: int
    leaves: int = 0
    decoded_tokens: int = 0

    def add(self, leaves: int, decoded_tokens: int) -> None:
        self.leaves += leaves
        self.decoded_tokens += decoded_tokens
        if self.callback is not None:
            self.callback(self.leaves, self.total_leaves, self.decoded_tokens)


class TurnLoop:
    """Rolls out search trees.

    Args:
        engine: writes turns.
        tokenizer: reads calls from turns and encodes observations; sampled tokens are never encoded again.
        toolbox: answers calls.
        rollout: shape of the search, sampling and limits. `cache_tokens` bounds how many questions are searched at
            once: the next group is taken so that its trees, as large as the last group's were (before the first: as
            large as the limits allow), fit. A wrong guess costs evictions in the engine, never correctness.
        tools: call limit and length of results.
        max_positions: longest path that the model can hold, prompt included.

    The log-probs stored in a tree are the engine's `policy_logprobs`: what the trainer recomputes, and what the
    entropy estimate H(n) is made of. They are those of the sampling distribution where top-p and top-k are off.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        toolbox: ToolBox,
        rollout: RolloutConfig,
        tools: ToolsConfig,
        *,
        max_positions: int | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.toolbox = toolbox
        self.rollout = rollout
        self.tools = tools
        self.max_positions = max_positions
        self.counters = RolloutCounters()
        self._stop = tuple(close_tag(name) for name in toolbox.names)
        self._opening_tokens = len(self._encode(result_opening()))
        self._closing = self._encode(result_closing())
        self._notice = self._encode(CALL_LIMIT_NOTICE)
        self._tokens_per_branch: dict[bool, float] = {}  # by greedy: what the last group used, for admission

    def roll_out(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        greedy: bool = False,
        on_progress: Progress | None = None,
        timer: Timer | None = None,
    ) -> list[TurnTree]:
        """One tree per question, in order.

        Args:
            prompts: token ids per question.
            seed: of the sampling. With the ids of the questions it decides everything: neither the other questions
                of the call nor their order or number matter.
            greedy: one chain at temperature 0, for evaluation.
            on_progress: called with (finished leaves, all leaves, decoded tokens) after each turn.
            timer: times the phases `rollout/generate` and `rollout/tools`.

        Raises:
            ValueError: questions and prompts differ in number, or a prompt leaves no room for an answer.
            RuntimeError: the engine failed; the message names the questions.
        """
        searches = self._searches(questions, prompts, seed)
        branches = self._branches_per_tree(greedy)
        progress = _Progress(on_progress, branches * len(searches))
        for group in self._groups(searches, greedy):
            try:
                self._search(group, greedy, progress, timer)
            finally:
                for search in group:
                    self.engine.release(search.key)
            response_tokens = [
                search.tree.unique_tokens - len(search.tree.turns[0].observation_ids) for search in group
            ]
            self._tokens_per_branch[greedy] = max(response_tokens) / branches
        for search in searches:
            self.counters.trees += 1
            self.counters.failed_trees += not any(
                search.tree.turns[n].finish_reason == "eos" for n in search.tree.leaves
            )
        if greedy:
            return [search.tree for search in searches]
        return [keep_leaves(search.tree, self.rollout.leaves, search.rng) for search in searches]

    def _searches(self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], seed: int) -> list[_Search]:
        if len(questions) != len(prompts):
            raise ValueError(f"{len(questions)} questions but {len(prompts)} prompts")
        seen: dict[str, int] = {}
        searches = []
        for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            repeat = seen[question.id] = seen.get(question.id, -1) + 1
            response = self.rollout.max_response_tokens
            if self.max_positions is not None:
                response = min(response, self.max_positions - len(prompt))
            if response < 1 or not len(prompt):
                raise ValueError(
                    f"question {question.id!r}: a prompt of {len(prompt)} tokens cannot be answered "
                    f"(the model holds {self.max_positions} positions)"
                )
            tree = TurnTree(
                prompt, question_id=question.id, meta={"question": question.text, "answers": list(question.answers)}
            )
            rng = np.random.default_rng(_hash(int(seed), question.id, repeat, "expansion"))
            limit, reserve = len(prompt) + response, max(1, min(_RESERVE_TOKENS, response // 10))
            seeds = (int(seed), question.id, repeat)
            searches.append(_Search(tree, f"{index}:{question.id}", seeds, limit, reserve, rng))
        return searches

    def _branches_per_tree(self, greedy: bool) -> int:
        """Leaves of a full tree before any is pruned."""
        if greedy:
            return 1
        rounds = 0 if self.rollout.strategy == "chain" else self.rollout.expansion_rounds
        return self.rollout.initial_chains + rounds * self.rollout.expansions_per_round

    def _groups(self, searches: Sequence[_Search], greedy: bool) -> Iterator[list[_Search]]:
        """Questions to search at once, so that their trees are expected to fit into the engine's cache."""
        branches, first = self._branches_per_tree(greedy), 0
        while first < len(searches):
            used = _USAGE_MARGIN * self._tokens_per_branch.get(greedy, np.inf)
            expected = [
                prompt + branches * min(search.token_limit - prompt, used)
                for search in searches[first:]
                for prompt in (len(search.tree.turns[0].observation_ids),)
            ]
            fitting = max(1, int(np.searchsorted(np.cumsum(expected), self.rollout.cache_tokens, side="right")))
            yield list(searches[first : first + fitting])
            first += fitting

    def _search(self, group: Sequence[_Search], greedy: bool, progress: _Progress, timer: Timer | None) -> None:
        """The whole search of a group: initial chains, then the rounds of expansion."""
        chains = 1 if greedy else self.rollout.initial_chains
        self._run([search.branch(0) for search in group for _ in range(chains)], greedy, progress, timer)
        if greedy or self.rollout.strategy == "chain":
            return
        for _ in range(self.rollout.expansion_rounds):
            branches = []
            for search in group:
                turns = select_turns(
                    search.tree,
                    self.rollout.expansions_per_round,
                    strategy=self.rollout.strategy,
                    branch_penalty=self.rollout.branch_penalty,
                    rng=search.rng,
                )
                branches += [search.branch(max(search.tree.turns[turn].parent, 0)) for turn in turns]
            self._run(branches, greedy, progress, timer)

    def _run(self, branches: list[_Branch], greedy: bool, progress: _Progress, timer: Timer | None) -> None:
        """Take branches to their ends, all by one turn at a time."""
        while branches:
            with _phase(timer, "rollout/generate"):
                calls = self._write_turns(branches, greedy)
            with _phase(timer, "rollout/tools"):
                going_on = self._answer(branches, calls)
            decoded = sum(len(branch.search.tree.turns[branch.turn].action_ids) for branch in branches)
            progress.add(len(branches) - len(going_on), decoded)
            branches = going_on

    def _write_turns(self, branches: Sequence[_Branch], greedy: bool) -> list[ToolCall | None]:
        """Let every branch write one turn and move to it; the tool calls found (None: the turn is a leaf)."""
        upcoming: dict[str, int] = {}
        requests = []
        for branch in branches:
            key = branch.search.key
            turn = upcoming.get(key, len(branch.search.tree))  # the index that `add_turn` will give
            upcoming[key] = turn + 1
            requests.append(self._request(branch, turn, greedy))
        try:
            completions = self.engine.generate(requests)
        except Exception as error:
            ids = list(dict.fromkeys(branch.search.tree.question_id for branch in branches))
            raise RuntimeError(f"the engine failed while it wrote turns for the questions {ids}: {error}") from error
        self.counters.turns += len(branches)
        return [self._add_turn(branch, completion) for branch, completion in zip(branches, completions, strict=True)]

    def _request(self, branch: _Branch, turn: int, greedy: bool) -> Request:
        search = branch.search
        room = search.token_limit - len(branch.prompt_ids)
        sampling = SamplingParams(
            max_new_tokens=min(room, self.rollout.max_turn_tokens or room),
            temperature=0.0 if greedy else self.rollout.temperature,
            top_p=1.0 if greedy else self.rollout.top_p,
            top_k=0 if greedy else self.rollout.top_k,
            stop=self._stop,
        )
        return Request(
            prompt_ids=branch.prompt_ids.tolist(),
            sampling=sampling,
            seed=_hash(*search.seed, branch.number, len(branch.path)),
            path=branch.path,
            turn_key=(search.key, turn),
        )

    def _add_turn(self, branch: _Branch, completion: Completion) -> ToolCall | None:
        """Put a completion into the tree; the call in it."""
        call = None
        if completion.finish_reason == "stop":
            ids = completion.token_ids
            text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            call = parse_call(str(text), self.toolbox.names)
        runs = call is not None and not call.problem and branch.calls < self.tools.call_limit
        branch.turn = branch.search.tree.add_turn(
            branch.turn,
            completion.token_ids,
            completion.policy_logprobs,
            finish_reason=completion.finish_reason,
            tool=call.tool if call is not None and runs else None,
        )
        return call

    def _answer(self, branches: Sequence[_Branch], calls: Sequence[ToolCall | None]) -> list[_Branch]:
        """Run the calls and attach the observations; the branches that go on."""
        calling = [(branch, call) for branch, call in zip(branches, calls, strict=True) if call is not None]
        allowed = [branch.calls < self.tools.call_limit for branch, _ in calling]
        results = self.toolbox.run([call for (_, call), run in zip(calling, allowed, strict=True) if run])
        self._count(results)
        observations = iter(self._observations(results))
        going_on = []
        for (branch, _), run in zip(calling, allowed, strict=True):
            observation = self._cut(next(observations), branch.room) if run else self._notice
            if 0 < len(observation) <= branch.room:  # else the turn stays a leaf
                branch.observe(observation)
                going_on.append(branch)
        return going_on

    def _count(self, results: Sequence[ToolResult]) -> None:
        self.counters.tool_calls += len(results)
        self.counters.failed_tool_calls += sum(not result.ok for result in results)

    def _observations(self, results: Sequence[ToolResult]) -> list[TokenIds]:
        """Token ids of results, each text encoded once and cut to `max_result_tokens`."""
        encoded = {
            text: self._cut(self._encode(format_result(text)), self.tools.max_result_tokens)
            for text in dict.fromkeys(result.text for result in results)
        }
        return [encoded[result.text] for result in results]

    def _cut(self, observation: TokenIds, room: int) -> TokenIds:
        """At most `room` tokens of a result, still with its closing tag; empty when that would leave no text."""
        if len(observation) <= room:
            return observation
        kept = room - len(self._closing)
        return np.concatenate([observation[:kept], self._closing]) if kept > self._opening_tokens else observation[:0]

    def _encode(self, text: str) -> TokenIds:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def _phase(timer: Timer | None, name: str) -> AbstractContextManager[object]:
    return nullcontext() if timer is None else timer.phase(name)


def _hash(*parts: int | str) -> int:
    """A 63-bit seed from what it shall depend on; the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
