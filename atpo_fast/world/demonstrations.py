"""Scripted demonstrations for the cold start.

They teach the format, the search tool and copying, and follow mostly poor strategies, so that reinforcement learning
has something to find. Every turn begins with the plan: the look-up that is next and the relations that remain.

    <think> mentor of e17 then rival</think><search> mentor of e17</search>
    <think> rival of e33</think><search> rival of e33</search>
    <think> found e50</think><answer> \\boxed{ e50 }</answer>

Each strategy departs from the right one in a single decision of a token or two, and occurs at every number of hops at
which it differs, so that a policy trained on the mixture takes the right path of every question sometimes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config.schema import WorldConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment.tags import format_result
from atpo_fast.tree.turn_tree import TurnTree
from atpo_fast.world.facts import World, composition

# Poor strategies and their shares among the demonstrations that are not right, for one and for several hops.
# early: answers with what the first search found. wrong_order: looks up the last relation first.
# sloppy: leaves the entity out of the query. guess: answers with some other entity of the first result.
_POOR_ONE_HOP = {"sloppy": 0.5, "guess": 0.5}
_POOR_MULTI_HOP = {"early": 0.65, "wrong_order": 0.15, "sloppy": 0.1, "guess": 0.1}


def make_demonstrations(
    world: World,
    config: WorldConfig,
    tokenizer: PreTrainedTokenizerBase,
    search: Callable[[str], str],
    encode_prompt: Callable[[Question], list[int]],
) -> list[TurnTree]:
    """`config.demonstrations` chains over training questions, every number of hops equally often.

    `search` is the tool of the rollout; its real results are the observations. A share `config.good_fraction`
    follows the right strategy. `meta` of each tree names the strategy and the question.
    """
    rng = np.random.default_rng([config.seed, 1])
    by_hops: dict[int, list[Question]] = {}
    for question in world.train:
        by_hops.setdefault(question.meta["hops"], []).append(question)
    kinds = [by_hops[h] for h in sorted(by_hops)]
    script = _Script(world, tokenizer, search, rng)
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
    """Plays a strategy on a question, turn by turn, with the real search tool."""

    def __init__(
        self,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        search: Callable[[str], str],
        rng: np.random.Generator,
    ):
        self.tokenizer = tokenizer
        self.search = search
        self.rng = rng
        self.index = {name: i for i, name in enumerate(world.entities)}
        self.facts = {
            (relation, entity): world.entities[world.targets[r, e]]
            for r, relation in enumerate(world.relations)
            for e, entity in enumerate(world.entities)
        }

    def play(self, question: Question, strategy: str, prompt_ids: Sequence[int]) -> TurnTree:
        """One demonstration: a chain of search turns and an answer."""
        asked = composition(question)
        plan = list(reversed(asked.relations) if strategy == "wrong_order" else asked.relations)
        entity, result = asked.entities[0], ""
        meta = {"question": question.text, "answers": list(question.answers), "strategy": strategy}
        tree = TurnTree(prompt_ids, question_id=question.id, meta=meta)
        turn = 0
        searches = 1 if strategy in ("early", "sloppy", "guess") else len(plan)
        for done in range(searches):
            query = plan[done] if strategy == "sloppy" else f"{plan[done]} of {entity}"
            thought = " then ".join([f"{plan[done]} of {entity}", *plan[done + 1 :]])
            result = self.search(query)
            turn = tree.add_turn(
                turn,
                self._encode(f"<think> {thought}</think><search> {query}</search>"),
                observation_ids=self._encode(format_result(result)),
                tool="search",
            )
            entity = self._read(strategy, plan[done], entity, result)
        answer = self._encode(f"<think> found {entity}</think><answer> \\boxed{{ {entity} }}</answer>")
        tree.add_turn(turn, [*answer, self.tokenizer.eos_token_id], finish_reason="eos")
        return tree

    def _read(self, strategy: str, relation: str, entity: str, result: str) -> str:
        """The entity taken from a search result."""
        right = self.facts[relation, entity]
        if strategy not in ("sloppy", "guess"):
            return right
        named = sorted({name for name in re.findall(r"\w+", result) if name in self.index} - {right, entity})
        return str(self.rng.choice(named)) if named else entity

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
