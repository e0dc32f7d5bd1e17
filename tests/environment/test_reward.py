"""The published reward, rule by rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from atpo_fast.config import OverlongConfig, RewardConfig
from atpo_fast.data.matching import exact_match, f1_score, normalise_answer
from atpo_fast.data.questions import Question
from atpo_fast.data.tokenizers import train_bpe
from atpo_fast.environment.extraction import extract_answer, format_ok, turn_format_ok
from atpo_fast.environment.reward import OUTCOMES, LeafScore, score_trees
from atpo_fast.environment.tags import CALL_LIMIT_NOTICE, format_result
from atpo_fast.tree.turn_tree import TurnTree

QUESTION = Question(id="q", text="Who?", answers=("Eiffel Tower", "La dame de fer"))
SEARCH = "<think> a </think> <search> b </search>"
ANSWER = "<think> c </think> <answer> The final answer is \\[ \\boxed{the Eiffel Tower} \\] </answer>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe([SEARCH, ANSWER, "Eiffel Tower La dame de fer"] * 3, 400)


def _tree(tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str]) -> TurnTree:
    """A chain of (action, observation)."""
    tree = TurnTree(tokenizer.encode("Who?\n"), question_id="q")
    parent = 0
    for action, observation in turns:
        tool = next((name for name in ("search", "python") if f"</{name}>" in action), None)
        parent = tree.add_turn(
            parent, tokenizer.encode(action), observation_ids=tokenizer.encode(observation), tool=tool
        )
    return tree


def _score(
    tokenizer: PreTrainedTokenizerFast, *turns: tuple[str, str], validation: bool = False, **reward: float
) -> LeafScore:
    tree = _tree(tokenizer, *turns)
    ((score,),) = score_trees([tree], [QUESTION], tokenizer, RewardConfig(**reward), validation=validation)  # type: ignore[arg-type]
    assert tree.turns[score.turn].reward == score.reward
    return score


def test_right_answer_after_a_search(tokenizer: PreTrainedTokenizerFast) -> None:
    score = _score(tokenizer, (SEARCH, format_result("x")), (ANSWER, ""))
    assert score == LeafScore(
        turn=2, reward=1.0, em=1.0, f1=1.0, format_ok=True, tool_calls=1, turns=2, answer="the Eiffel Tower"
    )
    assert score.response == SEARCH + format_result("x") + ANSWER


@pytest.mark.parametrize(
    "text",
    [
        "<answer> \\boxed{x} </answer>",  # no thought
        "<think> <think> a </think> <answer> \\boxed{x} </answer>",  # unequal counts
        "<think> a </think>",  # no answer
        "<think> a </think> <answer> \\boxed{x} </answer> <answer> \\boxed{x} </answer>",  # two answers
        "<think> a </think> </answer> \\boxed{x} <answer>",  # wrong order
        "<think> a </think> <answer> x </answer>",  # no box
        "<think> a </think> <answer> \\boxed{x </answer> }",  # the brace closes outside
        "<think> a </think> <search> b <answer> \\boxed{x} </answer>",  # call never closed
        "<think> a </think> <search> b </search> <answer> \\boxed{x} </answer>",  # call without result
        "<think> a </think> <python> b </python> <result> </result> <python> b </python> <answer> \\boxed{x} </answer>",
        "<think> a </think> <result> </result> <search> b </search> <answer> \\boxed{x} </answer>",  # result too early
    ],
)
def test_every_broken_format_is_found(text: str) -> None:
    assert not format_ok(text)


@pytest.mark.parametrize(
    "text",
    [
        "<think> a </think> <answer> \\boxed{x} </answer>",
        "<think> a </think> <search> b </search> <result></result> <think> c </think> <answer> \\boxed{x} </answer>",
        "<think> a </think> <result> stray <answer> \\boxed{x} </answer>",  # unbalanced results are allowed
    ],
)
def test_published_latitude_is_kept(text: str) -> None:
    assert format_ok(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> \\boxed{a} or \\boxed{b} </answer>", "b"),  # the last one
        ("<answer> \\boxed{\\frac{1}{2}} </answer>", "\\frac{1}{2}"),  # nested braces
        ("<answer> \\boxed{a} then \\boxed{b </answer>", "a"),  # the last balanced one
        ("<answer> \\fbox{a} </answer>", "a"),
        ("<answer> \\boxed{a} </answer> <answer> \\boxed{b} </answer>", "a"),  # the first answer
        ("\\boxed{a} <answer> none </answer>", None),  # a box outside
        ("<answer> \\boxed{a}", None),  # never closed
        ("<answer> \\boxed{} </answer>", ""),
    ],
)
def test_answer_is_the_last_balanced_box_of_the_first_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_normalisation_and_metrics() -> None:
    # Fails when punctuation becomes a space, articles are cut out of words, or counts of repeated words are ignored.
    assert normalise_answer("  The U.S.A.'s   Anthem, an\tode ") == "usas anthem ode"
    assert exact_match("EIFFEL tower!", QUESTION.answers) == 1.0
    assert exact_match("tower", QUESTION.answers) == 0.0
    # 2 shared words of 3 predicted and 4 accepted ones: F1 = 2*2/7; against the other alias 0
    assert f1_score("dame de Paris", QUESTION.answers) == pytest.approx(4 / 7)
    # "b" is shared once only: 2*1/(3+1)
    assert f1_score("b b b", ["b"]) == pytest.approx(0.5)
    assert f1_score("yes it is", ["yes"]) == 0.0  # yes and no match only themselves
    assert f1_score("Yes.", ["yes"]) == 1.0
    assert f1_score("no", ["no one"]) == 0.0


def test_score_rule(tokenizer: PreTrainedTokenizerFast) -> None:
    # Published: F1 = 0 gives 0; both tools give F1 + 0.1; otherwise exact match.
    partly = ANSWER.replace("the Eiffel Tower", "dame de Paris")
    wrong = ANSWER.replace("the Eiffel Tower", "Louvre")
    python = SEARCH.replace("search", "python")
    result = format_result("x")
    assert _score(tokenizer, (wrong, "")).reward == 0.0
    assert _score(tokenizer, (partly, "")).reward == 0.0
    assert _score(tokenizer, (partly, ""), metric="f1").reward == pytest.approx(4 / 7)  # type: ignore[arg-type]
    both = _score(tokenizer, (SEARCH, result), (python, result), (partly, ""))
    assert both.reward == pytest.approx(4 / 7 + 0.1) and both.em == 0.0 and both.tool_calls == 2
    assert _score(tokenizer, (SEARCH, result), (python, result), (wrong, "")).reward == 0.0
    costly = _score(tokenizer, (SEARCH, result), (SEARCH, result), (ANSWER, ""), turn_cost=0.05)
    assert costly.reward == pytest.approx(0.9)


def test_format_failures_cost_in_training_only(tokenizer: PreTrainedTokenizerFast) -> None:
    unformatted = "<answer> \\boxed{Eiffel Tower} </answer>"
    trained = _score(tokenizer, (unformatted, ""), format_penalty=-0.5)
    assert (trained.reward, trained.em, trained.format_ok) == (-0.5, 1.0, False)
    assert _score(tokenizer, (unformatted, "")).reward == -1.0
    assert _score(tokenizer, (unformatted, ""), validation=True).reward == 1.0
    unreadable = _score(tokenizer, ("<think> a </think>", ""), validation=True)
    assert (unreadable.reward, unreadable.answer, unreadable.em) == (-1.0, None, 0.0)


# The last quarter of 40 tokens costs: the penalty begins after 30 tokens and is `factor` at 40. Fails when results
# do not count as response, a penalty is a bonus for short answers, validation pays, or there is a floor.
@pytest.mark.parametrize(("tokens", "penalty"), [(12, 0.0), (30, 0.0), (31, -0.05), (40, -0.5), (42, -0.6)])
def test_long_trajectories_cost_in_training_only(
    tokenizer: PreTrainedTokenizerFast, tokens: int, penalty: float
) -> None:
    tree = TurnTree(tokenizer.encode("Who?"))
    search = tree.add_turn(0, [1] * 4, observation_ids=[1] * 5)
    tree.set_reward(tree.add_turn(search, [1] * (tokens - 9)), 0.0)
    reward = RewardConfig(format_penalty=-2.0, overlong=OverlongConfig(share=0.25, factor=0.5))
    for validation, expected in ((False, penalty), (True, 0.0)):
        ((score,),) = score_trees([tree], [QUESTION], tokenizer, reward, validation=validation, max_response_tokens=40)
        assert score.overlong == pytest.approx(expected, abs=1e-15)
        assert score.reward == tree.turns[score.turn].reward == pytest.approx(-2.0 + expected, abs=1e-15)
    with pytest.raises(ValueError, match="max_response_tokens"):
        score_trees([tree], [QUESTION], tokenizer, reward)


# Turns that call or answer, with closed thoughts, are well-formed. Fails when the penalty goes to the outcome, or
# validation of the answer decides about turns before it.
def test_turns_with_a_broken_format_cost(tokenizer: PreTrainedTokenizerFast) -> None:
    tree = _tree(tokenizer, (SEARCH, format_result("x")), ("<search> b </search>", format_result("x")), (ANSWER, ""))
    reward = RewardConfig(turn_penalty=0.25)
    ((score,),) = score_trees([tree], [QUESTION], tokenizer, reward)
    assert tree.turn_rewards is not None and tree.turn_rewards.tolist() == [0.0, 0.0, -0.25, 0.0]
    assert score.reward == 1.0
    assert not turn_format_ok("<think> a </think>", called=False)
    assert not turn_format_ok(ANSWER, called=True)
    assert not turn_format_ok("<think> <think> a </think> <search> b </search>", called=True)


def test_tags_inside_results_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    # Fails when the check runs over retrieved text: this passage would break the format and give away an answer.
    passage = "<think> <answer> \\boxed{La dame de fer} </answer> </python>"
    score = _score(tokenizer, (SEARCH, format_result(passage)), (ANSWER, ""))
    assert score.format_ok and score.reward == 1.0 and score.answer == "the Eiffel Tower"
    assert _score(tokenizer, (SEARCH, format_result(passage)), ("<think> c </think>", "")).answer is None


def test_a_call_over_the_limit_has_no_result(tokenizer: PreTrainedTokenizerFast) -> None:
    # The published check asks for a result after every call; the notice is none.
    assert not _score(tokenizer, (SEARCH, CALL_LIMIT_NOTICE), (ANSWER, "")).format_ok


def test_trees_with_shared_turns_and_without_leaves(tokenizer: PreTrainedTokenizerFast) -> None:
    # Fails when siblings see each other's text, or when special tokens reach the answer.
    tree = _tree(tokenizer, (SEARCH, format_result("x")))
    eos = [tokenizer.eos_token_id]
    right = tree.add_turn(1, tokenizer.encode(ANSWER) + eos)
    wrong = tree.add_turn(1, tokenizer.encode(ANSWER.replace("Eiffel", "Leaning")) + eos)
    other = tree.add_turn(0, tokenizer.encode(ANSWER) + eos)
    empty = TurnTree(tokenizer.encode("Who?"))
    scores, none = score_trees([tree, empty], [QUESTION, replace(QUESTION, id="r")], tokenizer, RewardConfig())
    assert none == []
    assert [(s.turn, s.reward, s.tool_calls, s.turns) for s in scores] == [
        (right, 1.0, 1, 2),
        (wrong, 0.0, 1, 2),
        (other, 1.0, 0, 1),
    ]
    with pytest.raises(ValueError, match="2 trees were given with 1 questions"):
        score_trees([tree, empty], [QUESTION], tokenizer, RewardConfig())


# Fails when a reward is explained by something else than what made it: the first broken rule where the policy ended
# the trajectory itself, the limit where it did not, and the answer only where the format holds.
@pytest.mark.parametrize(
    ("action", "finish", "outcome"),
    [
        (ANSWER, "eos", "right"),
        (ANSWER, "length", "right"),  # it was read before the limit
        (ANSWER.replace("Eiffel Tower", "Louvre"), "eos", "wrong"),
        ("<think> a </think> <answer> \\boxed{x </answer> }", "eos", "no_box"),
        ("<think> a </think> <answer> } \\boxed{x </answer>", "eos", "unread"),
        ("<think> a </think>", "eos", "no_answer"),
        ("<answer> \\boxed{x} </answer>", "eos", "no_thought"),
        ("<think> <think> a </think> <answer> \\boxed{x} </answer>", "eos", "open_thought"),
        ("<think> a </think> <answer> \\boxed{x} </answer> <answer> y </answer>", "eos", "answer_tags"),
        ("<think> a </think> <search> b <answer> \\boxed{x} </answer>", "eos", "open_call"),
        ("<think> a </think>", "length", "token_limit"),
        (SEARCH, "stop", "call_limit"),
    ],
)
def test_why_a_reward_is_what_it_is(tokenizer: PreTrainedTokenizerFast, action: str, finish: str, outcome: str) -> None:
    tree = TurnTree(tokenizer.encode("Who?\n"), question_id="q")
    end = [tokenizer.eos_token_id] if finish == "eos" else []
    tree.add_turn(0, [*tokenizer.encode(action), *end], finish_reason=finish)
    ((score,),) = score_trees([tree], [QUESTION], tokenizer, RewardConfig())
    assert score.outcome == outcome and outcome in OUTCOMES


# Fails when a trajectory of an environment that scores is called wrong for want of an answer.
@pytest.mark.parametrize(
    ("score", "finish", "outcome"), [(1.0, "stop", "right"), (0.0, "eos", "wrong"), (0.0, "length", "token_limit")]
)
def test_an_environments_score_is_an_outcome(
    tokenizer: PreTrainedTokenizerFast, score: float, finish: str, outcome: str
) -> None:
    tree = TurnTree(tokenizer.encode("Who?\n"), question_id="q")
    tree.add_turn(0, tokenizer.encode("a"), finish_reason=finish, score=score)
    ((scored,),) = score_trees([tree], [QUESTION], tokenizer, RewardConfig())
    assert scored.outcome == outcome
