"""The tree search: from questions to search trees, in the order in which they finish (docs/design.md#search).

One loop over events. A branch is ready, then written by the engine, then answered by a tool, then ready again, until it
ends (`BranchState`). A search's round ends with its last branch, and the next one begins. The streaming schedule
never waits. The synchronous one adds three barriers: no turn is written while a tool runs, no tool runs while a turn is
written, and no round or search begins while any branch is active.

Siblings share nothing mutable: the past calls, the room and the seed of a branch all follow from its own path.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from queue import Empty, SimpleQueue

from transformers import PreTrainedTokenizerBase

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Completion, Engine, TurnKey
from atpo_fast.environment import ToolBox, ToolResult
from atpo_fast.rollout.branch import Branch, BranchState, QuestionSearch
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.rollout.counters import REPORT_SECONDS, Progress, ProgressCallback, RolloutCounters, Timer, timed
from atpo_fast.rollout.expansion import keep_leaves, select_turns
from atpo_fast.rollout.turns import TurnWriter
from atpo_fast.tree.turn_tree import TokenIds, TurnTree

_LOG = logging.getLogger(__name__)
_BUSY = (BranchState.WRITING, BranchState.CALLING, BranchState.ANSWERING)


class TreeSearch:
    """The tree search over an engine and a tool box.

    Args:
        engine: engine that writes the turns.
        tokenizer: reads calls from turns and encodes observations; sampled tokens are never encoded again.
        toolbox: tools that answer the calls.
        rollout: shape of the search, sampling, limits and schedule.
        tools: call limit and length of results.
        cache_tokens: room in the engine's cache; it bounds how many questions are searched at once (`CacheBudget`).
        max_positions: longest path that the model can hold, prompt included.

    The log-probs stored in a tree are the engine's `policy_logprobs`: what the trainer recomputes, and what the
    entropy estimate H(n) consists of. They are those of the sampling distribution where top-p and top-k are off.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        toolbox: ToolBox,
        rollout: RolloutConfig,
        tools: ToolsConfig,
        *,
        cache_tokens: int = 262144,
        max_positions: int | None = None,
    ) -> None:
        self.engine = engine
        self.toolbox = toolbox
        self.rollout = rollout
        self.max_positions = max_positions
        self.counters = RolloutCounters()
        self.writer = TurnWriter(tokenizer, toolbox.names, rollout, tools)
        self._budgets = {greedy: CacheBudget(cache_tokens, self._branches_per_tree(greedy)) for greedy in (False, True)}

    def roll_out(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        greedy: bool = False,
        on_progress: ProgressCallback | None = None,
        timer: Timer | None = None,
    ) -> Iterator[tuple[int, TurnTree]]:
        """Yield (index of the question, its tree) as each tree is finished; `in_order` gives the trees as a list.

        The search advances only while the next tree is asked for. Closing the iterator ends it and leaves nothing in
        the engine.

        Args:
            prompts: token ids per question.
            seed: seed of the sampling. With the ids of the questions it decides everything: neither the other questions
                of the call nor their order or number matter, nor when a tool answers.
            greedy: one chain at temperature 0, for evaluation.
            on_progress: called with (finished leaves, all leaves, decoded tokens) after each turn, and twice a second
                while none is finished. What it raises stops the roll-out.
            timer: times the phases `rollout/generate` (the engine works) and `rollout/tools` (all wait for tools).

        Raises:
            ValueError: questions and prompts differ in number, or a prompt leaves no room for an answer; at once.
            RuntimeError: the engine failed; the message names the questions. Raised by the iterator.
        """
        searches = self._searches(questions, prompts, seed)
        budget = self._budgets[greedy]
        progress = Progress(on_progress, budget.branches * len(searches))
        return _RollOut(self, deque(searches), greedy, budget, progress, timer).run()

    def _searches(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], seed: int
    ) -> list[QuestionSearch]:
        if len(questions) != len(prompts):
            raise ValueError(f"{len(questions)} questions but {len(prompts)} prompts")
        seen: Counter[str] = Counter()
        searches = []
        for order, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            room = self.rollout.max_response_tokens
            if self.max_positions is not None:
                room = min(room, self.max_positions - len(prompt))
            if room < 1 or not len(prompt):
                raise ValueError(
                    f"question {question.id!r}: a prompt of {len(prompt)} tokens cannot be answered "
                    f"(the model holds {self.max_positions} positions)"
                )
            searches.append(QuestionSearch.of(question, seen[question.id], prompt, order, seed, room))
            seen[question.id] += 1
        return searches

    def _branches_per_tree(self, greedy: bool) -> int:
        """Return the number of leaves of a full tree before any is pruned."""
        if greedy:
            return 1
        rounds = 0 if self.rollout.strategy == "chain" else self.rollout.expansion_rounds
        return self.rollout.initial_chains + rounds * self.rollout.expansions_per_round


def in_order(finished: Iterable[tuple[int, TurnTree]]) -> list[TurnTree]:
    """Collect the trees of a roll-out in the order of their questions."""
    return [tree for _, tree in sorted(finished, key=itemgetter(0))]


@dataclass(slots=True)
class _RollOut:
    """One call of `TreeSearch.roll_out`: its searches and what their branches wait for."""

    owner: TreeSearch
    waiting: deque[QuestionSearch]  # searches that begin in this order, as soon as `budget` has room
    greedy: bool  # whether each search is one chain, without expansion
    budget: CacheBudget
    progress: Progress
    timer: Timer | None

    searching: list[QuestionSearch] = field(
        default_factory=list
    )  # searches in progress, in the order of their questions
    states: Counter[BranchState] = field(default_factory=Counter)  # number of branches of `searching` in each state
    writing: dict[TurnKey, Branch] = field(default_factory=dict)  # branches that the engine's completions belong to
    answered: SimpleQueue[Branch] = field(default_factory=SimpleQueue)  # branches whose tool calls are done

    def run(self) -> Iterator[tuple[int, TurnTree]]:
        """Grow all trees. However it ends, nothing of them is left in the engine.

        Raises:
            RuntimeError: the engine failed; the message names the questions.
        """
        self.budget.begin()
        try:
            self._admit()
            while self.searching:
                self._submit_turns()
                self._submit_calls()
                if self.states[BranchState.WRITING]:
                    self._poll()
                    self._take_answers(wait=False)
                else:
                    self._take_answers(wait=self.states[BranchState.ANSWERING] > 0)
                self._end_late_branches()
                yield from self._end_rounds()
                self.progress.report()
        finally:
            for branch in self._branches(BranchState.ANSWERING):
                assert branch.answer is not None
                branch.answer.cancel()
            for search in self.searching:
                self.owner.engine.release(search.key)

    @property
    def _rollout(self) -> RolloutConfig:
        return self.owner.rollout

    @property
    def _synchronous(self) -> bool:
        return self._rollout.schedule == "synchronous"

    @property
    def _busy(self) -> bool:
        """Whether any branch is at the engine, at the tools or on the way to them."""
        return any(self.states[state] for state in _BUSY)

    def _move(self, branch: Branch, state: BranchState) -> None:
        """Change the state of a branch, and the numbers by state with it."""
        self.states[branch.state] -= 1
        self.states[state] += 1
        branch.state = state

    def _branches(self, state: BranchState) -> list[Branch]:
        """List the branches in a state, by question and then by number."""
        if not self.states[state]:
            return []
        return [branch for search in self.searching for branch in search.round if branch.state is state]

    # Searches and rounds

    def _admit(self) -> None:
        """Begin searches that have room; at least one where none is in progress."""
        if self._synchronous and self.searching:
            return
        while self.waiting and (not self.searching or self.budget.has_room(self.searching, self.waiting[0])):
            search = self.waiting.popleft()
            self.searching.append(search)
            self._begin_round(search, [0] * (1 if self.greedy else self._rollout.initial_chains))

    def _begin_round(self, search: QuestionSearch, turns: Sequence[int]) -> None:
        search.begin_round(turns)
        self.states[BranchState.READY] += len(turns)

    def _end_rounds(self) -> list[tuple[int, TurnTree]]:
        """Begin the next rounds where one has ended; finish searches after their last, and return their trees."""
        if not self.states[BranchState.ENDED] or (self._synchronous and (self.states[BranchState.READY] or self._busy)):
            return []
        finished = []
        for search in [search for search in self.searching if search.ended]:
            self.states[BranchState.ENDED] -= len(search.round)
            search.end_round()
            if turns := self._expanded(search):
                self._begin_round(search, turns)
            else:
                finished.append((search.order, self._finish(search)))
        if finished:
            self._admit()
        return finished

    def _expanded(self, search: QuestionSearch) -> list[int]:
        """Choose the turns that a search's next round continues: parents of those re-sampled; none after the last."""
        if self.greedy or self._rollout.strategy == "chain":
            return []
        while search.rounds <= self._rollout.expansion_rounds:  # the initial chains are a round too
            turns = select_turns(
                search.tree,
                self._rollout.expansions_per_round,
                strategy=self._rollout.strategy,
                branch_penalty=self._rollout.branch_penalty,
                rng=search.rng,
            )
            if turns:
                return [max(search.tree.turns[turn].parent, 0) for turn in turns]
            search.rounds += 1
        return []

    def _finish(self, search: QuestionSearch) -> TurnTree:
        """Take a search out of the engine, count it and return its tree with the leaves that are kept."""
        self.searching.remove(search)
        self.owner.engine.release(search.key)
        self.budget.finished(search)
        counters, turns = self.owner.counters, search.tree.turns
        counters.trees += 1
        counters.failed_trees += not any(turns[n].finish_reason == "eos" for n in search.tree.leaves)
        return search.tree if self.greedy else keep_leaves(search.tree, self._rollout.leaves, search.rng)

    # Turns

    def _submit_turns(self) -> None:
        """Let every branch that is ready write a turn."""
        if self._synchronous and self._busy:
            return
        ready = self._branches(BranchState.READY)
        if not ready:
            return
        requests = [self.owner.writer.request(branch, self.greedy) for branch in ready]
        for branch, request in zip(ready, requests, strict=True):
            self.writing[request.turn_key] = branch
            self._move(branch, BranchState.WRITING)
        with self._engine_call():
            self.owner.engine.submit(requests)

    def _poll(self) -> None:
        with self._engine_call():
            finished = self.owner.engine.poll()
        for key, completion in finished:
            self._write(self.writing.pop(key), key[1], completion)

    @contextmanager
    def _engine_call(self) -> Iterator[None]:
        """Time a call of the engine, and name the questions when it fails."""
        with timed(self.timer, "rollout/generate"):
            try:
                yield
            except Exception as error:
                ids = list(dict.fromkeys(branch.search.tree.question_id for branch in self.writing.values()))
                raise RuntimeError(
                    f"the engine failed while it wrote turns for the questions {ids}: {error}"
                ) from error

    def _write(self, branch: Branch, number: int, completion: Completion) -> None:
        """Take a turn that the engine has written."""
        branch.call = self.owner.writer.write(branch, number, completion)
        self.owner.counters.turns += 1
        self.progress.decoded_tokens += len(completion.token_ids)
        if branch.call is None:
            self._end(branch)
        elif self.owner.writer.may_call(branch):
            self._move(branch, BranchState.CALLING)
        else:
            self._continue(branch, self.owner.writer.notice)

    def _continue(self, branch: Branch, observation: TokenIds) -> None:
        """Continue a branch after an observation, if there is room for it; else its turn stays a leaf."""
        if 0 < len(observation) <= branch.room:
            branch.observe(observation)
            self._move(branch, BranchState.READY)
        else:
            self._end(branch)

    def _end(self, branch: Branch) -> None:
        self.progress.leaves += 1
        self._move(branch, BranchState.ENDED)

    # Tools

    def _submit_calls(self) -> None:
        """Submit the calls that branches have written to the tools."""
        if self._synchronous and self.states[BranchState.WRITING]:
            return
        for branch in self._branches(BranchState.CALLING):
            call = branch.call
            assert call is not None
            branch.answer = self.owner.toolbox.submit(call)
            self._move(branch, BranchState.ANSWERING)
            self.owner.counters.tool_calls += 1
            branch.answer.add_done_callback(partial(self._answered, branch))

    def _answered(self, branch: Branch, _: Future[ToolResult]) -> None:
        """Note that a call is done; runs on a thread of the tools."""
        self.answered.put(branch)

    def _take_answers(self, wait: bool) -> None:
        """Continue the branches whose tools have answered; with `wait`, wait a while for the first."""
        answered: list[Branch] = []
        if wait:
            with timed(self.timer, "rollout/tools"), suppress(Empty):
                answered.append(self.answered.get(timeout=min(REPORT_SECONDS, self._late_seconds)))
        while not self.answered.empty():
            answered.append(self.answered.get())
        answered = [branch for branch in answered if branch.state is BranchState.ANSWERING]  # others came too late
        results = [_result(branch) for branch in answered]
        self.owner.counters.failed_tool_calls += sum(not result.ok for result in results)
        observations = self.owner.writer.observations([result.text for result in results])
        for branch, observation in zip(answered, observations, strict=True):
            self._continue(branch, self.owner.writer.cut(observation, branch.room))

    @property
    def _late_seconds(self) -> float:
        return self._rollout.straggler_seconds or float("inf")

    def _end_late_branches(self) -> None:
        """End the branches that have kept their round waiting for their tools for too long."""
        if not self._rollout.straggler_seconds:
            return
        now = time.monotonic()
        for search in self.searching:
            if search.blocked_since is not None:
                search.blocked_seconds += now - search.blocked_since
            search.blocked_since = now if search.blocked else None
            if search.blocked and search.blocked_seconds >= self._late_seconds:
                self._time_out(search)

    def _time_out(self, search: QuestionSearch) -> None:
        """End the branches whose tools have not answered; their turns become leaves."""
        late = [branch for branch in search.round if branch.state is BranchState.ANSWERING]
        _LOG.warning(
            "question %r: %d of %d branches end without a tool's answer, after %g seconds (rollout.straggler_seconds)",
            search.tree.question_id,
            len(late),
            len(search.round),
            self._late_seconds,
        )
        self.owner.counters.timed_out_turns += len(late)
        for branch in late:
            branch.answer = None  # not cancelled: the future may be another branch's too
            self._end(branch)


def _result(branch: Branch) -> ToolResult:
    """Take the answer of a branch's call; a failed future is a failed call."""
    future, branch.answer = branch.answer, None
    assert future is not None
    try:
        return future.result()
    except Exception as error:
        return ToolResult(f"Tool({branch.turns[-1].tool}) failed: {type(error).__name__}: {error}", ok=False)
