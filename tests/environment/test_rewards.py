"""Rewards of a task: by name, in the style of each trainer, several together, and what happens where one fails."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from atpo_fast.common.errors import ConfigError, DataError, RewardError
from atpo_fast.config import OverlongConfig, RewardConfig
from atpo_fast.data.questions import Question
from atpo_fast.data.tokenizers import train_bpe
from atpo_fast.environment.extraction import EXTRACTIONS, extraction_by
from atpo_fast.environment.reward import LeafScore, ScoringRules, score_trees
from atpo_fast.environment.rewards import RewardTerm, Trajectory, check_questions, load_rewards
from atpo_fast.environment.tags import format_result
from atpo_fast.tree.turn_tree import TurnTree

QUESTION = Question(id="q7", text="How many?", answers=("42",), source="sums", record={"level": "easy"})
SEARCH = "<think> a </think> <search> b </search>"
PYTHON = SEARCH.replace("search", "python")


def boxed(answer: str) -> str:
    return f"<think> c </think> <answer> \\boxed{{{answer}}} </answer>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe([SEARCH, boxed("42")], 300)


@pytest.fixture
def score(tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[LeafScore]]:
    """Scores of a tree whose leaves are the given texts; a tuple is a chain of turns."""

    def scores(
        *leaves: str | tuple[str, ...], terms: Any, question: Question = QUESTION, **more: Any
    ) -> list[LeafScore]:
        rules = ScoringRules(
            rewards=load_rewards(
                [term if isinstance(term, RewardTerm) else RewardTerm(function=term) for term in terms]
            ),
            extraction=more.pop("extraction", EXTRACTIONS["boxed"]),
            opening=more.pop("opening", ""),
        )
        tree = TurnTree(tokenizer.encode("How many?"), question_id=question.id)
        for leaf in leaves:
            turn = 0
            for action in (leaf,) if isinstance(leaf, str) else leaf:
                tool = next((name for name in ("search", "python") if f"</{name}>" in action), None)
                result = tokenizer.encode(format_result("found")) if tool else []
                turn = tree.add_turn(turn, tokenizer.encode(action), observation_ids=result, tool=tool)
        settings = {key: more.pop(key) for key in ("validation", "max_response_tokens") if key in more}
        (found,) = score_trees([tree], [question], tokenizer, RewardConfig(**more), rules=rules, **settings)
        assert [tree.turns[leaf].reward for leaf in tree.leaves] == [each.reward for each in found]
        return found

    return scores


# ---- by name


SEARCH_R1 = [
    (boxed("42").replace("\\boxed{42}", "42"), 1.0),
    ("<answer> 41 </answer> <answer> 42 </answer>", 1.0),  # the last one, whatever the format
    ("<answer> 42 </answer> <answer> 41 </answer>", 0.0),
    ("42", 0.0),
    ("<answer> 41 </answer>" * 9 + "<answer> 42 </answer>", 1.0),
    ("<answer> 41 </answer>" * 10 + "<answer> 42 </answer>", 0.25),  # more than ten
    ("<answer> 42 </answer>" + "</answer>" * 10, 0.25),
]


@pytest.mark.parametrize(("text", "reward"), SEARCH_R1)
def test_search_r1_em(score: Callable[..., list[LeafScore]], text: str, reward: float) -> None:
    """Fails if Search-R1's score asks for a box or a format, or takes the first answer."""
    assert score(text, terms=["search_r1_em"])[0].reward == reward


def test_arpo_f1_and_the_others(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if ARPO's score is EM, forgets the format or the bonus, or em and f1 ask for a format."""
    question = replace(QUESTION, answers=("Lin Mu",))
    texts = (boxed("Lin"), boxed("Lin").replace("<think>", ""), (SEARCH, PYTHON, boxed("Lin")), boxed("Mo"))
    rewards = {name: [s.reward for s in score(*texts, terms=[name], question=question)] for name in
               ("published", "arpo_f1", "em", "f1", "format")}  # fmt: skip
    partly = pytest.approx(2 / 3)
    assert rewards == {
        "published": [0.0, -1.0, pytest.approx(2 / 3 + 0.1), 0.0],
        "arpo_f1": [partly, -1.0, pytest.approx(2 / 3 + 0.1), 0.0],
        "em": [0.0] * 4,
        "f1": [partly, partly, partly, 0.0],
        "format": [1.0, 0.0, 1.0, 1.0],
    }
    assert score(texts[1], terms=["arpo_f1"], question=question, validation=True)[0].reward == partly


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="the extra math is not installed")
def test_math(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if equal numbers or terms written otherwise are wrong, words are products of letters, or a tower hangs."""
    half = replace(QUESTION, answers=("\\frac{1}{2}",))
    texts = [boxed(answer) for answer in ("0.5", "1/2", "2", "", "x" * 3000)] + ["0.5"]
    assert [s.reward for s in score(*texts, terms=["math"], question=half)] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    term = replace(QUESTION, answers=("x+1", "2x"))
    assert [s.reward for s in score(boxed("1+x"), boxed("x+x"), boxed("x"), terms=["math"], question=term)] == [1, 1, 0]
    words = replace(QUESTION, answers=("Paris",))
    assert [s.reward for s in score(boxed("Paris"), boxed("London"), terms=["math"], question=words)] == [1.0, 0.0]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="the extra math is installed")
def test_math_without_its_library() -> None:
    """Fails if the library is missed after the first roll-out only."""
    with pytest.raises(ConfigError, match=r"the reward math needs math-verify .*pip install 'atpo-fast\[math\]'"):
        load_rewards([RewardTerm(function="math")])


def test_unicode_in_the_reward(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if `reward.normalise` does not reach the reward, or is not `published` by default (R13)."""
    war = replace(QUESTION, answers=("1914–1918",))
    for normalise, em in (("published", 0.0), ("unicode", 1.0)):
        (leaf,) = score(boxed("\\text{1914-1918}"), terms=["published"], question=war, normalise=normalise)
        assert leaf.em == leaf.reward == em
    assert RewardConfig().normalise == "published"


# ---- functions of the user's own, as they are


def test_a_function_of_a_trajectory(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if a trajectory tells the function something else than what has happened."""
    seen: list[Trajectory] = []

    def reward(trajectory: Trajectory, scale: float = 1.0) -> dict[str, Any]:
        seen.append(trajectory)
        return {"score": scale * trajectory.tool_calls, "length": np.int64(trajectory.tokens), "note": "text"}

    term = RewardTerm(function=reward, arguments={"scale": 3.0}, weight=0.5, name="calls")
    long, short = score((SEARCH, boxed("42")), boxed("41"), terms=[term])
    assert (long.reward, short.reward) == (1.5, 0.0)
    assert long.rewards == {"calls": 3.0, "calls/length": float(seen[0].tokens)}
    first = seen[0]
    assert first.prompt == "How many?" and first.question is QUESTION and not first.validation
    assert first.response == f"{SEARCH}{format_result('found')}{boxed('42')}"
    assert first.written == f"{SEARCH}{format_result('')}{boxed('42')}"
    assert (first.answer, first.em, first.f1, first.format_ok, first.turns, first.leaf) == ("42", 1.0, 1.0, True, 2, 2)
    assert first.tokens == len(first.token_ids)


def test_functions_in_the_style_of_trl(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if a function that TRL calls is called otherwise: texts or chats, columns as lists, None for n/a."""
    seen: list[dict[str, Any]] = []

    def lengths(completions: list[Any], **kwargs: Any) -> list[float | None]:
        seen.append({"completions": completions, **kwargs})
        return [None, *map(torch.tensor, (0.5,) * (len(completions) - 1))]  # type: ignore[list-item]

    def level(
        prompts: list[Any], completions: list[Any], level: list[str], completion_ids: list[list[int]]
    ) -> list[float]:
        return [float(name == "easy" and len(ids) > 0) for name, ids in zip(level, completion_ids, strict=True)]

    first, second = score(boxed("42"), boxed("41"), terms=[lengths, level])
    assert seen[0]["completions"] == [boxed("42"), boxed("41")] and seen[0]["prompts"] == ["How many?"] * 2
    assert seen[0]["level"] == ["easy"] * 2 and seen[0]["answers"] == [["42"]] * 2
    assert first.rewards == {"level": 1.0} and second.rewards == {"lengths": 0.5, "level": 1.0}
    assert (first.reward, second.reward) == (1.0, 1.5)
    chat = ({"role": "user", "content": "How many?"},)
    score(boxed("42"), terms=[lengths], question=replace(QUESTION, messages=chat))
    assert seen[1]["completions"] == [[{"role": "assistant", "content": boxed("42")}]]
    assert seen[1]["prompts"] == [list(chat)]


def test_functions_in_the_style_of_verl(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if a function that verl calls gets something else than its record holds."""
    seen: list[tuple[Any, ...]] = []

    def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> dict[str, Any]:
        seen.append((data_source, ground_truth, extra_info))
        return {"score": float(str(ground_truth) in solution_str), "acc": True, "pred": solution_str}

    record = {"data_source": "gsm8k", "reward_model": {"ground_truth": "42"}, "extra_info": {"index": 3}}
    right, wrong = score(boxed("42"), boxed("41"), terms=[compute_score], question=replace(QUESTION, record=record))
    assert (right.reward, wrong.reward) == (1.0, 0.0) and right.rewards == {
        "compute_score": 1.0,
        "compute_score/acc": 1.0,
    }
    score(boxed("42"), terms=[compute_score])
    score(boxed("42"), terms=[compute_score], question=replace(QUESTION, answers=("42", "forty-two")))
    assert seen == [("gsm8k", "42", {"index": 3})] * 2 + [("sums", "42", {}), ("sums", ["42", "forty-two"], {})]

    def old_style(data_source: str, solution_str: str, ground_truth: Any) -> float:
        return 1.0

    assert score(boxed("42"), terms=[old_style])[0].reward == 1.0


class Judge:
    """An asynchronous judge that waits until as many calls are with it as are let in."""

    def __init__(self, together: int) -> None:
        self.together, self.now, self.most, self.full = together, 0, 0, asyncio.Event()

    async def __call__(self, trajectory: Trajectory) -> float:
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now == self.together:
            self.full.set()
        await self.full.wait()
        await asyncio.sleep(0)  # those that wait outside would come in now
        self.now -= 1
        return float(trajectory.answer or 0)


def test_asynchronous_judges(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if calls wait for each other, more run at once than allowed, or answers go to the wrong trajectory."""
    judge = Judge(together=3)
    found = score(*(boxed(str(n)) for n in range(7)), terms=[RewardTerm(function=judge, concurrency=3)])
    assert [leaf.reward for leaf in found] == [float(n) for n in range(7)] and judge.most == 3
    assert found[2].rewards == {"Judge": 2.0}

    async def all_of_a_tree(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completions))] * len(completions)

    async def as_verl(data_source: str, solution_str: str, ground_truth: str) -> float:
        return 1.0

    assert [leaf.reward for leaf in score("a", "b", terms=[all_of_a_tree, as_verl])] == [3.0, 3.0]


def test_several_with_weights_and_what_is_taken_off(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if weights, reports or the penalty on length are mixed up: rewards by name are neither weighted nor cut."""

    def five(trajectory: Trajectory) -> float:
        return 5.0

    terms = ["published", RewardTerm(function="format", weight=0.25), RewardTerm(function=five, weight=-1.0)]
    (leaf,) = score(
        boxed("42"), terms=terms, overlong=OverlongConfig(share=0.5, factor=2.0), max_response_tokens=1, tool_bonus=0.0
    )
    assert leaf.overlong < 0 and leaf.reward == 1.0 + 0.25 - 5.0 + leaf.overlong
    assert leaf.rewards == {"published": 1.0, "format": 1.0, "five": 5.0}


def test_tags_that_are_special_tokens(
    score: Callable[..., list[LeafScore]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Fails if the reward leaves out tokens that the turn loop reads (R2), or an end token stays in the answer."""
    made = train_bpe([boxed("42")], 300)
    tags = [f"<{slash}{tag}>" for tag in ("think", "answer", "search", "result") for slash in ("", "/")]
    made.add_special_tokens({"additional_special_tokens": [*tags, "<|eot|>"]})
    made.add_tokens([AddedToken("<|end|>", special=False)])
    for ends in (
        [made.eos_token_id],
        [made.convert_tokens_to_ids("<|eot|>")],
        [made.convert_tokens_to_ids("<|end|>")],
        [],
    ):
        tree = TurnTree(made.encode("How many?"))
        turn = tree.add_turn(0, made.encode(SEARCH), observation_ids=made.encode(format_result("x")), tool="search")
        reason = "eos" if ends else "length"
        tree.add_turn(turn, [*made.encode(boxed("42") + "\n42"), *ends], finish_reason=reason)
        ((leaf,),) = score_trees([tree], [QUESTION], made, RewardConfig())
        assert (leaf.reward, leaf.format_ok, leaf.answer) == (1.0, True, "42")
        rules = ScoringRules(extraction=EXTRACTIONS["last_line"])
        assert score_trees([tree], [QUESTION], made, RewardConfig(), rules=rules)[0][0].answer == "42"


# ---- failures


def raises(trajectory: Trajectory) -> float:
    return {"41": 1.0}[str(trajectory.answer)]


async def never(trajectory: Trajectory) -> float:
    await asyncio.Event().wait()
    return 1.0


FAILING = [
    (RewardTerm(function=raises), r"raised KeyError: '42' \(.*test_rewards\.py, line \d+\)"),
    (RewardTerm(function=never, timeout_seconds=0.01), r"gave no answer within 0\.01 seconds"),
    (RewardTerm(function=lambda trajectory: float("nan"), name="nan"), r"returned nan, which is no finite number"),
    (RewardTerm(function=lambda trajectory: float("inf"), name="inf"), r"returned inf"),
    (RewardTerm(function=lambda trajectory: None, name="none"), r"returned None, which is no finite number"),
    (RewardTerm(function=lambda trajectory: "1", name="text"), r"returned '1', which is no finite number"),
    (RewardTerm(function=lambda trajectory: {"reward": 1}, name="dict"), r"without the key 'score': \{'reward': 1\}"),
    (RewardTerm(function=lambda completions: [1.0] * 3, name="many"), r"returned 3 numbers for 2 completions"),
    (RewardTerm(function=lambda completions: 1.0, name="one"), r"returned 1\.0, and not a list of numbers"),
    (RewardTerm(function=lambda completions: [1.0, float("-inf")], name="second"), r"returned -inf.*leaf 2"),
    (RewardTerm(function=lambda completions, **_: 1 // 0, name="trl"), r"raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("term", "message"), FAILING, ids=[str(i) for i in range(len(FAILING))])
def test_a_failure_names_the_trajectory(score: Callable[..., list[LeafScore]], term: RewardTerm, message: str) -> None:
    """Fails if a reward that fails trains on anything, or the error does not say which one and where."""
    name = term.name or term.function.__name__  # type: ignore[union-attr]
    where = r"question 'q7' \('How many\?'\), leaf \d, whose text begins '<think> c </think> <answer> .+boxed\{4"
    with pytest.raises(RewardError, match=rf"reward {name}: .*{message}.*") as caught:
        score(boxed("42"), boxed("41"), terms=[term])
    with pytest.raises(RewardError, match=where):
        raise caught.value


@pytest.mark.parametrize("term", [FAILING[0][0], FAILING[1][0], FAILING[9][0]], ids=["raises", "late", "list"])
def test_a_failure_that_counts_as_one(score: Callable[..., list[LeafScore]], term: RewardTerm) -> None:
    """Fails if on_error=fail ends the run, loses the value or the count, or fails those that did not."""
    found = score(boxed("42"), boxed("41"), terms=[replace(term, on_error="fail", failed_value=-2.0, name="mine")])
    failed = {"raises": [1, 0], "never": [1, 1], "second": [0, 1]}[term.name or term.function.__name__]  # type: ignore[union-attr]
    assert [leaf.rewards["mine/failed"] for leaf in found] == failed
    assert [leaf.reward for leaf in found] == [-2.0 if each else 1.0 for each in failed]


def test_an_answer_function_that_fails(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if a function of the user's own that reads the answer fails without naming the trajectory."""
    with pytest.raises(RewardError, match=r"task.answer failed: ZeroDivisionError.*question 'q7'.*leaf 1"):
        score(boxed("42"), terms=["em"], extraction=extraction_by(lambda text: str(1 // 0)))
    with pytest.raises(RewardError, match=r"returned 42, and not text"):
        score(boxed("42"), terms=["em"], extraction=extraction_by(lambda text: 42))  # type: ignore[arg-type,return-value]


# ---- what can be known before anything is rolled out


def wants_columns(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            RewardTerm(function=lambda text: 0.0),
            r"its signature is \(text\); expected reward\(trajectory\) -> float; as in",
        ),
        (RewardTerm(function=lambda data_source, solution_str: 0.0), r"its signature is \(data_source, solution_str\)"),
        (RewardTerm(function=lambda *args, **kwargs: 0.0), r"its signature is \(\*args, \*\*kwargs\); expected"),
        (RewardTerm(function=lambda trajectory, model: 0.0), r"nothing gives it model: set `arguments`"),
        (RewardTerm(function=lambda trajectory, /: 0.0), r"arguments are given by name"),
        (RewardTerm(function=raises, arguments={"scale": 1}), r"does not take scale of `arguments`"),
        (RewardTerm(function=raises, timeout_seconds=3), r"limits of async functions, which it is not"),
        (RewardTerm(function=raises, failed_value=-1.0), r"failed_value=-1 is read with on_error=fail only"),
        (RewardTerm(function=raises, name="overlong"), r"another meaning for the name 'overlong'"),
        (RewardTerm(function="format", arguments={"a": 1}), r"takes no arguments; .* section reward"),
        (RewardTerm(function="no_module_here:f"), r"there is no module 'no_module_here' in the working directory"),
        (RewardTerm(function="json:nothing"), r"task.rewards=json:nothing: json has no 'nothing'; it has .*dumps"),
        (RewardTerm(function="json:__name__"), r"is str, which cannot be called"),
    ],
)
def test_what_cannot_be_a_reward(term: RewardTerm, message: str) -> None:
    """Fails if a wrong signature or option is found out by the first trajectory only, or not at all."""
    with pytest.raises(ConfigError, match=message):
        load_rewards([term])


def test_two_of_one_name() -> None:
    """Fails if one reward's mean overwrites another's."""
    twice = [RewardTerm(function=raises), RewardTerm(function=raises, weight=2.0)]
    with pytest.raises(ConfigError, match="two rewards are called raises"):
        load_rewards(twice)
    load_rewards([twice[0], replace(twice[1], name="again")])


def test_questions_that_lack_what_a_reward_needs() -> None:
    """Fails if a missing column or answer is found out by the first roll-out only."""
    with pytest.raises(
        DataError, match=r"question 'q7' .*no column solution, which the reward wants_columns takes; it has"
    ):
        check_questions(load_rewards([RewardTerm(function=wants_columns)]), [QUESTION])
    check_questions(load_rewards([RewardTerm(function=wants_columns, arguments={"solution": []})]), [QUESTION])
    check_questions(
        load_rewards([RewardTerm(function=wants_columns)]), [replace(QUESTION, record={"solution": "42"}, answers=())]
    )
    with pytest.raises(DataError, match=r"question 'q7' .*has no answer, which the reward published compares with"):
        check_questions(load_rewards([RewardTerm(function="published")]), [replace(QUESTION, answers=())])


def test_the_opening_of_the_template_begins_the_first_turn_only(score: Callable[..., list[LeafScore]]) -> None:
    """Fails if what the chat template has written is missing before the first turn, or stands before later ones."""
    first, last = SEARCH.removeprefix("<think>"), boxed("42")
    (opened,) = score((first, last), terms=["published"], opening="<think>")
    (closed,) = score((first, last), terms=["published"])
    assert opened.format_ok and not closed.format_ok


def test_whether_a_reward_reads_the_score_of_the_environment() -> None:
    """Fails if an environment has to give scores that nobody reads, or may leave out those that are read."""
    assert not ScoringRules().reads_score
    assert ScoringRules(rewards=load_rewards([RewardTerm(function="session")])).reads_score
