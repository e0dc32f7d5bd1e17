"""The tree search: from questions to search trees, in the order in which they finish (docs/design.md#search).

`growth.py` is the loop that grows them, and `strategies/` says what grows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Engine
from atpo_fast.environment import TAGS, ToolBox
from atpo_fast.environment.sessions import Sessions, StateTree, task_of
from atpo_fast.rollout.branch import QuestionSearch, hashed
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.rollout.counters import Progress, ProgressCallback, RolloutCounters, Timer
from atpo_fast.rollout.growth import Growth, Station
from atpo_fast.rollout.strategies import STRATEGIES, OneChain
from atpo_fast.rollout.turns import TurnWriter
from atpo_fast.tree.turn_tree import TurnTree


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
        sessions: live environments; none: the tools are all there is.

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
        sessions: Sessions | None = None,
    ) -> None:
        self.engine = engine
        self.toolbox = toolbox
        self.sessions = sessions
        self.rollout = rollout
        self.max_positions = max_positions
        self.counters = RolloutCounters()
        self.writer = TurnWriter(tokenizer, self.names, rollout, tools)
        leaves = {False: rollout.grown_leaves, True: 1}
        self._budgets = {greedy: CacheBudget(cache_tokens, leaves[greedy]) for greedy in leaves}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that the policy can call. Raises ValueError for one that both a session and a tool have."""
        acting = () if self.sessions is None else self.sessions.names
        for name in acting:
            if name in self.toolbox.names or name in (TAGS.think, TAGS.answer, TAGS.result):
                raise ValueError(
                    f"the environment's sessions offer {name!r}, which is a tag already: rename it (environment.action "
                    "or the name of the session's tool), or take the tool of this name out of the section tools"
                )
        return (*self.toolbox.names, *acting)

    def roll_out(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        greedy: bool = False,
        on_progress: ProgressCallback | None = None,
        timer: Timer | None = None,
        states: Sequence[StateTree] | None = None,
    ) -> Iterator[tuple[int, TurnTree]]:
        """Yield (index of the question, its tree) as each tree is finished; `in_order` gives the trees as a list.

        The search advances only while the next tree is asked for. Closing the iterator ends it and leaves nothing in
        the engine. Where `rollout.trees_per_question` is more than one, as many trees come with the index of each
        question, numbered in `meta["tree"]`.

        Args:
            prompts: token ids per question.
            seed: seed of the sampling. With the ids of the questions it decides everything: neither the other questions
                of the call nor their order or number matter, nor when a tool answers.
            greedy: one chain at temperature 0, for evaluation.
            on_progress: called with (finished leaves, all leaves, decoded tokens) after each turn, and twice a second
                while none is finished. What it raises stops the roll-out.
            states: per question, the states of its sessions (`begin_sessions`), which are closed with the roll-out.
            timer: times the phases `rollout/generate` (the engine works) and `rollout/tools` (all wait for tools).

        Raises:
            ValueError: questions and prompts differ in number, or a prompt leaves no room for an answer; at once.
            RuntimeError: the engine failed; the message names the questions. Raised by the iterator.
        """
        trees = 1 if greedy else self.rollout.trees_per_question
        searches = self._searches(questions, prompts, seed, trees, states)
        budget = self._budgets[greedy]
        progress = Progress(on_progress, budget.branches * len(searches))
        strategy = OneChain if greedy else STRATEGIES[self.rollout.strategy]
        station = Station(self.engine, self.toolbox, self.rollout, self.writer, self.counters, self.sessions)
        return Growth(station, deque(searches), strategy, greedy, budget, progress, timer).run()

    def _searches(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        seed: int,
        trees: int,
        states: Sequence[StateTree] | None = None,
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
            repeat = seen[question.id]
            for number in range(trees):
                own = None if states is None else states[order].again() if number else states[order]
                search = QuestionSearch.of(question, repeat, prompt, order, seed, room, number, own)
                if trees > 1:
                    search.tree.meta["tree"] = number
                searches.append(search)
            seen[question.id] += 1
        return searches


def in_order(finished: Iterable[tuple[int, TurnTree]]) -> list[TurnTree]:
    """Collect the trees of a roll-out in the order of their questions, and those of one question by their numbers."""
    return [tree for _, tree in sorted(finished, key=lambda found: (found[0], found[1].meta.get("tree", 0)))]


def begin_sessions(sessions: Sessions, questions: Sequence[Question], seed: int) -> list[StateTree]:
    """Open the first session of each question, side by side.

    Its seed follows from `seed`, the question's id, and how many equal ids came before.
    """
    seen: Counter[str] = Counter()
    tasks = []
    for question in questions:
        tasks.append((question.id, task_of(question), hashed(seed, question.id, seen[question.id], "session")))
        seen[question.id] += 1
    return sessions.begin(tasks)
