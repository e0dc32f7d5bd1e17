"""The turn loop: from questions to search trees (design, section 2).

Nothing mutable is shared between siblings: the number of calls made, the room left and the seed of a branch all follow
from its own path. `Scheduler` decides what happens when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.base import Engine
from atpo_fast.environment import ToolBox
from atpo_fast.rollout.branch import Search, hashed
from atpo_fast.rollout.cache_budget import CacheBudget
from atpo_fast.rollout.counters import Progress, ProgressCallback, RolloutCounters, Timer
from atpo_fast.rollout.expansion import keep_leaves
from atpo_fast.rollout.scheduler import Scheduler
from atpo_fast.rollout.turns import TurnWriter
from atpo_fast.tree.turn_tree import TurnTree

_RESERVE_TOKENS = 100  # left for the policy after a result that had to be cut (published)


class TurnLoop:
    """Rolls out search trees.

    Args:
        engine: writes turns.
        tokenizer: reads calls from turns and encodes observations; sampled tokens are never encoded again.
        toolbox: answers calls.
        rollout: shape of the search, sampling, limits and schedule.
        tools: call limit and length of results.
        cache_tokens: room in the engine's cache; it bounds how many questions are searched at once (`CacheBudget`).
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
        cache_tokens: int = 262144,
        max_positions: int | None = None,
    ) -> None:
        self.engine = engine
        self.toolbox = toolbox
        self.rollout = rollout
        self.max_positions = max_positions
        self.counters = RolloutCounters()
        self._writer = TurnWriter(tokenizer, toolbox.names, rollout, tools)
        self._budgets = {greedy: CacheBudget(cache_tokens, self._branches_per_tree(greedy)) for greedy in (False, True)}

    def roll_out(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        greedy: bool = False,
        on_progress: ProgressCallback | None = None,
        on_tree: Callable[[int, TurnTree], None] | None = None,
        timer: Timer | None = None,
    ) -> list[TurnTree]:
        """One tree per question, in order.

        Args:
            prompts: token ids per question.
            seed: of the sampling. With the ids of the questions it decides everything: neither the other questions
                of the call nor their order or number matter, nor when a tool answers.
            greedy: one chain at temperature 0, for evaluation.
            on_progress: called with (finished leaves, all leaves, decoded tokens) after each turn, and twice a second
                while none is finished. What it raises stops the roll-out.
            on_tree: called with (index of the question, tree) as each tree is finished.
            timer: times the phases `rollout/generate` (the engine works) and `rollout/tools` (all wait for tools).

        Raises:
            ValueError: questions and prompts differ in number, or a prompt leaves no room for an answer.
            RuntimeError: the engine failed; the message names the questions.
        """
        searches = self._searches(questions, prompts, seed)
        trees: dict[int, TurnTree] = {}

        def finish(search: Search) -> None:
            tree = search.tree if greedy else keep_leaves(search.tree, self.rollout.leaves, search.rng)
            trees[search.order] = tree
            self.counters.trees += 1
            self.counters.failed_trees += not any(
                search.tree.turns[n].finish_reason == "eos" for n in search.tree.leaves
            )
            if on_tree is not None:
                on_tree(search.order, tree)

        budget = self._budgets[greedy]
        budget.begin()
        Scheduler(
            waiting=deque(searches),
            engine=self.engine,
            toolbox=self.toolbox,
            writer=self._writer,
            rollout=self.rollout,
            budget=budget,
            counters=self.counters,
            progress=Progress(on_progress, budget.branches * len(searches)),
            timer=timer,
            greedy=greedy,
            on_finish=finish,
        ).run()
        return [trees[index] for index in range(len(searches))]

    def _searches(self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], seed: int) -> list[Search]:
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
            rng = np.random.default_rng(hashed(int(seed), question.id, repeat, "expansion"))
            limit, reserve = len(prompt) + response, max(1, min(_RESERVE_TOKENS, response // 10))
            seeds = (int(seed), question.id, repeat)
            searches.append(Search(tree, index, seeds, limit, reserve, rng))
        return searches

    def _branches_per_tree(self, greedy: bool) -> int:
        """Leaves of a full tree before any is pruned."""
        if greedy:
            return 1
        rounds = 0 if self.rollout.strategy == "chain" else self.rollout.expansion_rounds
        return self.rollout.initial_chains + rounds * self.rollout.expansions_per_round
