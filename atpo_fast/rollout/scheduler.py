"""When turns are written, tools called and trees expanded: one loop over events (design, section 2).

A branch is ready, then written by the engine, then answered by a tool, then ready again, until it ends; a search's
round ends with its last branch, and the next one begins. Streaming moves everything on as soon as it can go on. The
synchronous schedule is the same loop with three barriers: no turn is written while a tool runs, no tool runs while a
turn is written, and no round or search begins while any branch goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from atpo_fast.config import RolloutConfig
from atpo_fast.engines.base import Completion, Engine, TurnKey
from atpo_fast.environment import ToolBox, ToolCall, ToolResult
from atpo_fast.rollout.branch import Branch, Search
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.rollout.counters import REPORT_SECONDS, Progress, RolloutCounters, Timer, timed
from atpo_fast.rollout.expansion import select_turns
from atpo_fast.rollout.turns import TurnWriter
from atpo_fast.tree.turn_tree import TokenIds

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """Takes the searches of one roll-out to their ends.

    Args:
        waiting: the searches; they begin in this order, as soon as `budget` has room.
        on_finish: called with each search when its last round has ended.
        greedy: one chain each, without expansion.
    """

    waiting: deque[Search]
    engine: Engine
    toolbox: ToolBox
    writer: TurnWriter
    rollout: RolloutConfig
    budget: CacheBudget
    counters: RolloutCounters
    progress: Progress
    timer: Timer | None
    greedy: bool
    on_finish: Callable[[Search], None]

    searching: list[Search] = field(default_factory=list)  # begun and not finished
    ready: list[Branch] = field(default_factory=list)  # to write a turn
    writing: dict[TurnKey, Branch] = field(default_factory=dict)  # in flight at the engine
    calls: list[tuple[Branch, ToolCall]] = field(default_factory=list)  # to be handed to the tools
    answering: dict[Branch, Future[ToolResult]] = field(default_factory=dict)  # in flight at the tools
    answers: SimpleQueue[Branch] = field(default_factory=SimpleQueue)  # branches whose futures are done
    ended: deque[Search] = field(default_factory=deque)  # whose round has no live branch

    def run(self) -> None:
        """Grow all trees. However it ends, nothing of them is left in the engine.

        Raises:
            RuntimeError: the engine failed; the message names the questions.
        """
        try:
            self._admit()
            while self.searching:
                self._submit_turns()
                self._submit_calls()
                if self.writing:
                    self._poll()
                    self._take_answers(wait=False)
                else:
                    self._take_answers(wait=bool(self.answering))
                self._end_stragglers()
                self._end_rounds()
                self.progress.report()
        finally:
            for future in self.answering.values():
                future.cancel()
            for search in self.searching:
                self.engine.release(search.key)

    @property
    def _synchronous(self) -> bool:
        return self.rollout.schedule == "synchronous"

    # Searches and rounds

    def _admit(self) -> None:
        """Begin searches; without any going on, at least one."""
        if self._synchronous and self.searching:
            return
        while self.waiting and (not self.searching or self.budget.has_room(self.searching, self.waiting[0])):
            search = self.waiting.popleft()
            self.searching.append(search)
            self.ready += search.begin_round([0] * (1 if self.greedy else self.rollout.initial_chains))

    def _end_rounds(self) -> None:
        """Begin the next rounds where one has ended, and finish searches after their last."""
        if self._synchronous and (self.ready or self.writing or self.calls or self.answering):
            return
        count = len(self.searching)
        while self.ended:
            search = self.ended.popleft()
            search.end_round()
            if turns := self._expanded(search):
                self.ready += search.begin_round(turns)
            else:
                self._finish(search)
        if len(self.searching) < count:
            self._admit()

    def _expanded(self, search: Search) -> list[int]:
        """The turns that a search's next round continues: parents of those re-sampled. Empty after the last round."""
        if self.greedy or self.rollout.strategy == "chain":
            return []
        while search.rounds <= self.rollout.expansion_rounds:  # the initial chains are a round too
            turns = select_turns(
                search.tree,
                self.rollout.expansions_per_round,
                strategy=self.rollout.strategy,
                branch_penalty=self.rollout.branch_penalty,
                rng=search.rng,
            )
            if turns:
                return [max(search.tree.turns[turn].parent, 0) for turn in turns]
            search.rounds += 1
        return []

    def _finish(self, search: Search) -> None:
        self.searching.remove(search)
        self.engine.release(search.key)
        self.budget.finished(search)
        self.on_finish(search)

    # Turns

    def _submit_turns(self) -> None:
        """Let every branch that is ready write a turn."""
        if not self.ready or (self._synchronous and (self.writing or self.calls or self.answering)):
            return
        self.ready.sort(key=lambda branch: branch.place)
        requests = [self.writer.request(branch, self.greedy) for branch in self.ready]
        self.writing.update(zip((request.turn_key for request in requests), self.ready, strict=True))
        self.ready = []
        with self._engine_call():
            self.engine.submit(requests)

    def _poll(self) -> None:
        with self._engine_call():
            finished = self.engine.poll()
        for key, completion in finished:
            self._write(self.writing.pop(key), key[1], completion)

    @contextmanager
    def _engine_call(self) -> Iterator[None]:
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
        call = self.writer.write(branch, number, completion)
        self.counters.turns += 1
        self.progress.decoded_tokens += len(completion.token_ids)
        if call is None:
            self._end(branch)
        elif self.writer.may_call(branch):
            self.calls.append((branch, call))
        else:
            self._go_on(branch, self.writer.notice)

    def _go_on(self, branch: Branch, observation: TokenIds) -> None:
        """Continue a branch after an observation, if there is room for it; else its turn stays a leaf."""
        if 0 < len(observation) <= branch.room:
            branch.observe(observation)
            self.ready.append(branch)
        else:
            self._end(branch)

    def _end(self, branch: Branch) -> None:
        self.progress.leaves += 1
        branch.search.live -= 1
        if not branch.search.live:
            self.ended.append(branch.search)

    # Tools

    def _submit_calls(self) -> None:
        if self._synchronous and self.writing:
            return
        self.counters.tool_calls += len(self.calls)
        for branch, call in self.calls:
            branch.search.answering += 1
            self.answering[branch] = future = self.toolbox.submit(call)
            future.add_done_callback(partial(self._answered, branch))
        self.calls = []

    def _answered(self, branch: Branch, _: Future[ToolResult]) -> None:
        """On a thread of the tools."""
        self.answers.put(branch)

    def _take_answers(self, wait: bool) -> None:
        """Continue the branches whose tools have answered; with `wait`, wait a while for the first."""
        answered: list[Branch] = []
        if wait:
            with timed(self.timer, "rollout/tools"), suppress(Empty):
                answered.append(self.answers.get(timeout=min(REPORT_SECONDS, self._straggler_seconds)))
        while not self.answers.empty():
            answered.append(self.answers.get())
        answered = [branch for branch in answered if branch in self.answering]  # not those given up meanwhile
        results = [self._result(branch) for branch in answered]
        self.counters.failed_tool_calls += sum(not result.ok for result in results)
        observations = self.writer.observations([result.text for result in results])
        for branch, observation in zip(answered, observations, strict=True):
            self._go_on(branch, self.writer.cut(observation, branch.room))

    def _result(self, branch: Branch) -> ToolResult:
        branch.search.answering -= 1
        try:
            return self.answering.pop(branch).result()
        except Exception as error:
            return ToolResult(f"Tool({branch.turns[-1].tool}) failed: {type(error).__name__}: {error}", ok=False)

    @property
    def _straggler_seconds(self) -> float:
        return self.rollout.straggler_seconds or float("inf")

    def _end_stragglers(self) -> None:
        """End the branches that have kept their round waiting for their tools for too long."""
        if not self.rollout.straggler_seconds:
            return
        now = time.monotonic()
        for search in self.searching:
            if search.straggling_since is not None:
                search.straggling_seconds += now - search.straggling_since
            search.straggling_since = now if search.straggling else None
            if search.straggling and search.straggling_seconds >= self._straggler_seconds:
                self._give_up(search)

    def _give_up(self, search: Search) -> None:
        """Make leaves of the turns whose tools have not answered."""
        late = [branch for branch in search.round if branch in self.answering]
        _LOG.warning(
            "question %r: %d of %d branches end without a tool's answer, after %g seconds (rollout.straggler_seconds)",
            search.tree.question_id,
            len(late),
            len(search.round),
            self._straggler_seconds,
        )
        self.counters.straggling_turns += len(late)
        search.answering = 0
        for branch in late:
            del self.answering[branch]  # its future may be another branch's too
            self._end(branch)
