"""Grow the trees of one call of the tree search: one loop over events (docs/design.md#search).

A branch is ready, then written by the engine, then answered by a tool, then ready again, until it ends (`BranchState`).
A search's round ends with its last branch, and the strategy says what the next one begins with. The streaming schedule
never waits. The synchronous one adds three barriers: no turn is written while a tool runs, no tool runs while a turn is
written, and no round or search begins while any branch is active.

Siblings share nothing mutable: the past calls, the room and the seed of a branch all follow from its own path.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from atpo_fast.config import RolloutConfig
from atpo_fast.engines.base import Completion, Engine, TurnKey
from atpo_fast.environment import ToolBox, ToolCall, ToolResult
from atpo_fast.environment.sessions import SessionAnswer, Sessions
from atpo_fast.rollout.branch import Branch, BranchState, QuestionSearch
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.rollout.counters import REPORT_SECONDS, Progress, RolloutCounters, Timer, timed
from atpo_fast.rollout.strategies import Round, Strategy
from atpo_fast.rollout.turns import TurnWriter
from atpo_fast.tree.turn_tree import TokenIds, TurnTree

_LOG = logging.getLogger(__name__)
_BUSY = (BranchState.WRITING, BranchState.CALLING, BranchState.ANSWERING)


@dataclass(frozen=True, slots=True)
class Station:
    """What all calls of a tree search share: engine, tools, the shape of the search, and counters."""

    engine: Engine
    toolbox: ToolBox
    rollout: RolloutConfig
    writer: TurnWriter
    counters: RolloutCounters
    sessions: Sessions | None = None  # live environments, where the tools are not all


@dataclass(slots=True)
class Growth:
    """One call of `TreeSearch.roll_out`: its searches and what their branches wait for."""

    station: Station
    waiting: deque[QuestionSearch]  # searches that begin in this order, as soon as `budget` has room
    strategy: type[Strategy]  # how each tree grows
    greedy: bool
    budget: CacheBudget
    progress: Progress
    timer: Timer | None

    searching: list[QuestionSearch] = field(default_factory=list)  # in progress, in the order of their questions
    strategies: dict[str, Strategy] = field(default_factory=dict)  # strategy of each of them, by its key
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
                self.station.engine.release(search.key)
            self._release_sessions([*self.searching, *self.waiting])

    @property
    def _rollout(self) -> RolloutConfig:
        return self.station.rollout

    @property
    def _synchronous(self) -> bool:
        return self._rollout.schedule == "synchronous"

    @property
    def _busy(self) -> bool:
        """Whether any branch is at the engine, at the tools or on the way to them."""
        return any(self.states[state] for state in _BUSY)

    def _release_sessions(self, searches: Iterable[QuestionSearch]) -> None:
        """Close the sessions of searches."""
        if self.station.sessions is not None:
            self.station.sessions.release([search.states for search in searches if search.states is not None])

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
            self.strategies[search.key] = self.strategy(self._rollout, search)
            self._begin_round(search, self.strategies[search.key].begin())

    def _begin_round(self, search: QuestionSearch, begun: Round) -> None:
        search.begin_round(begun.starts, begun.kept)
        self.states[BranchState.READY] += len(begun.starts)

    def _end_rounds(self) -> list[tuple[int, TurnTree]]:
        """Begin the next rounds where one has ended; finish searches after their last, and return their trees."""
        if not self.states[BranchState.ENDED] or (self._synchronous and (self.states[BranchState.READY] or self._busy)):
            return []
        finished = []
        for search in [search for search in self.searching if search.ended]:
            self.states[BranchState.ENDED] -= len(search.round)
            if following := self.strategies[search.key].next_round(search.end_round()):
                self._begin_round(search, following)
            else:
                finished.append((search.order, self._finish(search)))
        if finished:
            self._admit()
        return finished

    def _finish(self, search: QuestionSearch) -> TurnTree:
        """Take a search out of the engine, count it and return its tree with the leaves that are kept."""
        self.searching.remove(search)
        self.station.engine.release(search.key)
        self.budget.finished(search)
        self._release_sessions([search])
        counters, turns = self.station.counters, search.tree.turns
        counters.trees += 1
        counters.failed_trees += not any(turns[n].finish_reason == "eos" for n in search.tree.leaves)
        return self.strategies.pop(search.key).finish()

    # Turns

    def _submit_turns(self) -> None:
        """Let every branch that is ready write a turn."""
        if self._synchronous and self._busy:
            return
        ready = self._branches(BranchState.READY)
        if not ready:
            return
        requests = [self.station.writer.request(branch, self.greedy, self.strategy.top_logprobs) for branch in ready]
        for branch, request in zip(ready, requests, strict=True):
            self.writing[request.turn_key] = branch
            self._move(branch, BranchState.WRITING)
        with self._engine_call():
            self.station.engine.submit(requests)

    def _poll(self) -> None:
        with self._engine_call():
            finished = self.station.engine.poll()
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
        branch.call = self.station.writer.write(branch, number, completion)
        self.station.counters.turns += 1
        self.progress.decoded_tokens += len(completion.token_ids)
        if branch.call is None or not branch.start.calls:
            self._end(branch)
        elif not self.station.writer.may_call(branch):
            self._end_calls(branch)
        elif branch.call.problem and not self.strategy.answers_bad_calls:
            self._end(branch)
        else:
            self._move(branch, BranchState.CALLING)

    def _end_calls(self, branch: Branch) -> None:
        """Take a call over the limit as the strategy says."""
        if self.strategy.over_limit == "notice":
            self._continue(branch, self.station.writer.notice)
            return
        if self.strategy.over_limit == "eos":
            branch.end_with(self.station.writer.end_token)
        self._end(branch)

    def _continue(self, branch: Branch, observation: TokenIds) -> None:
        """Continue a branch after an observation, if there is room for it; else its turn stays a leaf."""
        if not 0 < len(observation) <= branch.room:
            self._end(branch)
            return
        branch.observe(observation)
        if branch.done or branch.lost or len(branch.turns) == branch.start.turns:
            self._end(branch)
        else:
            self._move(branch, BranchState.READY)

    def _end(self, branch: Branch) -> None:
        """End a branch's round; it is done for good where its last turn is a leaf."""
        branch.leave()
        if self._to_score(branch):
            self._score(branch)
            return
        self.progress.leaves += branch.search.kept and not branch.active
        self._move(branch, BranchState.ENDED)

    def _to_score(self, branch: Branch) -> bool:
        """Tell whether the session of a branch has to score the trajectory that has ended."""
        sessions = self.station.sessions
        if sessions is None or not sessions.scores or not branch.search.kept:
            return False
        return not (branch.active or branch.scoring or branch.lost)

    def _score(self, branch: Branch) -> None:
        assert self.station.sessions is not None and branch.place is not None
        branch.scoring = True
        branch.answer = self.station.sessions.score(branch.place, self.station.writer.transcript(branch))
        self._move(branch, BranchState.ANSWERING)
        branch.answer.add_done_callback(partial(self._answered, branch))

    # Tools

    def _submit_calls(self) -> None:
        """Submit the calls that branches have written to the tools."""
        if self._synchronous and self.states[BranchState.WRITING]:
            return
        for branch in self._branches(BranchState.CALLING):
            call = branch.call
            assert call is not None
            branch.answer = self._call(branch, call)
            self._move(branch, BranchState.ANSWERING)
            self.station.counters.tool_calls += 1
            branch.answer.add_done_callback(partial(self._answered, branch))

    def _call(self, branch: Branch, call: ToolCall) -> Future[ToolResult] | Future[SessionAnswer]:
        """Give a call to the branch's session, or to the tools."""
        sessions, place = self.station.sessions, branch.place
        if sessions is None or place is None or call.problem or call.tool not in sessions.names:
            return self.station.toolbox.submit(call)
        branch.leave()
        return sessions.act(place, call, keep=place.waiting > 0 or self.strategies[branch.search.key].returns)

    def _answered(self, branch: Branch, _: Future[Any]) -> None:
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
        for branch in answered:
            if branch.scoring:
                branch.turns[-1].score = _score_of(branch)
                self._end(branch)
        answered = [branch for branch in answered if not branch.scoring]
        results = [_result(branch) for branch in answered]
        self.station.counters.failed_tool_calls += sum(not result.ok for result in results)
        observations = self.station.writer.observations([result.text for result in results])
        for branch, observation in zip(answered, observations, strict=True):
            self._continue(branch, self.station.writer.cut(observation, branch.room))

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
        self.station.counters.timed_out_turns += len(late)
        for branch in late:
            branch.answer = None  # not cancelled: the future may be another branch's too
            branch.lost = True
            self._end(branch)


def _result(branch: Branch) -> ToolResult:
    """Take the answer of a branch's call; a failed future is a failed call."""
    future, branch.answer = branch.answer, None
    assert future is not None
    try:
        answer = future.result()
    except Exception as error:
        return ToolResult(f"Tool({branch.turns[-1].tool}) failed: {type(error).__name__}: {error}", ok=False)
    if isinstance(answer, SessionAnswer):
        branch.acted_in(answer)
        return ToolResult(answer.outcome.text, answer.outcome.ok)
    assert isinstance(answer, ToolResult)
    return answer


def _score_of(branch: Branch) -> float | None:
    """Take the score of a branch's trajectory; none where its session was closed meanwhile."""
    future, branch.answer = branch.answer, None
    assert future is not None
    with suppress(Exception):
        score = future.result()
        assert score is None or isinstance(score, float)
        return score
    return None
