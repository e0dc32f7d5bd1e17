"""The embedded world: facts, questions, search, tokenizer round trip, demonstrations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from atpo_fast.config import Config, DataConfig, RewardConfig, TaskConfig, ToolsConfig, WorldConfig
from atpo_fast.environment.reward import score_trees
from atpo_fast.environment.search import BM25Search
from atpo_fast.task import Task, load_task
from atpo_fast.world import make_world
from atpo_fast.world.facts import composition


@pytest.fixture(scope="module")
def world_config() -> WorldConfig:
    # 300 one-hop compositions and thousands of longer ones: the default size, fewer demonstrations.
    return WorldConfig(demonstrations=600)


@pytest.fixture(scope="module")
def task(world_config: WorldConfig) -> Task:
    # top_k=2 is the smallest result that always holds the fact asked for.
    return load_task(
        Config(
            data=DataConfig(source="world"),
            task=TaskConfig(prompt="short"),
            world=world_config,
            tools=ToolsConfig(top_k=2),
        )
    )


def test_answers_follow_the_facts_and_no_prefix_gives_them_away(world_config: WorldConfig) -> None:
    # Fails when relations are applied in the wrong order, or when an early stop could be right.
    world = make_world(world_config)
    texts = {passage.text for passage in world.passages}
    for question in world.train + world.eval:
        asked = composition(question)
        for relation, subject, target in zip(asked.relations, asked.entities[:-1], asked.entities[1:], strict=True):
            assert f"The {relation} of {subject} is {target}." in texts
        assert question.answers == (asked.entities[-1],)
        assert len(set(asked.entities)) == asked.hops + 1
        assert question.text.startswith(f"What is the {asked.relations[-1]} of ")
        assert question.text.endswith(f"the {asked.relations[0]} of {asked.entities[0]}?")


def test_every_relation_is_one_to_one_without_fixed_points(world_config: WorldConfig) -> None:
    # Fails when targets are drawn independently: some answers would be likelier than 1/entities.
    world = make_world(world_config)
    everyone = np.arange(world_config.entities)
    for row in world.targets:
        assert np.array_equal(np.sort(row), everyone)
        assert not np.any(row == everyone)


def test_train_and_test_share_no_composition_and_hops_are_balanced(task: Task) -> None:
    # Fails when the split is drawn with replacement, or when one-hop questions dominate the test set.
    def key(question):  # type: ignore[no-untyped-def]
        return tuple(question.meta["relations"]), question.meta["entities"][0]

    assert not {key(q) for q in task.train} & {key(q) for q in task.eval}
    assert len({key(q) for q in task.train}) == len(task.train) == 2000
    assert len({key(q) for q in task.eval}) == len(task.eval) == 200
    assert max(float(task.notes[f"eval_share_{h}_hop"]) for h in (1, 2, 3)) < 0.34
    assert task.notes["random_guess_rate"] == pytest.approx(1 / 60)
    assert task.notes["shared_compositions"] == 0.0


def test_same_seed_same_world_other_seed_other_world() -> None:
    # Fails when anything is drawn from global random state.
    small = {"entities": 12, "relations": 3, "train_questions": 60, "eval_questions": 12, "demonstrations": 20}
    first, again, other = (make_world(WorldConfig(**small, seed=seed)) for seed in (5, 5, 6))
    assert first.train == again.train and first.eval == again.eval and first.passages == again.passages
    assert first.passages != other.passages


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"relations": 2, "max_hops": 3}, "world.relations=2"),  # distinct relations are impossible
        ({"train_questions": 10**6}, "world.train_questions=1000000"),  # more than there are
        ({"entities": 10, "eval_questions": 10**5}, "world.eval_questions=100000"),
    ],
)
def test_impossible_worlds_are_refused_in_words(changes: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_world(WorldConfig(**changes))


def test_search_finds_each_fact_and_cannot_tell_it_from_its_reverse(task: Task) -> None:
    # Fails when a distractor outranks a fact, or when reading is not needed because the right page is always first.
    search = BM25Search(task.passages, top_k=2)
    first = 0
    facts = [passage.text for passage in task.passages if passage.text.startswith("The ")]
    for text in facts:
        query = text.removeprefix("The ").rsplit(" is ", 1)[0]
        result = search(query)
        assert text in result
        first += f"Page 1: {text}" in result
    assert 0.3 < first / len(facts) < 0.7
    assert "The mentor of e17" not in search("e17")[:18]  # no relation: the first page is about anything


def test_demonstrations_are_chains_of_real_results(task: Task) -> None:
    # Fails when results are invented, formatted unlike those of the rollout, or when the test set leaks.
    search = BM25Search(task.passages, top_k=2)
    train_texts = {question.text for question in task.train}
    for tree in task.demonstrations[:150]:
        assert tree.meta["question"] in train_texts
        (leaf,) = tree.leaves
        for n in tree.path(leaf)[1:]:
            turn = tree.turns[n]
            action = task.tokenizer.decode(turn.action_ids)
            if n == leaf:
                assert turn.finish_reason == "eos" and turn.action_ids[-1] == task.tokenizer.eos_token_id
                assert not len(turn.observation_ids)
            else:
                query = action.split("<search>")[1].removesuffix("</search>").strip()
                shown = task.tokenizer.decode(turn.observation_ids)
                assert shown == f" <result>\n{search(query)}\n</result>"
                assert turn.tool == "search"


def test_demonstrations_are_well_formed_and_only_good_ones_are_right(task: Task) -> None:
    # Fails when a poor strategy earns the reward, or when a demonstration breaks the published format.
    questions = {question.text: question for question in task.train}
    asked = [questions[tree.meta["question"]] for tree in task.demonstrations]
    scores = [row[0] for row in score_trees(task.demonstrations, asked, task.tokenizer, RewardConfig())]
    assert all(score.format_ok for score in scores)
    poor = [s.reward for t, s in zip(task.demonstrations, scores, strict=True) if t.meta["strategy"] != "good"]
    good = [s.reward for t, s in zip(task.demonstrations, scores, strict=True) if t.meta["strategy"] == "good"]
    assert min(good) == 1.0
    assert np.mean(poor) < 0.03  # the wrong order ends at the right entity once in a while


def test_strategies_are_mixed_at_every_number_of_hops(task: Task, world_config: WorldConfig) -> None:
    # Fails when a number of hops has only good or only poor demonstrations: reward would not vary within a tree.
    hops = {question.text: question.meta["hops"] for question in task.train}
    seen = Counter((hops[t.meta["question"]], t.meta["strategy"]) for t in task.demonstrations)
    for h in (1, 2, 3):
        share = seen[h, "good"] / sum(n for (k, _), n in seen.items() if k == h)
        # 200 draws each: four standard deviations around the configured share
        assert abs(share - world_config.good_fraction) < 4 * np.sqrt(0.25 / 200)


def test_results_too_small_for_the_world_are_refused() -> None:
    # Fails when one page a search silently gives demonstrations that read what is not there.
    config = Config(data=DataConfig(source="world"), task=TaskConfig(prompt="short"), tools=ToolsConfig(top_k=1))
    with pytest.raises(ValueError, match=r"tools\.top_k"):
        load_task(config)
