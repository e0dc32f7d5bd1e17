"""Whatever a client posts to our retrieval server, and whatever foreign servers answer to us."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.config.retrieval import ServerLimits
from atpo_fast.engines.request import PathNode, Request, SamplingParams
from atpo_fast.engines.server.protocol import Answer, ServerError, TransientError, read_answer, top_logprob
from atpo_fast.engines.stops import StopTable
from atpo_fast.environment.search import HTTPSearch
from atpo_fast.retrieval import BM25Index, BM25Settings, build_index, open_index
from atpo_fast.retrieval.server import make_app
from tests.helpers.fuzzing import FUZZ, changed, damaged, values, written
from tests.helpers.retrieval_cases import random_rows, write_corpus

REQUEST = {"queries": ["w1", "w2 w3"], "topk": 2, "return_scores": True}
HITS = {"result": [[{"document": {"id": "1", "contents": '"T"\nx'}, "score": 1.5}, {"document": {"text": "y"}}]]}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("protocol")
    build_index(folder / "i", [write_corpus(folder / "c.jsonl", random_rows(20))], BM25Settings())
    limits = ServerLimits(body_bytes=3000, queries=10, query_chars=50, hits=100)
    return make_app(open_index(folder / "i"), wait_seconds=0, limits=limits)


@FUZZ
@given(
    st.one_of(
        damaged(written(REQUEST)),
        changed(REQUEST, list(REQUEST)).map(written),
        values([*REQUEST, "query"]).map(written),
        st.binary(max_size=40),
    )
)
def test_any_request(app: Any, body: bytes) -> None:
    """Fails if a body ends in an error of the server, or in an answer that is not JSON of one list a query."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/retrieve", content=body)

    response = asyncio.run(post())
    assert response.status_code in (200, 413, 422)
    if response.status_code == 200:
        asked = json.loads(body)
        assert len(response.json()["result"]) == len(asked.get("queries", ["one"]))
    else:
        assert response.json()["detail"]


@FUZZ
@given(st.text(max_size=40), st.integers(1, 5))
def test_any_query(query: str, k: int) -> None:
    """Fails if a query of any characters ends in an error."""
    numbers, scores = BM25Index.from_texts(["a b", "東京 a", ""]).search([query, "a"], k)
    assert numbers.shape == scores.shape == (2, k)


class _Answers(BaseHTTPRequestHandler):
    body = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def foreign() -> Iterator[HTTPSearch]:
    """Our client at a server that answers what `_Answers.body` holds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    with HTTPSearch(f"http://127.0.0.1:{server.server_port}/retrieve") as search:
        yield search
    server.shutdown()
    server.server_close()


@FUZZ
@given(
    st.one_of(
        damaged(written(HITS)),
        changed(HITS, ["result", "document", "contents", "title", "text", "score"]).map(written),
        values(["result", "document", "contents"]).map(written),
        st.just(b"[" * 50_000),
    )
)
def test_any_answer_of_a_retrieval_server(foreign: HTTPSearch, body: bytes) -> None:
    """Fails if an answer ends in an error that the tool box does not expect."""
    _Answers.body = body
    try:
        assert isinstance(foreign("x"), str)
    except (ValueError, ConnectionError) as error:
        assert str(error)


COMPLETION = {
    "choices": [
        {
            "token_ids": [5, 6, 7],
            "prompt_token_ids": [1, 2],
            "logprobs": {
                "token_logprobs": [-0.1, -0.2, -0.3],
                "tokens": ["token_id:5", "token_id:6", "token_id:7"],
                "top_logprobs": [{"token_id:5": -0.1, "token_id:8": -3.0}] * 3,
            },
            "finish_reason": "length",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens_details": {"cached_tokens": 1}},
}
STOPS = StopTable([bytes([65 + token]) for token in range(10)], ("GH",))
KEYS = ["choices", "token_ids", "logprobs", "tokens", "token_logprobs", "top_logprobs", "usage", "finish_reason"]


@FUZZ
@given(st.one_of(changed(COMPLETION, KEYS), values(KEYS)), st.sampled_from([0, 2]))
def test_any_answer_of_an_inference_server(answer: Any, top: int) -> None:
    """Fails if an answer ends in an error that the pool of replicas does not expect, which would end the run."""
    sampling = SamplingParams(max_new_tokens=3, top_logprobs=top)
    asked = Request(
        prompt_ids=[1, 2], sampling=sampling, seed=0, path=(PathNode(key=("t", 0), end=2),), turn_key=("t", 1)
    )
    try:
        read = read_answer(answer, asked, STOPS, [0])
        assert isinstance(read, Answer) and len(read.completion.token_ids) == len(read.completion.logprobs)
    except (ServerError, TransientError) as error:
        assert str(error)
    try:
        assert isinstance(top_logprob(answer), int | float)
    except TransientError as error:
        assert str(error)
