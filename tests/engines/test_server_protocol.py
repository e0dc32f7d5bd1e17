"""What is said to a completions server, what its answers mean, and which replica is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atpo_fast.engines.base import Request
from atpo_fast.engines.server.protocol import ServerError, TransientError, read_answer, request_body
from atpo_fast.engines.server.routing import Replica, Router
from atpo_fast.engines.stops import StopTable, vocabulary_bytes
from tests.helpers.served_requests import PROMPTS, SMALL, request

# ---- what an answer means


def answer(ids: list[int], finish: str = "length", cause: Any = None, **choice: Any) -> dict[str, Any]:
    names = [f"token_id:{token}" for token in ids]
    listed = {"tokens": names, "token_logprobs": [-0.5 * i for i in range(len(ids))]}
    full = {"token_ids": ids, "logprobs": listed, "finish_reason": finish, "stop_reason": cause, **choice}
    return {"choices": [full]}


def read(answered: Any, asked: Request | None = None) -> Any:
    asked = asked or request()
    stops = StopTable(vocabulary_bytes(SMALL, len(SMALL) + 4), ("</search>",))
    missing = {len(SMALL) + number for number in range(4)}
    return read_answer(answered, asked, stops, [SMALL.eos_token_id], missing).completion


ONE, TWO = SMALL.encode(" one two", add_special_tokens=False)
(STOP,) = SMALL.encode("</search>", add_special_tokens=False)


def test_a_turn_ends_where_its_tokens_say() -> None:
    # Fails if tokens after the closing tag are kept (a server that decodes several at once), or the tag is dropped.
    over = read(answer([ONE, STOP, TWO, TWO], "stop", "</search>"))
    assert (over.token_ids, over.logprobs, over.stop) == ([ONE, STOP], [0.0, -0.5], "</search>")
    assert over.policy_logprobs == over.logprobs and over.finish_reason == "stop"
    end = read(answer([ONE, SMALL.eos_token_id, TWO], "stop", SMALL.eos_token_id))
    assert (end.token_ids, end.finish_reason, end.stop) == ([ONE, SMALL.eos_token_id], "eos", None)
    assert read(answer([ONE, TWO])).finish_reason == "length"


def test_candidates_include_the_sampled_token_once() -> None:
    # Servers differ in whether they list it beside the likeliest. Fails if it is missing or doubled, if candidates of
    # tokens after the end are kept, or if a server that lists too few is believed.
    first = {f"token_id:{TWO}": -0.1, f"token_id:{ONE}": -0.7}
    second = {f"token_id:{TWO}": -0.2, f"token_id:{ONE}": -0.9}
    tops = [first, second, first]
    answered = answer([ONE, STOP, TWO], "stop", "</search>")
    answered["choices"][0]["logprobs"]["top_logprobs"] = tops
    asked = request(top_logprobs=2)
    assert read(answered, asked).top_logprobs == [[-0.1, -0.7], [-0.2, -0.9, -0.5]]
    tops[1][f"token_id:{STOP}"] = -0.5
    assert read(answered, asked).top_logprobs == [[-0.1, -0.7], [-0.2, -0.9, -0.5]]
    assert read(answered).top_logprobs is None and request_body(request(), [2])["logprobs"] == 0
    assert request_body(asked, [2])["logprobs"] == 2
    with pytest.raises(ServerError, match=r"3 likeliest tokens, .*--max-logprobs"):
        read(answered, request(top_logprobs=3))


def test_older_servers_give_ids_in_place_of_words() -> None:
    # Fails if a server with return_tokens_as_token_ids alone is not understood.
    assert read(answer([ONE, TWO], token_ids=None)).token_ids == [ONE, TWO]


@pytest.mark.parametrize(
    ("answered", "error", "words"),
    [
        (answer([ONE], token_ids=None, logprobs={"tokens": [" one"], "token_logprobs": [0.0]}), ServerError, "0.10.2"),
        (answer([ONE], logprobs=None), ServerError, "does not return log-probs"),
        (
            answer([ONE], prompt_token_ids=[PROMPTS[0][0] + 1, *PROMPTS[0]]),
            ServerError,
            "first difference is at token 0",
        ),
        (answer([ONE], prompt_token_ids=PROMPTS[0][:-1]), ServerError, f"at token {len(PROMPTS[0]) - 1}"),
        (answer([ONE], "stop", 7), ServerError, "--generation-config vllm"),
        (answer([ONE], "stop", "</search>"), ServerError, "another tokenizer"),
        (answer([ONE], "abort"), TransientError, "aborted turn"),
        (answer([]), TransientError, "0 token ids"),
        *(
            (answer([ONE, TWO], logprobs={"token_logprobs": [-0.5, value]}), TransientError, "log-prob of token 1 is")
            for value in (None, float("nan"), float("-inf"), "?")
        ),
        (answer([ONE], logprobs={"token_logprobs": [None]}), ServerError, "does not return log-probs"),
        *((answer([ONE, len(SMALL) + n]), TransientError, "this run's tokenizer does not have") for n in (0, 4)),
        ({"choices": []}, TransientError, "not one completion"),
        (["?"], TransientError, "not one completion"),
    ],
)
def test_answers_that_cannot_be_used(answered: Any, error: type[Exception], words: str) -> None:
    # Fails if a server that adds tokens, ends turns by its own rules or sends no ids is believed.
    with pytest.raises(error, match=words):
        read(answered)


def test_what_follows_the_end_of_a_turn_does_not_matter() -> None:
    """Fails if a turn is refused for tokens that are dropped anyway."""
    listed = {"token_logprobs": [-0.5, -0.5, None]}
    assert read(answer([ONE, STOP, len(SMALL)], "stop", "</search>", logprobs=listed)).token_ids == [ONE, STOP]


def test_nothing_is_left_to_the_server_s_defaults() -> None:
    # Fails if a model's generation configuration, such as a repetition penalty, changes the sampling.
    body = request_body(request(stop=("</search>",), temperature=0.5), [2])
    assert {"repetition_penalty", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"} <= body.keys()
    assert (body["stop"], body["stop_token_ids"], body["ignore_eos"]) == (["</search>"], [2], True)
    assert (body["include_stop_str_in_output"], body["skip_special_tokens"]) == (True, False)
    assert (body["temperature"], body["max_tokens"], body["prompt"]) == (0.5, 5, PROMPTS[0])


# ---- routing


def test_a_tree_stays_with_its_prefix_unless_that_is_much_busier() -> None:
    # Fails if requests of a tree are spread without need, or pile up at one replica while another is idle.
    async def check() -> None:
        one, two = Replica("one", up=True), Replica("two", up=True)
        router = Router([one, two], max_requests=3, slack=2)
        assert await router.place("a") is one
        assert await router.place("b") is two
        assert [await router.place("a") for _ in range(2)] == [one, one]
        waiting = asyncio.create_task(router.place("a"))  # 3 against 1: still not over the slack, but no room
        assert await waiting is two  # which is idle enough to take it from the queue
        for _ in range(2):
            router.leave(two)
        assert two.running == 0 and await router.place("b") is two

    asyncio.run(check())


def test_requests_leave_a_replica_that_goes_down_and_wait_for_one_that_comes_up() -> None:
    # Fails if a question waits for ever behind a dead replica, or a cancelled one keeps its place.
    async def check() -> None:
        one, two = Replica("one", up=True), Replica("two")
        router = Router([one, two], max_requests=1, slack=0)
        assert await router.place("a") is one
        queued = [asyncio.create_task(router.place("a")) for _ in range(3)]
        await asyncio.sleep(0)
        router.set_down(one, "dead")
        assert len(router.parked) == 3 and router.down_since is not None
        queued[0].cancel()
        await asyncio.sleep(0)
        router.set_up(two)
        assert await queued[1] is two and not queued[2].done()
        router.leave(two)
        assert await queued[2] is two
        router.leave(two)
        assert (two.running, two.load, len(router.parked)) == (0, 0, 0)
        router.set_down(two, "dead too")
        lost = asyncio.create_task(router.place("a"))
        await asyncio.sleep(0)
        router.give_up("nobody")
        with pytest.raises(ServerError, match="nobody"):
            await lost

    asyncio.run(check())
