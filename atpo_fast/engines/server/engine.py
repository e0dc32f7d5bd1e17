"""Running completions servers as an engine (design, section 7): vLLM, or any other that speaks token ids.

`server_protocol.py` says what is asked and what an answer means, `server_routing.py` which replica is asked,
`server_pool.py` asks, tries again and watches the replicas' health, `server_weights.py` brings weights on their way.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import rmtree
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from atpo_fast.common.event_loop import EventLoopThread
from atpo_fast.config import ServerConfig
from atpo_fast.engines.base import Completion, Engine, EngineCounters, Request, TurnKey
from atpo_fast.engines.prefix_check import LiveTurns
from atpo_fast.engines.server.pool import ReplicaPool
from atpo_fast.engines.server.protocol import Answer, ServerError, read_answer, request_body
from atpo_fast.engines.server.weights import folder_weights, shared_outcome, write_weights
from atpo_fast.engines.stops import StopTables, end_of_sequence_ids
from atpo_fast.engines.weight_stream import checked, parameter_shapes

_POLL_SECONDS = 0.01  # longest wait of a poll: tools' answers have to be looked at as well
_CLOSE_SECONDS = 10.0


class ServerEngine(Engine):
    """An `Engine` on running servers; see `Engine` for the methods.

    Several ranks may share the servers: rank 0 writes weights and lets the servers load them. The servers' counts of
    cached tokens (vLLM: `--enable-prompt-tokens-details`) fill `counters.cache_hit_tokens`; without them every prompt
    token counts as prefilled.

    Args:
        folder: Hugging Face folder of the served model. With `config.weights_dir` the servers are given its weights;
            without, they must serve it already, and only its configuration is read.
        tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        config: addresses and options.
        temperature: at which requests will sample.

    Raises:
        ServerError: no server is up in time, or one cannot do what is needed.
        ValueError: `config.sleep` where several ranks share the servers.
    """

    def __init__(
        self,
        folder: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        config: ServerConfig,
        *,
        temperature: float = 1.0,
    ):
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if config.sleep and ranks > 1:
            raise ValueError("engine.sleep needs ranks=1: another rank may still be rolling out")
        self.counters = EngineCounters()
        self.config = config
        self._model_config = AutoConfig.from_pretrained(folder)
        self._eos_ids = end_of_sequence_ids(tokenizer)
        self._stops = StopTables(tokenizer, self._model_config.get_text_config().vocab_size)
        self._live = LiveTurns()
        self._in_flight: dict[TurnKey, tuple[Request, Future[Answer]]] = {}
        self._finished: SimpleQueue[tuple[TurnKey, Future[Answer]]] = SimpleQueue()
        self._awake, self._weights_awake = True, True
        self._updates = 0
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self._thread = EventLoopThread("server-engine")
        self._pool = ReplicaPool(config, _headers(config), temperature)
        try:
            self._run(self._pool.open())
            if config.weights_dir is not None:
                self._push(folder_weights(folder) if self._writes else ())
        except BaseException:
            self.close()
            raise

    @property
    def max_positions(self) -> int | None:
        """Longest path that the servers can hold, prompt included; None where they do not say."""
        return self._pool.max_positions

    def close(self) -> None:
        """Drop what is in flight, close all connections and end the thread."""
        self._drop(list(self._in_flight))
        with suppress(Exception):
            self._thread.submit(self._pool.close()).result(_CLOSE_SECONDS)
        self._thread.close()

    # Generation

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests; see `Engine`.

        Raises:
            ValueError: a request that contradicts itself, another or what was generated before, or that truncates.
            RuntimeError: the engine is asleep.
        """
        if not self._awake:
            raise RuntimeError("the engine is asleep; call wake() before submit()")
        bodies = [request_body(request, self._eos_ids) for request in requests]
        self._live.admit(requests)
        for request, body in zip(requests, bodies, strict=True):
            self._begin(request, body)

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """The completions that have come, after a wait of some milliseconds for the first; see `Engine`.

        Raises:
            ServerError: a request failed for good, or is refused.
        """
        done: list[tuple[TurnKey, Completion]] = []
        wait = bool(self._in_flight)
        while True:
            try:
                key, future = self._finished.get(block=wait, timeout=_POLL_SECONDS)
            except Empty:
                return done
            if key not in self._in_flight or self._in_flight[key][1] is not future:
                continue  # dropped meanwhile
            try:
                answer = future.result()
            except BaseException:
                self._drop(list(self._in_flight))
                raise
            done.append((key, self._take(key, answer)))
            wait = False

    def _begin(self, request: Request, body: dict[str, Any]) -> None:
        key, stops = request.turn_key, self._stops.table(request.sampling.stop)

        def read(answer: Any) -> Answer:
            return read_answer(answer, request, stops, self._eos_ids)

        future = self._thread.submit(self._pool.complete(key[0], f"turn {key}", body, read))
        self._in_flight[key] = request, future
        future.add_done_callback(lambda done: self._finished.put((key, done)))

    def _take(self, key: TurnKey, answer: Answer) -> Completion:
        request, _ = self._in_flight.pop(key)
        completion, counters = answer.completion, self.counters
        self._live.written(request, completion.token_ids)
        new, decoded = len(request.prompt_ids) - answer.cached_tokens, len(completion.token_ids)
        counters.cache_hit_tokens += answer.cached_tokens
        counters.prefilled_tokens += new + decoded
        counters.decoded_tokens += decoded
        counters.forwarded_tokens += new + decoded - 1
        return completion

    def _drop(self, keys: Sequence[TurnKey]) -> None:
        """Give up requests in flight; the servers see their connections closed."""
        for key in keys:
            request, future = self._in_flight.pop(key)
            future.cancel()
            self._live.dropped(request)

    def _run(self, coroutine: Any) -> Any:
        """The outcome of a coroutine on the loop; it is cancelled when the wait is interrupted."""
        future = self._thread.submit(coroutine)
        try:
            return future.result()
        except (KeyboardInterrupt, CancelledError):
            future.cancel()
            raise

    # Weights and memory

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Give all servers new weights, by Hugging Face name; they forget their caches. A collective of the ranks.

        Rank 0 writes a folder of them into `config.weights_dir`, a bucket at a time, and lets each server load it. A
        server that is down loads it when it comes back.

        Raises:
            KeyError: a name that the model does not have.
            ValueError: no `config.weights_dir`, a tensor of another shape, or parameters that never came.
            ServerError: a server could not load them, or none is up.
            OSError: the folder cannot be written.
            RuntimeError: requests are in flight, or rank 0 failed.
        """
        self._require_idle()
        if self.config.weights_dir is None:
            raise ValueError(
                "engine.name=server cannot take new weights without engine.weights_dir: a folder that this "
                "machine and the servers see under the same path"
            )
        if not self._weights_awake:
            self._run(self._pool.ask_all("/wake_up?tags=weights"))
            self._weights_awake = True
        self._push(named_parameters)

    def _push(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        folder = self._weights_folder(self._updates + 1)
        outcome: list[str] | Exception = []
        if self._writes:
            stream = iter(named_parameters)
            try:
                shapes = parameter_shapes(self._model_config)
                write_weights(checked(stream, shapes), self._model_config, folder, self.config.bucket_mb << 20)
                outcome = self._run(self._pool.update_weights(str(folder)))
            except Exception as error:
                outcome = error
                for _ in stream:  # the other ranks gather along
                    pass
        else:
            for _ in named_parameters:
                pass
        loaded = shared_outcome(outcome)
        if not self._writes:
            self._run(self._pool.weights_are(str(folder), loaded))
        self._updates += 1
        self._live.cache_lost()
        if self._writes:  # the one before may still be read by a server that comes back
            rmtree(self._weights_folder(self._updates - 2), ignore_errors=True)

    def _weights_folder(self, update: int) -> Path:
        assert self.config.weights_dir is not None
        return Path(self.config.weights_dir).resolve() / f"weights_{update:06d}"

    def release(self, tree: Hashable) -> None:
        """Forget a tree (`PathNode.key[0]`): its requests in flight, and where its prefix is."""
        self._drop([key for key in self._in_flight if key[0] == tree])
        self._live.release(tree)
        self._thread.loop.call_soon_threadsafe(self._pool.router.forget, tree)

    def reset_prefix_cache(self) -> None:
        """Let the servers forget their caches, where they can be told to. Raises RuntimeError: requests in flight."""
        self._require_idle()
        self._live.cache_lost()
        self._run(self._pool.ask_all("/reset_prefix_cache"))

    def sleep(self) -> None:
        """With `config.sleep`, let the servers give back their GPUs' memory. Raises RuntimeError as above."""
        self._require_idle()
        self._awake = False
        if self.config.sleep:
            self._live.cache_lost()
            self._weights_awake = False
            self._run(self._pool.ask_all("/sleep?level=1"))

    def wake(self) -> None:
        """Undo `sleep`."""
        if self.config.sleep and not self._awake:
            if not self._weights_awake:
                self._run(self._pool.ask_all("/wake_up?tags=weights"))
            self._run(self._pool.ask_all("/wake_up?tags=kv_cache"))
        self._awake, self._weights_awake = True, True

    def _require_idle(self) -> None:
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} requests are in flight; poll until they are done, or release their trees"
            )


def _headers(config: ServerConfig) -> dict[str, str]:
    """The key that the servers ask for. Raises ServerError where its variable is not set."""
    if config.api_key_variable is None:
        return {}
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ServerError(f"the environment variable {config.api_key_variable} (engine.api_key_variable) is empty")
    return {"Authorization": f"Bearer {key}"}
