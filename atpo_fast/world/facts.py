"""Entities, relations and the questions over them.

Every relation maps the entities one to one onto other entities, so that each answer is equally likely and the random
guess rate is exactly 1/entities. A fact is one short passage ("The mentor of e17 is e33."). A search for "mentor of
e17" finds two facts that BM25 cannot tell apart: that one, and "The mentor of e40 is e17."; the policy has to read.
A search that leaves out the entity or the relation finds the wrong facts, and a distractor per entity names an entity
and a relation without answering anything.

A question asks for a composition: a start entity and distinct relations, looked up one after another, that never
comes back to an entity it has passed. Stopping early is therefore always wrong. Training and evaluation questions share
facts, which are there to be searched for, but no composition.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from atpo_fast.config import WorldConfig
from atpo_fast.data.questions import Passage, Question

_RELATIONS = (
    "mentor",
    "rival",
    "partner",
    "tailor",
    "landlord",
    "cousin",
    "doctor",
    "neighbour",
    "cook",
    "guard",
    "tenant",
    "pilot",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A world of facts with its passages and questions; `make_world` generates one from a seed."""

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    targets: NDArray[np.int64]  # (relations, entities) index of the entity each fact points to
    passages: list[Passage]
    train: list[Question]
    eval: list[Question]
    notes: dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Composition:
    """The look-ups that a question asks for: `relations` in their order, `entities` from the start to the answer."""

    relations: tuple[str, ...]
    entities: tuple[str, ...]  # entities on the way, one more than relations

    @property
    def hops(self) -> int:
        """Number of look-ups that the question needs."""
        return len(self.relations)

    @property
    def text(self) -> str:
        """The question in words, the last relation first."""
        asked = " of ".join(f"the {relation}" for relation in reversed(self.relations))
        return f"What is {asked} of {self.entities[0]}?"


def make_world(config: WorldConfig) -> World:
    """Make the world that `config` describes; the same configuration gives the same world.

    Raises:
        ValueError: fewer relations than hops, or too few compositions for the questions asked for.
    """
    if config.relations < config.max_hops:
        raise ValueError(
            f"world.relations={config.relations} must be at least world.max_hops={config.max_hops}: "
            "the relations of a question are distinct"
        )
    rng = np.random.default_rng(config.seed)
    entities = tuple(f"e{i}" for i in range(config.entities))
    relations = tuple(_RELATIONS[i] if i < len(_RELATIONS) else f"r{i}" for i in range(config.relations))
    targets = np.stack([_derangement(config.entities, rng) for _ in relations])
    passages = _passages(entities, relations, targets, rng)
    train, held_out = _split(_compositions(entities, relations, targets, config.max_hops), config, rng)
    return World(
        entities=entities,
        relations=relations,
        targets=targets,
        passages=passages,
        train=train,
        eval=held_out,
        notes=_notes(train, held_out, len(entities)),
    )


def composition(question: Question) -> Composition:
    """Return the composition that a question of this world was generated from."""
    return Composition(tuple(question.meta["relations"]), tuple(question.meta["entities"]))


def _derangement(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a one-to-one map without fixed points: n → (n,)."""
    while True:
        order = rng.permutation(n)
        if not np.any(order == np.arange(n)):
            return order


def _passages(
    entities: tuple[str, ...], relations: tuple[str, ...], targets: NDArray[np.int64], rng: np.random.Generator
) -> list[Passage]:
    """Make one passage for each fact and one distractor for each entity, shuffled."""
    texts = [
        f"The {relation} of {entity} is {entities[targets[r, e]]}."
        for r, relation in enumerate(relations)
        for e, entity in enumerate(entities)
    ]
    asked = rng.integers(len(relations), size=len(entities))
    texts += [f"Nobody ever met the {relations[asked[e]]} of {entity}." for e, entity in enumerate(entities)]
    order = rng.permutation(len(texts))
    return [Passage(id=f"p{i}", title="", text=texts[k]) for i, k in enumerate(order)]


def _compositions(
    entities: tuple[str, ...], relations: tuple[str, ...], targets: NDArray[np.int64], max_hops: int
) -> list[list[Composition]]:
    """List every composition that passes no entity twice, by the number of hops (1 first)."""
    found: list[list[Composition]] = [[] for _ in range(max_hops)]
    for hops in range(1, max_hops + 1):
        for chain in permutations(range(len(relations)), hops):
            for start in range(len(entities)):
                path = [start]
                for relation in chain:
                    path.append(int(targets[relation, path[-1]]))
                if len(set(path)) == len(path):
                    names = tuple(relations[r] for r in chain)
                    found[hops - 1].append(Composition(names, tuple(entities[e] for e in path)))
    return found


def _split(
    compositions: list[list[Composition]], config: WorldConfig, rng: np.random.Generator
) -> tuple[list[Question], list[Question]]:
    """Draw (training, evaluation) questions: evaluation first, at most half of each kind, training from the rest."""
    available = [len(kind) for kind in compositions]
    eval_counts = _share_out(config.eval_questions, [n // 2 for n in available], "world.eval_questions")
    left = [n - taken for n, taken in zip(available, eval_counts, strict=True)]
    train_counts = _share_out(config.train_questions, left, "world.train_questions")
    train: list[Question] = []
    held_out: list[Question] = []
    for kind, n_eval, n_train in zip(compositions, eval_counts, train_counts, strict=True):
        order = rng.permutation(len(kind))
        # Sampling seeds hash a question's id, so evaluation questions keep the ids by which records know them.
        held_out += [_question(kind[k], f"test-{len(held_out) + i}") for i, k in enumerate(order[:n_eval])]
        train += [_question(kind[k], f"train-{len(train) + i}") for i, k in enumerate(order[n_eval : n_eval + n_train])]
    return [train[k] for k in rng.permutation(len(train))], [held_out[k] for k in rng.permutation(len(held_out))]


def _share_out(total: int, capacity: list[int], field: str) -> list[int]:
    """Share `total` equally over the numbers of hops; what does not fit goes to the kinds that have room."""
    counts = [0] * len(capacity)
    while missing := total - sum(counts):
        room = [k for k in range(len(capacity)) if counts[k] < capacity[k]]
        if not room:
            raise ValueError(
                f"{field}={total} is more than the {sum(capacity)} compositions there are for them: "
                "raise world.entities, world.relations or world.max_hops"
            )
        share, rest = divmod(missing, len(room))
        for i, k in enumerate(reversed(room)):  # the odd ones go to the longest questions
            counts[k] += min(share + (i < rest), capacity[k] - counts[k])
    return counts


def _question(composition: Composition, name: str) -> Question:
    meta = {"hops": composition.hops, "relations": list(composition.relations), "entities": list(composition.entities)}
    return Question(id=name, text=composition.text, answers=(composition.entities[-1],), source="world", meta=meta)


def _notes(train: list[Question], held_out: list[Question], entities: int) -> dict[str, float | str]:
    """Tell a reader of results about the questions; raises when an evaluation composition is in training."""
    shared = {q.text for q in train} & {q.text for q in held_out}
    if shared:
        raise AssertionError(
            f"{len(shared)} compositions are in training and evaluation, for example {sorted(shared)[0]!r}"
        )
    hops = sorted({q.meta["hops"] for q in train + held_out})
    notes: dict[str, float | str] = {
        "random_guess_rate": 1.0 / entities,
        "first_hop_rate": sum(q.meta["entities"][1] == q.answers[0] for q in held_out) / len(held_out),
        "shared_compositions": 0.0,
    }
    for name, questions in (("train", train), ("eval", held_out)):
        notes[f"{name}_questions"] = float(len(questions))
        for h in hops:
            notes[f"{name}_share_{h}_hop"] = sum(q.meta["hops"] == h for q in questions) / len(questions)
    return notes
