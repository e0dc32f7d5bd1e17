"""ARPO's and AEPO's roll-outs, decision by decision: what is written and drawn is fixed, trees are found by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest

from atpo_fast.engines.base import Request
from atpo_fast.environment import format_result
from atpo_fast.rollout.branch import QuestionSearch
from atpo_fast.rollout.strategies.aepo import monitored_chains
from atpo_fast.rollout.turns import opening_entropy
from atpo_fast.tree import TurnTree
from tests.helpers.scripted_engine import (
    ANSWER,
    EOS,
    TOKENIZER,
    ScriptedEngine,
    as_data,
    by_seed,
    encode,
    make_search,
    questions,
    roll_out,
)

TEXTS = {
    "s": " one<search> two</search>",  # a call, of entropy 0
    "u": " ten<search> two</search>",  # a call, of entropy 1 x UNSURE
    "U": " ten ten ten ten ten<search> two</search>",  # a call, of entropy 5 x UNSURE
    "e": "<search></search>",  # an empty call
    "c": " one<search> two",  # cut off
    ".": ANSWER,
}
TEN = encode(" ten")[0]
UNSURE = log(10) / log(len(TOKENIZER.get_vocab()))  # a token with ten equal candidates


def tops(token: int) -> list[float]:
    return [log(0.1)] * 10 if token == TEN else [0.0]


class Draws:
    """In place of the generators: the numbers of each round, all of which have to be drawn."""

    def __init__(self, rounds: list[list[float]]) -> None:
        self.rounds = rounds
        self.left: list[float] = []

    def generator(self, search: QuestionSearch, purpose: str, number: int) -> Draws:
        assert not self.left, f"{len(self.left)} draws of round {number - 1} are left"
        self.left = list(self.rounds[number]) if number < len(self.rounds) else []
        return self

    def random(self) -> float:
        return self.left.pop(0)


def grow(
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    written: str,
    draws: list[list[float]],
    tool_calls: int | None = None,
    **settings: Any,
) -> tuple[TurnTree, list[list[Request]]]:
    """Roll out a question; `written` has a letter for each turn, and a word for each round: what its chains write."""
    letters = written.replace(" ", "")

    def script(prompt: str, request: Request) -> str:
        number = request.turn_key[1] - 1
        return TEXTS[letters[number]] if number < len(letters) else ANSWER

    fixed = Draws(draws)
    monkeypatch.setattr(QuestionSearch, "generator", lambda *given: fixed.generator(*given))
    engine = ScriptedEngine(script, tops=tops)
    search = make_search(engine, strategy=strategy, **settings)
    (tree,) = roll_out(search, questions(1))
    assert not fixed.left
    assert tool_calls in (None, search.counters.tool_calls)
    words = written.split()
    assert [len(batch) for batch in engine.batches[: len(words)]] == [len(word) for word in words]
    assert len(tree.leaves) == tree.num_trajectories == settings["samples_per_tree"]
    return tree, engine.batches


def parents(tree: TurnTree) -> list[int]:
    return [turn.parent for turn in tree.turns]


# ---- entropy


@pytest.mark.parametrize("tokens", [0, 1, 7, 20, 33])
def test_opening_entropy_is_the_sum_over_twenty_tokens(tokens: int) -> None:
    # Fails for a mean, for normalised candidates, for another number of tokens, and for a base that is not the
    # vocabulary's. Against a loop from the formula; each side has at most 20 x 11 roundings of 0.4 each.
    rng = np.random.default_rng(tokens)
    top_logprobs = [np.log(rng.dirichlet(np.ones(30))[: rng.integers(10, 12)]).tolist() for _ in range(tokens)]
    expected = 0.0
    for token in top_logprobs[:20]:
        for logprob in token:
            expected -= exp(logprob) * logprob / log(151_669)
    assert opening_entropy(top_logprobs, 151_669) == pytest.approx(expected, abs=220 * 2.0**-52)
    assert (expected > 0) == (tokens > 0)


# ---- ARPO


def test_arpo_branches_where_a_draw_and_the_rise_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # First round: 0.6 fails, 0.5 branches (the bound counts). Second: 0.6 branches, for the entropy has risen. There
    # is no room after that, so nothing more is drawn. Fails if a draw is compared with the wrong side, if H_first is
    # taken from another chain, or if a branch starts at the turn's parent.
    tree, batches = grow(
        monkeypatch, "arpo", "su usu ....", [[0.6, 0.5], [0.6]], initial_chains=2, samples_per_tree=4, limit=3
    )
    assert parents(tree) == [-1, 0, 0, 1, 2, 2, 3, 4, 5, 3]
    assert all(request.sampling.top_logprobs == 10 for batch in batches for request in batch)


def test_a_fall_in_entropy_keeps_a_chain_from_branching(monkeypatch: pytest.MonkeyPatch) -> None:
    # The entropy falls by 5 x UNSURE > 0.5 / 0.2, so even 0.0 does not branch. Fails for |rise| or the
    # difference the other way round.
    assert 0.2 * 5 * UNSURE > 0.5
    tree, _ = grow(monkeypatch, "arpo", "U s . .", [[0.9], [0.0], []], initial_chains=1, samples_per_tree=2, limit=3)
    assert parents(tree) == [-1, 0, 1, 2, 0]


def test_a_branch_has_no_first_entropy_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    # The branch's own first turn is unsure: its rise is 0, so 0.55 fails; against its parent's first turn it would
    # have risen by UNSURE, and 0.55 - 0.2 * UNSURE < 0.5 would branch. In the next round it falls behind its own.
    assert 0.55 - 0.2 * UNSURE < 0.5
    draws = [[0.5], [0.9, 0.55], [0.9, 0.5 - 0.1 * UNSURE]]
    tree, _ = grow(monkeypatch, "arpo", "s su ss .. . .", draws, initial_chains=1, samples_per_tree=4, limit=3)
    assert parents(tree) == [-1, 0, 1, 1, 2, 3, 4, 5, 0, 0]


def test_attempts_are_bounded_by_beam_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three attempts, the first of which fails: an attempt is used up, but no room. The second chain has two attempts,
    # as many as there is room for, though its first fails. Fails if failing takes room, or attempts go on after it.
    draws = [[0.9, 0.1, 0.1, 0.9, 0.1]]
    tree, _ = grow(
        monkeypatch,
        "arpo",
        "ss .....",
        draws,
        initial_chains=2,
        samples_per_tree=6,
        branch_attempts=3,
        limit=3,
    )
    assert parents(tree) == [-1, 0, 0, 1, 2, 1, 1, 2, 0]


def test_fresh_chains_fill_up_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody is active after the first round, so one chain begins; none while it is active. Fails if all missing chains
    # begin at once, or copies of the last one fill up.
    tree, _ = grow(monkeypatch, "arpo", ". s . .", [[], [0.9]], initial_chains=1, samples_per_tree=3, limit=3)
    assert parents(tree) == [-1, 0, 0, 2, 0]


def test_a_call_over_the_limit_ends_with_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if the notice is given, if the token goes into the observation, or if it claims a log-prob: it was not
    # sampled. The turn's entropy estimate is that of what was.
    tree, _ = grow(monkeypatch, "arpo", "s s", [], initial_chains=1, samples_per_tree=1, limit=1)
    assert parents(tree) == [-1, 0, 1]
    over = tree.turns[2]
    assert over.action_ids.tolist() == [*encode(TEXTS["s"]), EOS] and not len(over.observation_ids)
    assert (over.finish_reason, over.tool) == ("eos", None)
    assert np.isnan(over.logprobs).tolist() == [False] * (len(over.logprobs) - 1) + [True]
    assert over.nll == pytest.approx(-over.logprobs[:-1].mean())


def test_no_end_token_where_there_is_no_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if the trajectory becomes longer than the limit, or if the last token of room is left.
    call, result = encode(TEXTS["s"]), encode(format_result("found two"))
    for room in (0, 1):
        limits = {"limit": 1, "max_response_tokens": 2 * len(call) + len(result) + room}
        tree, _ = grow(monkeypatch, "arpo", "s s", [], initial_chains=1, samples_per_tree=1, **limits)
        assert tree.turns[2].action_ids.tolist() == call + [EOS] * room


@pytest.mark.parametrize("end", ["e", "c"])
def test_a_turn_without_a_call_ends_its_chain(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    # Fails if an empty call is answered, as it is elsewhere, or a turn that was cut off is continued.
    tree, _ = grow(monkeypatch, "arpo", end, [], initial_chains=1, samples_per_tree=1, limit=3, max_turn_tokens=4)
    assert parents(tree) == [-1, 0] and not len(tree.turns[1].observation_ids)


# ---- AEPO


def test_aepo_discounts_a_streak_of_new_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.5 branches. After one such round 0.52 * 0.95 < 0.5 fails and 0.53 * 0.95 > 0.5 branches. After two, 0.55 * 0.9
    # fails for all; the streak ends, and 0.5 branches again. Fails if a round without new chains keeps the streak, if
    # chains are counted instead of rounds, or if a round's own chains count in its discount.
    draws = [[0.5, 0.5], [0.52, 0.53, 0.1, 0.1], [0.55] * 5, [0.5]]
    settings = {"initial_chains": 2, "samples_per_tree": 6, "limit": 6, "pre_monitoring": False}
    tree, _ = grow(monkeypatch, "aepo", "ss ssss sssss sssss ......", draws, **settings)
    rounds = [[-1], [0, 0], [1, 2, 1, 2], [3, 4, 5, 6, 4], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 12]]
    assert parents(tree) == [parent for each in rounds for parent in each]


def test_fresh_chains_count_in_aepos_streak(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fresh chain of the first round makes the streak 1, so 0.52 fails; that ends it, and 0.52 branches.
    settings = {"initial_chains": 1, "samples_per_tree": 3, "limit": 6, "pre_monitoring": False}
    tree, _ = grow(monkeypatch, "aepo", ". s s ..", [[], [0.52], [0.52]], **settings)
    assert parents(tree) == [-1, 0, 0, 2, 3, 3]


def test_aepo_adds_the_rise_before_the_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.45 + 0.2 * UNSURE > 0.5 branches. Fails for ARPO's sign.
    assert 0.45 + 0.2 * UNSURE > 0.5
    settings = {"initial_chains": 1, "samples_per_tree": 2, "limit": 6, "pre_monitoring": False}
    tree, _ = grow(monkeypatch, "aepo", "s u ..", [[0.1], [0.45]], **settings)
    assert parents(tree) == [-1, 0, 1, 2, 2]


def test_the_monitoring_round_decides_how_many_chains_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    # H_root = 5h and H of the chain (0 + 5h + 0) / 3, first and last turn included. Fails if the probe's call is
    # answered, if its turns or the chain's get into the tree, or if the mean leaves a turn out.
    h = UNSURE
    wanted = int(20 / (1 + exp(-0.5 * (5 * h - 5 * h / 3)))) + 1
    others = {int(20 / (1 + exp(-0.5 * (5 * h - mean)))) + 1 for mean in (5 * h / 2, 5 * h, 0.0)}
    assert wanted not in others
    tree, batches = grow(
        monkeypatch,
        "aepo",
        "Us U .",
        [],
        initial_chains=1,
        samples_per_tree=20,
        limit=3,
        max_response_tokens=400,
        tool_calls=2,
    )
    assert [request.sampling.max_new_tokens for request in batches[0]] == [50, 400]
    assert len(batches[3]) == wanted
    assert parents(tree) == [-1] + [0] * 20


@pytest.mark.parametrize(("root", "chain", "first"), [(1.0, 1.0, 9), (100.0, 0.0, 16), (0.0, 100.0, 1), (3.0, 1.0, 12)])
def test_monitored_chains(root: float, chain: float, first: int) -> None:
    # By hand for n = 16: 8 + 1; all; at least one; int(16 * 0.731) + 1. Fails for a wrong slope, sign or bound.
    assert monitored_chains(16, root, chain) == first


@pytest.mark.parametrize("strategy", ["arpo", "aepo"])
def test_random_numbers_come_from_seed_question_and_round(strategy: str) -> None:
    # Fails if a generator is shared between questions or rounds: the tree of a question is the same beside others.
    settings: dict[str, Any] = {"strategy": strategy, "initial_chains": 3, "samples_per_tree": 6}
    both = roll_out(make_search(ScriptedEngine(by_seed), **settings), questions(2), 1)
    (alone,) = roll_out(make_search(ScriptedEngine(by_seed), **settings), questions(1), 1)
    assert as_data(both[0]) == as_data(alone)
