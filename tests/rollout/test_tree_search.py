"""The tree search: with a scripted engine for its own logic, and with the real one for cache, masks and batching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.engines.base import Completion, Request, TurnKey
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.environment import CALL_LIMIT_NOTICE, ToolBox, format_result
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer
from tests.helpers.scripted_engine import (
    ANSWER,
    TOKENIZER,
    ScriptedEngine,
    Search,
    as_data,
    by_seed,
    encode,
    make_search,
    prompts,
    questions,
    roll_out,
    search_then_answer,
)

# ---- one chain


def test_a_chain_is_prompt_action_result_answer() -> None:
    engine, tool = ScriptedEngine(search_then_answer), Search()
    (tree,) = roll_out(make_search(engine, tool, strategy="chain", initial_chains=1), questions(1))
    assert tree.question_id == "q0" and tree.meta == {"question": "one?", "answers": ["nine"]}
    call, answer = tree.turns[1], tree.turns[2]
    assert (call.action_ids.tolist(), call.finish_reason, call.tool) == (
        encode("<search> two</search>"),
        "stop",
        "search",
    )
    # Fails if the result is not spaced as published or gets into the action.
    assert call.observation_ids.tolist() == encode(format_result("found two"))
    assert (answer.action_ids.tolist(), answer.finish_reason, answer.tool) == (encode(ANSWER), "eos", None)
    assert tool.calls == ["two"]  # stripped
    # The trainer's log-probs, not those of the truncated sampling distribution (0 here).
    assert call.nll == pytest.approx(np.mean([0.1 * (1 + i % 3) for i in call.action_ids]))


def test_requests_carry_sampling_and_seed() -> None:
    # Fails if greedy evaluation samples, or if siblings share a seed.
    engine = ScriptedEngine(search_then_answer)
    search = make_search(engine, temperature=0.7, top_p=0.9, top_k=5, max_turn_tokens=20, max_response_tokens=50)
    roll_out(search, questions(2))
    requests = [request for batch in engine.batches for request in batch]
    assert len({request.seed for request in requests}) == len(requests)
    sampling = requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (0.7, 0.9, 5, 20)
    assert sampling.stop == ("</search>",)
    engine.batches.clear()
    trees = roll_out(search, questions(2), greedy=True)
    sampling = engine.batches[0][0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert [len(tree.leaves) for tree in trees] == [1, 1] and [tree.num_trajectories for tree in trees] == [1, 1]


def test_all_branches_write_a_turn_together() -> None:
    # Fails if questions or branches are rolled out one after another: 2 turns for the chains, 2 for each round.
    engine = ScriptedEngine(search_then_answer)
    search = make_search(engine, schedule="synchronous")
    roll_out(search, questions(4))
    assert [len(batch) for batch in engine.batches][:2] == [12, 12]
    assert len(engine.batches) <= 6


# ---- calls


def test_call_limit_is_answered_with_the_notice() -> None:
    def script(prompt: str, request: Request) -> str:
        return ANSWER if "call limit" in prompt else "<search> two</search>"

    tool = Search()
    search = make_search(ScriptedEngine(script), tool, limit=2, strategy="chain", initial_chains=1)
    (tree,) = roll_out(search, questions(1))
    # Fails if the limit is off by one or the notice is put into result tags.
    assert [t.tool for t in tree.turns[1:]] == ["search", "search", None, None]
    assert tree.turns[3].observation_ids.tolist() == encode(CALL_LIMIT_NOTICE)
    assert tree.turns[4].finish_reason == "eos"
    assert len(tool.calls) == search.counters.tool_calls == 2 and search.counters.turns == 4


def test_call_limit_counts_the_path_not_the_tree() -> None:
    # Fails if a re-sampled turn inherits the counter of another branch: it has its parent's count.
    search = make_search(ScriptedEngine(by_seed), limit=2, expansion_rounds=4, max_response_tokens=400)
    notice = encode(CALL_LIMIT_NOTICE)
    seen = set()
    for tree in roll_out(search, questions(6), 1):
        for leaf in tree.leaves:
            for depth, n in enumerate(tree.path(leaf)[1:-1]):
                turn = tree.turns[n]
                seen.add(depth)
                assert (turn.observation_ids.tolist() == notice) == (depth >= 2)
                assert turn.tool == ("search" if depth < 2 else None)
    assert seen >= {0, 1, 2, 3}


def test_bad_calls_become_observations() -> None:
    def script(prompt: str, request: Request) -> str:
        if "<result>" in prompt:
            return ANSWER
        return "<search></search>" if request.path[-1].key[0] == "0:q0" else " one</search>"

    tool = Search()
    trees = roll_out(make_search(ScriptedEngine(script), tool, strategy="chain", initial_chains=1), questions(2))
    texts = [TOKENIZER.decode(tree.turns[1].observation_ids) for tree in trees]
    assert all(text.startswith(" <result>\nTool(") and text.endswith("\n</result>") for text in texts)
    assert texts[0] != texts[1] and not tool.calls
    assert [tree.turns[1].tool for tree in trees] == [None, None]


def fail(argument: str) -> str:
    raise OSError("failed")


def hang(argument: str) -> str:
    threading.Event().wait()
    return ""


def nothing(argument: str) -> str:
    return ""


def long_result(argument: str) -> str:
    return "one " * 2_500_000


class Named:
    """A function as the search tool."""

    name = "search"

    def __init__(self, function: Callable[[str], str]) -> None:
        self.function = function

    def __call__(self, argument: str) -> str:
        return self.function(argument)


@pytest.mark.parametrize("tool", [fail, hang, nothing, long_result])  # each way a tool can go wrong; the last is 10 MB
def test_no_tool_can_stop_a_rollout(tool: Callable[[str], str]) -> None:
    config = RolloutConfig(initial_chains=2, expansion_rounds=1, expansions_per_round=1)
    toolbox = ToolBox([Named(tool)], retries=0, timeout_seconds=0.5, max_chars=5000)
    search = TreeSearch(
        ScriptedEngine(search_then_answer), TOKENIZER, toolbox, config, ToolsConfig(max_result_tokens=30)
    )
    (tree,) = roll_out(search, questions(1))
    assert all(tree.turns[n].finish_reason == "eos" for n in tree.leaves)
    observation = tree.turns[1].observation_ids
    assert len(observation) <= 30
    # Fails if a cut takes the closing tag away.
    assert TOKENIZER.decode(observation).endswith("\n</result>")
    assert search.counters.failed_tool_calls == (0 if tool is long_result else search.counters.tool_calls)
    if tool is long_result:
        assert len(observation) == 30


# ---- lengths


def test_results_leave_room_for_the_answer() -> None:
    # 120 tokens: 3 for the call, a tenth is reserved, so the result gets 120 - 3 - 12 = 105 with its closing tag.
    search = make_search(
        ScriptedEngine(search_then_answer),
        Named(long_result),
        strategy="chain",
        initial_chains=1,
        max_response_tokens=120,
        result_tokens=2000,
    )
    (tree,) = roll_out(search, questions(1))
    assert len(tree.turns[1].observation_ids) == 105
    assert TOKENIZER.decode(tree.turns[1].observation_ids).endswith(" one\n</result>")
    assert tree.turns[2].finish_reason == "eos"


@pytest.mark.parametrize("room", range(1, 30))  # from no room for a call to room for everything
def test_no_trajectory_is_too_long_and_only_leaves_lack_observations(room: int) -> None:
    # Fails if an observation is attached to a turn that is never continued, or a limit is passed by one.
    search = make_search(ScriptedEngine(by_seed), max_response_tokens=room)
    for tree in roll_out(search, questions(3), room):
        for n in range(1, len(tree)):
            turn = tree.turns[n]
            assert len(tree.path_ids(n)) - len(tree.turns[0].observation_ids) <= room
            assert bool(turn.children) == bool(len(turn.observation_ids))
            assert turn.action_ids.size


def test_max_positions_bounds_the_path() -> None:
    asked = questions(1)
    config = RolloutConfig(initial_chains=2, expansion_rounds=0, max_response_tokens=1000)
    size = len(prompts(asked)[0])
    search = TreeSearch(
        ScriptedEngine(by_seed), TOKENIZER, ToolBox([Search()]), config, ToolsConfig(), max_positions=size + 12
    )
    (tree,) = roll_out(search, asked)
    assert max(len(tree.path_ids(leaf)) for leaf in tree.leaves) <= size + 12
    search.max_positions = size
    with pytest.raises(ValueError, match="question 'q0': a prompt of"):
        roll_out(search, asked)


def test_a_turn_that_ran_out_of_tokens_is_a_leaf() -> None:
    search = make_search(ScriptedEngine(by_seed), max_turn_tokens=2, strategy="chain")
    (tree,) = roll_out(search, questions(1))
    assert [t.finish_reason for t in tree.turns[1:]] == ["length"] * 3
    # No leaf was ended by the policy: the question failed, is counted, and still has its tree.
    assert (search.counters.failed_trees, search.counters.trees) == (1, 1) and len(tree.leaves) == 3


# ---- the search


@pytest.mark.parametrize(
    ("settings", "leaves"),
    [
        ({}, 3 + 2 * 2),
        ({"strategy": "random"}, 3 + 2 * 2),
        ({"strategy": "chain"}, 3),
        ({"expansion_rounds": 0}, 3),
        ({"samples_per_tree": 5}, 5),  # two of seven are pruned
    ],
)
def test_number_of_leaves(settings: dict[str, Any], leaves: int) -> None:
    trees = roll_out(make_search(ScriptedEngine(by_seed), **settings), questions(5), 3)
    for tree in trees:
        assert len(tree.leaves) == tree.num_trajectories == leaves
        if settings.get("strategy") == "chain":
            assert all(len(turn.children) <= 1 for turn in tree.turns[1:])


def test_missing_leaves_count_in_the_last_one() -> None:
    (tree,) = roll_out(make_search(ScriptedEngine(by_seed), samples_per_tree=11), questions(1), 3)
    assert (len(tree.leaves), tree.num_trajectories, tree.turns[tree.leaves[-1]].multiplicity) == (7, 11, 5)


def test_expansion_adds_siblings_of_the_most_uncertain_turn() -> None:
    # Turn 1 has H 0.2 and turn 2 0.27, by their word. Fails if the expansion continues a turn instead of re-sampling
    # it, or takes the certain one, or a leaf.
    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            return ANSWER
        return "<search> two</search>" if request.turn_key[1] == 2 else "<search> three</search>"

    engine = ScriptedEngine(script)
    search = make_search(engine, initial_chains=2, expansion_rounds=1, expansions_per_round=1, branch_penalty=0.0)
    (tree,) = roll_out(search, questions(1))
    nll = [turn.nll for turn in tree.turns]
    assert nll[1] < nll[2]
    assert [turn.parent for turn in tree.turns] == [-1, 0, 0, 1, 2, 0, 5]
    assert len(tree.leaves) == 3


def test_results_do_not_depend_on_batching() -> None:
    # Fails if a seed depends on the position in the batch, or grouping changes the order of turns in a tree.
    asked = questions(6)
    whole = [as_data(tree) for tree in roll_out(make_search(ScriptedEngine(by_seed)), asked, 5)]
    for cache_tokens in (64, 3000):  # one question a group; a few
        engine = ScriptedEngine(by_seed)
        search = make_search(engine, cache_tokens=cache_tokens, max_response_tokens=6192)
        assert [as_data(tree) for tree in roll_out(search, asked, 5)] == whole
    turned = in_order(make_search(ScriptedEngine(by_seed)).roll_out(asked[3:][::-1], prompts(asked)[3:][::-1], seed=5))
    assert [as_data(tree) for tree in turned] == whole[3:][::-1]
    other = roll_out(make_search(ScriptedEngine(by_seed)), asked, 6)
    assert [as_data(tree) for tree in other] != whole


def test_the_same_question_twice_gives_two_samples() -> None:
    asked = [questions(1)[0]] * 2
    first, second = roll_out(make_search(ScriptedEngine(by_seed)), asked)
    assert as_data(first) != as_data(second)


def test_groups_follow_what_trees_really_use() -> None:
    # At first 7 branches x 1000 tokens fit the budget only once; what was used fits at least two questions.
    engine, asked = ScriptedEngine(search_then_answer), questions(5)
    search = make_search(engine, cache_tokens=7000, max_response_tokens=1000)
    roll_out(search, asked)
    assert len(engine.batches[0]) == 3
    engine.batches.clear()
    roll_out(search, asked, 1)
    assert len(engine.batches[0]) == 15


def test_trees_are_released_even_when_the_engine_fails() -> None:
    def script(prompt: str, request: Request) -> str:
        if "</result>" in prompt:
            raise MemoryError("no room")
        return "<search> two</search>"

    engine, asked = ScriptedEngine(script), questions(2)
    with pytest.raises(RuntimeError, match=r"questions \['q0', 'q1'\]: no room"):
        roll_out(make_search(engine, schedule="synchronous"), asked)
    assert not engine.live and not engine.in_flight and engine.released == ["0:q0", "1:q1"]


def test_progress_and_phases_are_reported() -> None:
    seen: list[tuple[int, int, int]] = []
    phases: list[str] = []

    class Timer:
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            phases.append(name)
            yield

    search = make_search(ScriptedEngine(by_seed))
    trees = roll_out(search, questions(3), on_progress=lambda *now: seen.append(now), timer=Timer())
    assert seen[-1] == (21, 21, sum(len(turn.action_ids) for tree in trees for turn in tree.turns))
    assert seen == sorted(seen) and set(phases) == {"rollout/generate", "rollout/tools"}


def test_as_many_prompts_as_questions() -> None:
    with pytest.raises(ValueError, match="2 questions but 1 prompts"):
        make_search(ScriptedEngine(by_seed)).roll_out(questions(2), [[1]], seed=0)  # at once, not with the first tree


# ---- with the real engine

SMALL = word_level_tokenizer(split_words(" one two three?\n:Page Tool"))  # 10 tags among 20 tokens: calls happen often


class RecordingEngine(PagedEngine):
    """The real engine; remembers what it sampled."""

    sampled: list[list[int]]

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        finished = super().poll()
        self.sampled = [*getattr(self, "sampled", []), *(completion.token_ids for _, completion in finished)]
        return finished


def real_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(SMALL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.1,
        eos_token_id=SMALL.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config).double().eval()  # float64: a batch's size cannot flip a sample


def real_search(*, cache_tokens: int = 262144, **rollout: Any) -> TreeSearch:
    settings = {"initial_chains": 3, "expansion_rounds": 2, "expansions_per_round": 2, "max_response_tokens": 120}
    config = RolloutConfig(**(settings | rollout))
    engine = RecordingEngine(real_model(), SMALL, cache_tokens=cache_tokens)
    tools = ToolsConfig(call_limit=3)
    return TreeSearch(engine, SMALL, ToolBox([Search()], retries=0), config, tools, cache_tokens=cache_tokens)


def real_prompts(count: int) -> list[list[int]]:
    return [SMALL.encode(" one two?\n" * (i + 1), add_special_tokens=False) for i in range(count)]


def test_every_tree_token_enters_the_cache_once() -> None:
    # The promise of docs/design.md#prefix-sharing: fails if a sibling, a later turn or an expansion round prefills
    # anything again.
    search = real_search()  # keeps 3 + 2*2 leaves, so nothing is pruned
    trees = in_order(search.roll_out(questions(4), real_prompts(4), seed=0))
    counters = search.engine.counters
    assert max(len(tree.path(leaf)) for tree in trees for leaf in tree.leaves) > 3
    assert any(len(turn.children) > 1 for tree in trees for turn in tree.turns[1:])
    assert counters.prefilled_tokens == sum(tree.unique_tokens for tree in trees)
    assert counters.decoded_tokens == sum(len(turn.action_ids) for tree in trees for turn in tree.turns)
    assert counters.evicted_tokens == 0


def test_actions_are_what_was_sampled_and_observations_what_was_inserted() -> None:
    # Fails if a result gets into an action (and so into the loss), or an action is decoded and encoded again.
    search = real_search()
    trees = in_order(search.roll_out(questions(4), real_prompts(4), seed=0))
    actions = [turn.action_ids.tolist() for tree in trees for turn in tree.turns[1:]]
    assert sorted(actions) == sorted(search.engine.sampled)  # type: ignore[attr-defined]
    notice = SMALL.encode(CALL_LIMIT_NOTICE, add_special_tokens=False)
    opening = SMALL.encode(" <result>\n", add_special_tokens=False)
    for turn in (turn for tree in trees for turn in tree.turns[1:] if turn.children):
        observation = turn.observation_ids.tolist()
        assert observation == notice[: len(observation)] or observation[: len(opening)] == opening
        assert turn.finish_reason == "stop"


def test_stored_logprobs_are_those_of_a_flat_forward() -> None:
    # Fails if a turn is put under the wrong parent, or the sampling distribution's log-probs are stored.
    trees = in_order(real_search(temperature=0.8, top_k=5).roll_out(questions(2), real_prompts(2), seed=0))
    model = real_model()
    for tree in trees:
        for leaf in tree.leaves:
            ids = torch.from_numpy(tree.path_ids(leaf))
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids[None]).logits[0] / 0.8, dim=-1)
            start = len(tree.path_ids(leaf)) - len(tree.turns[leaf].action_ids)
            expected = logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
            np.testing.assert_allclose(tree.turns[leaf].logprobs, expected, atol=1e-6)


def test_the_real_engine_does_not_depend_on_batching() -> None:
    whole = in_order(real_search().roll_out(questions(3), real_prompts(3), seed=4))
    alone = in_order(real_search().roll_out(questions(3)[2:], real_prompts(3)[2:], seed=4))
    grouped = in_order(real_search(cache_tokens=700).roll_out(questions(3), real_prompts(3), seed=4))
    assert [as_data(tree) for tree in alone] == [as_data(tree) for tree in whole[2:]]
    assert [as_data(tree) for tree in grouped] == [as_data(tree) for tree in whole]


def test_both_schedules_give_the_same_trees_with_the_real_engine() -> None:
    # Fails if a request that joins others in flight samples something else, or anything is prefilled twice.
    runs = []
    for schedule in ("synchronous", "streaming"):
        search = real_search(schedule=schedule)
        trees = in_order(search.roll_out(questions(4), real_prompts(4), seed=2))
        runs.append(([as_data(tree) for tree in trees], search.engine.counters))
    assert runs[0] == runs[1]
