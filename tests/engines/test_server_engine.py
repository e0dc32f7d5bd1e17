"""The server engine against real HTTP servers around a real model: same trees as in process, whatever fails."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from fastapi.responses import JSONResponse
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from atpo_fast.config import Config, RolloutConfig, ServerConfig, ToolsConfig
from atpo_fast.engines.base import PathNode, Request, SamplingParams
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.engines.server import pool as server_pool
from atpo_fast.engines.server.engine import ServerEngine
from atpo_fast.engines.server.pool import ReplicaPool
from atpo_fast.engines.server.protocol import ServerError
from atpo_fast.engines.server.weights import folder_weights, write_weights
from atpo_fast.environment import ToolBox
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.tree import TurnTree
from tests.helpers.completions_server import CompletionsServer, Fault
from tests.helpers.scripted_engine import Search, as_data, questions
from tests.helpers.served_requests import PROMPTS, SMALL, request

Serve = Callable[..., CompletionsServer]
Connect = Callable[..., ServerEngine]

ASKED = questions(4)
TOOLS = ToolsConfig(call_limit=3)
OFTEN: dict[str, Any] = {"health_seconds": 0.05}
LARGE: dict[str, Any] = {"initial_chains": 3, "expansion_rounds": 2, "max_response_tokens": 60}


def make_model(seed: int = 0, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(SMALL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        eos_token_id=SMALL.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config).double().eval()  # float64: a batch's size cannot flip a sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of the served model."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    return path


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers, which end with the test."""
    with ExitStack() as stack:

        def start(model: Callable[[], PreTrainedModel] = make_model, **options: Any) -> CompletionsServer:
            return stack.enter_context(CompletionsServer(model, SMALL, **options))

        yield start


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a healthy server may take longer to answer than a run would wait."""
    for name in ("_HEALTH_SECONDS", "_CONNECT_SECONDS"):
        monkeypatch.setattr(server_pool, name, 3600.0)


@pytest.fixture
def connect(folder: Path) -> Iterator[Connect]:
    """Make engines, which are closed at the end of the test.

    Waits between tries are short, so that faults cost little; limits that only a broken engine reaches are long.
    Health checks cost CPU time: tests that wait for one ask for more of them than these (`OFTEN`).
    """
    with ExitStack() as stack:

        def make(*servers: CompletionsServer | str, temperature: float = 1.0, **options: Any) -> ServerEngine:
            urls = [server if isinstance(server, str) else server.url for server in servers]
            quick = {"backoff_seconds": 0.01, "health_seconds": 0.5, "patience_seconds": 300.0}
            engine = ServerEngine(folder, SMALL, ServerConfig(urls=urls, **quick | options), temperature=temperature)
            stack.callback(engine.close)
            return engine

        yield make


def roll_out(engine: Any, on_turns: Callable[[int], None] = lambda turns: None, **settings: Any) -> list[TurnTree]:
    """Search trees of ASKED; `on_turns` is called with the number of turns so far."""
    shape = {"initial_chains": 2, "expansion_rounds": 1, "expansions_per_round": 2, "max_response_tokens": 40}
    search = TreeSearch(engine, SMALL, ToolBox([Search()], retries=0), RolloutConfig(**shape | settings), TOOLS)
    return in_order(search.roll_out(ASKED, PROMPTS, seed=0, on_progress=lambda *_: on_turns(search.counters.turns)))


@pytest.fixture(scope="module")
def expected() -> list[TurnTree]:
    """The trees that the paged engine gives."""
    return roll_out(PagedEngine(make_model(), SMALL, cache_tokens=4096))


def assert_same(trees: list[TurnTree], expected: list[TurnTree]) -> None:
    assert [as_data(tree) for tree in trees] == [as_data(tree) for tree in expected]


# ---- the same trees


def test_trees_are_those_of_the_paged_engine(serve: Serve, connect: Connect) -> None:
    # Fails if seeds, stops, temperature, ids or log-probs are lost on the way, or a tree is spread over replicas, so
    # that its prefixes are filled again: no token of a tree enters a cache twice.
    first, second = serve(), serve()
    engine = connect(first, second, affinity_slack=1000)
    trees = roll_out(engine, **LARGE)
    assert_same(trees, roll_out(PagedEngine(make_model(), SMALL, cache_tokens=4096), **LARGE))
    assert any(len(turn.children) > 1 for tree in trees for turn in tree.turns[1:])
    assert {turn.finish_reason for tree in trees for turn in tree.turns[1:]} == {"stop", "eos", "length"}
    assert engine.counters.prefilled_tokens <= sum(tree.unique_tokens for tree in trees)
    assert engine.counters.decoded_tokens == sum(len(turn.action_ids) for tree in trees for turn in tree.turns)
    beginnings = [{body["prompt"][0] for body in server.bodies} for server in (first, second)]
    assert [len(found) for found in beginnings] == [2, 2] and not beginnings[0] & beginnings[1]


def test_proxies_of_the_environment_are_not_used(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fails if requests to servers in the cluster are sent to a proxy for the world outside, which does not answer.
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert len(connect(serve(), patience_seconds=5.0).generate([request()])) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidates_are_those_of_the_paged_engine(serve: Serve, connect: Connect, temperature: float) -> None:
    # Fails if they come of another distribution or position, or without the drawn token.
    server = serve()
    asked = [request(n, tokens=8, top_logprobs=3 + n, temperature=temperature) for n in range(4)]
    expected = PagedEngine(make_model(), SMALL, cache_tokens=4096).generate(asked)
    for ours, theirs in zip(connect(server, temperature=temperature).generate(asked), expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.top_logprobs is not None and theirs.top_logprobs is not None
        for one, other in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
            np.testing.assert_allclose(sorted(one), sorted(other), atol=1e-9)


def test_only_strategies_that_branch_by_entropy_ask_for_candidates(serve: Serve, connect: Connect) -> None:
    # Fails if others pay for them, or if ARPO gets by without.
    server = serve()
    settings: dict[str, Any] = {"strategy": "arpo", "samples_per_tree": 6, **LARGE}
    trees = roll_out(connect(server), **settings)
    assert_same(trees, roll_out(PagedEngine(make_model(), SMALL, cache_tokens=4096), **settings))
    assert {body["logprobs"] for body in server.bodies} == {10}
    server.bodies.clear()
    roll_out(connect(server), strategy="chain")
    assert {body["logprobs"] for body in server.bodies} == {0}


def test_logprobs_after_temperature_are_asked_for(serve: Serve, connect: Connect) -> None:
    # Fails if a server that reports log-probs at temperature 1 is taken for one that reports the policy's.
    reference = PagedEngine(make_model(), SMALL, cache_tokens=4096)
    assert_same(
        roll_out(connect(serve(), temperature=0.7), temperature=0.7),
        roll_out(reference, temperature=0.7),
    )
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        connect(serve(processed_logprobs=False), temperature=0.7)
    connect(serve(processed_logprobs=False), temperature=1.0)  # the same there


def test_a_replica_works_on_a_bounded_number_of_requests(
    serve: Serve, connect: Connect, expected: list[TurnTree]
) -> None:
    # Fails if a burst of requests is handed on at once, or what waits is never begun.
    servers = [serve(), serve()]
    assert_same(roll_out(connect(*servers, max_requests=2)), expected)
    assert max(server.most_running for server in servers) <= 2


def test_what_is_released_is_not_given(serve: Serve, connect: Connect) -> None:
    # Fails if a dropped request comes back with a poll, keeps its place at the server, or blocks its key.
    server = serve(fault=lambda number: "slow" if number == 0 else None)
    engine = connect(server, max_requests=1)
    engine.submit([request(tree="dropped"), request(tree="kept")])
    _wait(lambda: bool(server.bodies))
    engine.release("dropped")
    done: list[Any] = []
    _wait(lambda: bool(done.extend(engine.poll()) or done))
    assert [key for key, _ in done] == [("kept", 1)]
    assert len(engine.generate([request(tree="dropped")])) == 1
    assert engine.poll() == []


def test_a_changed_prefix_is_named(serve: Serve, connect: Connect) -> None:
    # Fails if a turn that was decoded and encoded again is sent on as if the policy had written it.
    engine = connect(serve())
    (written,) = engine.generate([request()])
    changed = [*PROMPTS[0], *written.token_ids[:-1], written.token_ids[-1] ^ 1, 3]
    path = (PathNode(key=("t", 0), end=len(PROMPTS[0])), PathNode(key=("t", 1), end=len(changed)))
    later = Request(prompt_ids=changed, sampling=SamplingParams(max_new_tokens=2), seed=0, path=path, turn_key=("t", 2))
    with pytest.raises(ValueError, match=f"token {len(changed) - 2} of the path"):
        engine.submit([later])
    with pytest.raises(ValueError, match="top_p and top_k must be off"):
        engine.submit([request(3, top_p=0.9)])
    assert engine.poll() == []


# ---- faults that pass


@pytest.mark.parametrize("fault", ["500", "429", "slow", "cut", "garbage"])
def test_a_failing_request_is_tried_again(
    serve: Serve, connect: Connect, expected: list[TurnTree], fault: Fault
) -> None:
    # Fails if a fault loses a question, gives it another tree, or ends the run; every seventh request fails.
    servers = [serve(fault=lambda number: fault if number % 7 == 3 else None) for _ in range(2)]
    engine = connect(*servers, timeout_seconds=600.0, backoff_seconds=0.0, retries=100)
    with time_passes(engine, servers, 601.0):
        assert_same(roll_out(engine), expected)
    assert sum(len(server.bodies) for server in servers) > engine.counters.decoded_tokens / 60


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replica_that_is_killed_and_started_again_loses_no_question(
    serve: Serve, connect: Connect, expected: list[TurnTree], replicas: int, caplog: pytest.LogCaptureFixture
) -> None:
    # Fails if requests of a dead replica are lost, or one that has come back gets none; if each way in which a dead one
    # does not answer is a line of its own.
    servers = [serve() for _ in range(replicas)]
    engine = connect(*servers, affinity_slack=0, **OFTEN)
    asked: list[int] = []  # of the first, when it was killed and when it was started again

    def restart(turns: int) -> None:
        if (turns >= 8 and not asked) or (len(asked) == 1 and (replicas == 1 or turns >= 16)):
            servers[0].start() if asked else servers[0].kill()
            asked.append(len(servers[0].bodies))
            _wait(lambda: engine._pool.replicas[0].up == (len(asked) == 2))

    assert_same(roll_out(engine, restart), expected)
    assert asked[1] == asked[0] < len(servers[0].bodies)
    out, again = caplog.messages
    assert re.match(rf"{servers[0].url} is out of use: \w+: ..", out) and again == f"{servers[0].url} is in use again"


def test_a_replica_that_stays_dead_is_done_without(serve: Serve, connect: Connect, expected: list[TurnTree]) -> None:
    # Fails if the run waits for it, or goes on asking it.
    dead, alive = serve(), serve()
    engine = connect(dead, alive, health_seconds=1000.0)
    dead.kill()
    assert_same(roll_out(engine), expected)
    assert not engine._pool.replicas[0].up


def test_an_unhealthy_replica_gets_nothing_until_it_is_healthy(serve: Serve, connect: Connect) -> None:
    # Fails if health checks are not made, or one that recovered stays out.
    server, other = serve(), serve()
    engine = connect(server, other, **OFTEN)
    server.healthy = False
    _wait(lambda: not engine._pool.replicas[0].up)
    engine.generate([request(number) for number in range(4)])
    assert not server.bodies and len(other.bodies) == 4
    server.healthy = True
    _wait(lambda: engine._pool.replicas[0].up)
    engine.generate([request(number, tree=f"t{number}") for number in range(4)])
    assert server.bodies


def _wait(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(30_000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("waited too long")


@contextmanager
def time_passes(engine: ServerEngine, servers: Sequence[CompletionsServer], seconds: float) -> Iterator[None]:
    """Within it, the clock of the engine's waits jumps ahead whenever only slow answers are left to wait for."""
    loop, skipped, passed = engine._thread.loop, 0.0, 0
    real = loop.time
    loop.time = lambda: real() + skipped  # type: ignore[method-assign]

    def look() -> None:
        nonlocal skipped, passed
        held = sum(server.ever_held for server in servers)
        if held > passed and all(server.running == server.held for server in servers):
            passed, skipped = held, skipped + seconds

    def on_change() -> None:
        loop.call_soon_threadsafe(look)

    for server in servers:
        server.on_change = on_change
    try:
        yield
    finally:
        for server in servers:
            server.on_change = lambda: None


# ---- faults that do not pass


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"failed 3 times \(engine.retries\); last, http://127.0.0.1:\d+: HTTP 500 .*out of order"),
        ("garbage", "an answer that is not JSON: '<html>bad gateway</html>'"),
        ("cut", "failed 3 times"),
        ("slow", r"no answer within 600 s"),
        ("no_ids", "does not return token ids: vLLM >=0.10.2"),
        ("no_logprobs", "does not return log-probs"),
    ],
)
def test_a_lasting_fault_ends_the_run_with_one_message(
    serve: Serve, connect: Connect, fault: Fault, words: str
) -> None:
    # Fails if the run hangs, the message does not say what and where, or requests stay in flight.
    server = serve(fault=lambda number: fault if number > 5 else None)
    engine = connect(server, retries=2, timeout_seconds=600.0)
    message = f"the engine failed while it wrote turns for the questions .*{words}"
    with pytest.raises(RuntimeError, match=message) as error, time_passes(engine, [server], 601.0):
        roll_out(engine)
    assert isinstance(error.value.__cause__, ServerError)
    assert engine.poll() == []
    server.fault = lambda number: None
    assert len(engine.generate([request(tree="another")])) == 1  # the engine is still of use


def test_nobody_there(folder: Path, serve: Serve, connect: Connect) -> None:
    # Fails if a mistyped address hangs for ever, or the message does not name it.
    server = serve()
    server.kill()
    with pytest.raises(ServerError, match=rf"no server was up for 0.2 s .*{server.url}.*Check engine.urls"):
        connect(server.url, patience_seconds=0.2)
    with pytest.raises(ServerError, match=r"does not serve engine\.model='big', but"):
        connect(serve(), model="big")


def test_all_replicas_gone_for_too_long(serve: Serve, connect: Connect) -> None:
    # Fails if requests that wait for any replica wait for ever.
    server = serve()
    engine = connect(server)
    server.kill()
    engine._pool.config = replace(engine._pool.config, patience_seconds=0.3)  # not before: it has to connect
    with pytest.raises(ServerError, match=r"no server was up for 0.3 s"):
        engine.generate([request()])
    assert engine.poll() == []


def test_nothing_leaks(serve: Serve, folder: Path) -> None:
    # Fails if closing leaves a thread, a socket or a task, also after a failed request and with one in flight.
    server = serve(fault=lambda number: {1: "cut", 2: "slow"}.get(number % 3))
    server.slow_seconds = 0.5
    config = ServerConfig(urls=[server.url], backoff_seconds=0.0, health_seconds=0.05)

    def use() -> None:
        engine = ServerEngine(folder, SMALL, config)
        engine.submit([request(number) for number in range(3)])
        engine.poll()
        engine.close()

    use()
    mine = psutil.Process()
    before = _our_threads(), _client_sockets(mine, server.port), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    _wait(lambda: _client_sockets(mine, server.port) <= before[1] and server.running == 0)
    assert _our_threads() <= before[0]
    assert len(os.listdir("/proc/self/fd")) <= before[2] + 2


def test_a_health_check_that_ends_as_the_engine_closes_is_the_last() -> None:
    # Fails if a cancellation that comes with an answer is lost: closing an engine then waited for ten seconds.
    async def close_after(steps: int) -> None:
        answer: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()

        async def respond(_: httpx.Request) -> httpx.Response:
            return await answer

        pool = ReplicaPool(ServerConfig(urls=["http://replica"], health_seconds=3600.0), {}, 1.0)
        pool._client = httpx.AsyncClient(transport=httpx.MockTransport(respond))
        watch = asyncio.create_task(pool._watch(pool.replicas[0]))
        pool._watches = [watch]
        await asyncio.sleep(0.01)
        answer.set_result(httpx.Response(503))
        for _ in range(steps):
            await asyncio.sleep(0)
        closing = asyncio.create_task(pool.close())
        await asyncio.wait([closing], timeout=60)
        assert closing.done(), steps
        assert watch.cancelled()

    for steps in range(12):
        asyncio.run(close_after(steps))


def _our_threads() -> int:
    """All but the workers of the test's server, which come with its requests and stay a while."""
    return sum(not thread.name.startswith("AnyIO worker") for thread in threading.enumerate())


def _client_sockets(process: psutil.Process, port: int) -> int:
    return sum(
        1 for c in process.net_connections("tcp") if c.raddr and c.raddr.port == port and c.status != "CLOSE_WAIT"
    )


# ---- weights, cache, sleep


@pytest.mark.parametrize("tied", [True, False])
def test_servers_take_new_weights(serve: Serve, folder: Path, tmp_path: Path, tied: bool) -> None:
    # Fails if a replica keeps old weights or an old cache, or a name or a tensor is lost on the way.
    old, new = make_model(1, tied), make_model(2, tied)
    old.save_pretrained(tmp_path / "model")
    servers = [serve(lambda: make_model(3, tied)), serve(lambda: make_model(3, tied))]  # started with others
    config = ServerConfig(urls=[s.url for s in servers], weights_dir=str(tmp_path / "shared"), health_seconds=0.05)
    engine = ServerEngine(tmp_path / "model", SMALL, config)
    try:
        # Untied models write long turns.
        want = [roll_out(PagedEngine(model, SMALL, cache_tokens=4096), max_response_tokens=20) for model in (old, new)]
        assert as_data(want[0][0]) != as_data(want[1][0])
        for number in (0, 1, 0):
            if number or engine._updates > 1:
                for server in servers:
                    server.cached.append([1])
                engine.update_weights(iter(list((old, new)[number].named_parameters())))
                assert not any(server.cached for server in servers)
            assert_same(roll_out(engine, max_response_tokens=20), want[number])
        assert len(list((tmp_path / "shared").iterdir())) == 2  # the newest and the one before
        servers[0].kill()
        servers[0].start()  # with the weights that it was started with
        servers[1].kill()
        engine.generate([request()])  # now only the first can answer
        expected = PagedEngine(make_model(1, tied), SMALL, cache_tokens=4096).generate([request(1, tree="x")])
        assert engine.generate([request(1, tree="x")])[0].token_ids == expected[0].token_ids
    finally:
        engine.close()


def test_weights_that_cannot_be_given(serve: Serve, connect: Connect, folder: Path, tmp_path: Path) -> None:
    # Fails if training goes on with servers that have kept old weights.
    model = make_model(1)
    with pytest.raises(ValueError, match=r"without engine\.weights_dir"):
        connect(serve()).update_weights(model.named_parameters())
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
        connect(serve(dev_mode=False), weights_dir=str(tmp_path / "a"))
    server = serve()
    engine = connect(server, weights_dir=str(tmp_path / "b"))
    with pytest.raises(KeyError, match="surplus"):
        engine.update_weights([("surplus", torch.zeros(1))])
    with pytest.raises(ValueError, match="new weights lack"):
        engine.update_weights(list(model.named_parameters())[:2])
    broken = JSONResponse({}, status_code=500)
    server._reload = lambda body: broken  # type: ignore[method-assign]  # a server that refuses
    with pytest.raises(ServerError, match="see this folder under the same path"):
        engine.update_weights(model.named_parameters())


def test_buckets_bound_what_is_held(folder: Path, tmp_path: Path) -> None:
    # Fails if the whole model is collected before anything is written, or a bucket overwrites another.
    model = make_model(4)
    write_weights(model.named_parameters(), model.config, tmp_path / "w", 9000)
    files = sorted((tmp_path / "w").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert len(files) > 3 and sum(size > 9000 for size in sizes) <= 3  # a single tensor may be larger
    again = dict(folder_weights(tmp_path / "w"))
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter.detach())
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "w", dtype=torch.float64)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_sleep_and_cache(serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    # Fails if a server is not told, weights are written into one that sleeps, or one without the endpoints is a fault
    # or is complained of more than once.
    server = serve()
    engine = connect(server, sleep=True)
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.submit([request()])
    engine.wake()
    engine.reset_prefix_cache()
    assert server.called == ["sleep?level=1", "wake_up?tags=weights", "wake_up?tags=kv_cache", "reset_prefix_cache"]
    plain = connect(serve(dev_mode=False), sleep=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plain.sleep()
            plain.wake()
            plain.reset_prefix_cache()
    assert len(caplog.messages) == 3 and all("VLLM_SERVER_DEV_MODE" in message for message in caplog.messages)
    assert len(plain.generate([request()])) == 1


# ---- configuration


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs engine.urls"),
        ({"urls": ["node7:8000"]}, "does not begin with http"),
        ({"urls": ["http://a", "http://a"]}, "twice"),
        ({"urls": ["http://a"], "top_p": 0.9}, "top_p=1 and rollout.top_k=0"),
    ],
)
def test_configurations_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    # Fails if they are found out only after the cold start.
    rollout: Any = {"top_p": settings.pop("top_p", 1.0)}
    engine: Any = {"name": "server", **settings}
    with pytest.raises(ValueError, match=words):
        Config(engine=engine, rollout=rollout)


def test_the_key_comes_from_the_environment(serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if the key is not sent, or a missing one is found out as a refused request.
    server = serve()
    with pytest.raises(ServerError, match="NO_SUCH_KEY"):
        connect(server, api_key_variable="NO_SUCH_KEY")
    monkeypatch.setenv("SOME_KEY", "secret")
    engine = connect(server, api_key_variable="SOME_KEY")
    client = engine._pool._client
    assert client is not None
    assert client.headers["Authorization"] == "Bearer secret"
