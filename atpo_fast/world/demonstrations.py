"""Scripted demonstrations for the cold start.

They teach the format, the search tool and copying, and follow mostly poor strategies, so that reinforcement learning
has something to find. Every turn begins with what is known and the look-ups that remain:

    <think> e17 then mentor then rival</think><search> mentor of e17</search>
    <think> e17 is e33 then rival</think><search> rival of e33</search>
    <think> e33 is e50</think><answer> \\boxed{ e50 }</answer>

Each poor strategy departs from the right one in a single decision of one token, and copies as faithfully. So a small
model learns to copy from all of them, and takes the right path of every question sometimes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import WorldConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment.tags import format_result
from atpo_fast.tree.turn_tree import TurnTree
from atpo_fast.world.facts import World, composition

# Poor strategies and their shares among the demonstrations that are not right, for one and for several hops.
# blind: answers with the entity of the question. early: answers with what the first search found.
# wrong_order: looks up the last relation first. sloppy: leaves the entity out of the query and believes the first page.
# misread: answers from a page of the first result that is about something else.
_POOR_ONE_HOP = {"blind": 0.4, "sloppy": 0.3, "misread": 0.3}
_POOR_MULTI_HOP = {"early": 0.75, "wrong_order": 0.1, "blind": 0.05, "sloppy": 0.05, "misread": 0.05}
_ONE_SEARCH = ("early", "sloppy", "misread")
_FACT = re.compile(r"of (\w+) is (\w+)\.")


def make_demonstrations(
    world: World,
    config: WorldConfig,
    tokenizer: PreTrainedTokenizerBase,
    search_tool: Callable[[str], str],
    encode_prompt: Callable[[Question], list[int]],
) -> list[TurnTree]:
    """Make `config.demonstrations` chains over training questions, every number of hops equally often.

    `search_tool` is that of the rollout; its real results are the observations. A share `config.good_fraction`
    follows the right strategy. `meta` of each tree names the strategy and the question.
    """
    rng = np.random.default_rng([config.seed, 1])
    by_hops: dict[int, list[Question]] = {}
    for question in world.train:
        by_hops.setdefault(question.meta["hops"], []).append(question)
    kinds = [by_hops[h] for h in sorted(by_hops)]
    script = _Script(tokenizer, search_tool)
    demonstrations = []
    for i in range(config.demonstrations):
        kind = kinds[i % len(kinds)]
        question = kind[rng.integers(len(kind))]
        strategy = _draw_strategy(question.meta["hops"], config.good_fraction, rng)
        demonstrations.append(script.play(question, strategy, encode_prompt(question)))
    return demonstrations


def _draw_strategy(hops: int, good_fraction: float, rng: np.random.Generator) -> str:
    if rng.random() < good_fraction:
        return "good"
    poor = _POOR_ONE_HOP if hops == 1 else _POOR_MULTI_HOP
    return str(rng.choice(list(poor), p=list(poor.values())))


class _Script:
    """A strategy played on a question, turn by turn, with the real search tool."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, search_tool: Callable[[str], str]):
        self.tokenizer = tokenizer
        self.search_tool = search_tool

    def play(self, question: Question, strategy: str, prompt_ids: Sequence[int]) -> TurnTree:
        """Play one demonstration: a chain of search turns and an answer."""
        asked = composition(question)
        plan = list(reversed(asked.relations) if strategy == "wrong_order" else asked.relations)
        searches = 0 if strategy == "blind" else 1 if strategy in _ONE_SEARCH else len(plan)
        meta = {"question": question.text, "answers": list(question.answers), "strategy": strategy}
        tree = TurnTree(prompt_ids, question_id=question.id, meta=meta)
        turn, entity = 0, asked.entities[0]
        known = entity
        for done in range(searches):
            query = plan[done] if strategy == "sloppy" else f"{plan[done]} of {entity}"
            thought = " then ".join([known, *plan[done:]])
            result = self.search_tool(query)
            turn = tree.add_turn(
                turn,
                self._encode(f"<think> {thought}</think><search> {query}</search>"),
                observation_ids=self._encode(format_result(result)),
                tool="search",
            )
            subject, entity = _read(result, strategy, entity)
            known = f"{subject} is {entity}"
        answer = self._encode(f"<think> {known}</think><answer> \\boxed{{ {entity} }}</answer>")
        tree.add_turn(turn, [*answer, self.tokenizer.eos_token_id], finish_reason="eos")
        return tree

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _read(result: str, strategy: str, entity: str) -> tuple[str, str]:
    """Return subject and object of the fact that a strategy takes from a search result."""
    facts: list[tuple[str, str]] = _FACT.findall(result)
    right = [fact for fact in facts if fact[0] == entity]
    others = [fact for fact in facts if fact[0] != entity]
    choice = {"sloppy": facts, "misread": others}.get(strategy, right)
    if not choice:
        raise ValueError(
            f"a search about {entity} found only {result!r}: the embedded world needs tools.top_k >= 2 and whole "
            "passages (tools.passage_chars)"
        )
    return choice[0]
