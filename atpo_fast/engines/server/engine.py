"""Running completions servers as an engine (docs/design.md#engines): vLLM, or any other that speaks token ids.

`protocol.py` says what is asked and what an answer means, `routing.py` which replica is asked, `pool.py` sends the
requests, tries again and watches the replicas' health, `weights.py` writes the folders through which weights travel.
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
from atpo_fast.engines.base import CheckedEngine, Completion, Request, TurnKey
from atpo_fast.engines.server.pool import ReplicaPool
from atpo_fast.engines.server.protocol import Answer, ServerError, read_answer, refuse_truncation, request_body
from atpo_fast.engines.server.weights import folder_weights, shared_outcome, write_weights
from atpo_fast.engines.stops import folder_generation
from atpo_fast.engines.weight_stream import parameter_shapes

_POLL_SECONDS = 0.01  # longest wait of a poll: tools' answers have to be looked at as well
_CLOSE_SECONDS = 10.0


class ServerEngine(CheckedEngine):
    """The engine that asks running servers for completions; see `Engine` for the methods.

    Several ranks may share the servers: rank 0 writes new weights as a folder into `config.weights_dir`, a bucket at a
    time, and each server loads it; one that is down loads it when it comes back. `update_weights` is then a collective
    of the ranks, and raises ServerError where a server cannot load the weights or none is up, OSError where the folder
    cannot be written, and RuntimeError on the other ranks when rank 0 failed. With `config.sleep` the servers free
    their GPUs' memory while this engine sleeps. The servers' counts of cached tokens (vLLM:
    `--enable-prompt-tokens-details`) fill `counters.cache_hit_tokens`; without them every prompt token counts as
    prefilled.

    Args:
        folder: Hugging Face folder of the served model. With `config.weights_dir` the servers are given its weights;
            without, they must serve it already, and only its configuration is read.
        tokenizer: gives the end-of-sequence ids and the text of tokens, for stop strings.
        config: addresses and options.
        temperature: the sampling temperature of the requests to come.

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
        self._model_config = AutoConfig.from_pretrained(folder)
        vocab_size = self._model_config.get_text_config().vocab_size
        super().__init__(tokenizer, vocab_size, parameter_shapes(self._model_config), folder_generation(folder))
        self._missing = frozenset(self.missing_ids.tolist())
        self.config, self.bucket_bytes = config, config.bucket_mb << 20
        self._futures: dict[TurnKey, Future[Answer]] = {}  # answers of the requests in flight
        self._finished: SimpleQueue[tuple[TurnKey, Future[Answer]]] = SimpleQueue()
        self._weights_awake = True
        self._updates = 0  # times that the servers were given weights
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self._thread = EventLoopThread("server-engine")
        self._pool = ReplicaPool(config, _headers(config), temperature)
        try:
            self._run(self._pool.open())
            self.max_positions = self._pool.max_positions
            if config.weights_dir is not None:
                self._push(folder_weights(folder) if self._writes else ())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop what is in flight, close all connections and end the thread."""
        super().close()
        with suppress(Exception):
            self._thread.submit(self._pool.close()).result(_CLOSE_SECONDS)
        self._thread.close()

    # Generation

    def _check(self, request: Request) -> None:
        refuse_truncation(request)

    def _begin(self, request: Request, forwarded: int) -> None:
        key, stops = request.turn_key, self.stops.table(request.sampling.stop)

        def read(answer: Any) -> Answer:
            return read_answer(answer, request, stops, self.eos_ids, self._missing)

        body = request_body(request, self.eos_ids)
        future = self._thread.submit(self._pool.complete(key[0], f"turn {key}", body, read))
        self._futures[key] = future
        future.add_done_callback(lambda done: self._finished.put((key, done)))

    def _advance(self) -> list[tuple[TurnKey, Completion]]:
        """Return the completions that have come, after a wait of some milliseconds for the first.

        Raises:
            ServerError: a request failed for good, or is refused.
        """
        done: list[tuple[TurnKey, Completion]] = []
        while True:
            try:
                key, future = self._finished.get(block=not done, timeout=_POLL_SECONDS)
            except Empty:
                return done
            if self._futures.get(key) is not future:
                continue  # dropped meanwhile
            answer = future.result()
            del self._futures[key]
            prompt = len(self.in_flight[key].prompt_ids)
            self.counters.count_completion(prompt, answer.cached_tokens, len(answer.completion.token_ids))
            done.append((key, answer.completion))

    def _cancel(self, keys: Sequence[TurnKey]) -> None:
        """Cancel requests; the servers see their connections closed."""
        for key in keys:
            if (future := self._futures.pop(key, None)) is not None:
                future.cancel()

    def _run(self, coroutine: Any) -> Any:
        """Wait for a coroutine on the loop and return its outcome; cancel it when the wait is interrupted."""
        future = self._thread.submit(coroutine)
        try:
            return future.result()
        except (KeyboardInterrupt, CancelledError):
            future.cancel()
            raise

    # Weights and memory

    def _load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
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
        """Write the weights and let the servers load them; a collective of the ranks."""
        folder = self._weights_folder(self._updates + 1)
        outcome: list[str] | Exception = []
        if self._writes:
            stream = iter(named_parameters)
            try:
                write_weights(self.checked(stream), self._model_config, folder, self.bucket_bytes)
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
        if self._writes:  # the one before may still be read by a server that comes back
            rmtree(self._weights_folder(self._updates - 2), ignore_errors=True)

    def _weights_folder(self, update: int) -> Path:
        assert self.config.weights_dir is not None
        return Path(self.config.weights_dir).resolve() / f"weights_{update:06d}"

    def _release(self, tree: Hashable) -> None:
        """Forget which replica has the tree's prefix."""
        self._thread.loop.call_soon_threadsafe(self._pool.router.forget, tree)

    def _forget_cache(self) -> None:
        """Ask the servers to reset their caches, where they have an endpoint for it."""
        self._run(self._pool.ask_all("/reset_prefix_cache"))

    def _sleep(self) -> None:
        if self.config.sleep:
            self._weights_awake = False
            self._run(self._pool.ask_all("/sleep?level=1"))

    def _wake(self) -> None:
        if self.config.sleep:
            if not self._weights_awake:
                self._run(self._pool.ask_all("/wake_up?tags=weights"))
                self._weights_awake = True
            self._run(self._pool.ask_all("/wake_up?tags=kv_cache"))


def _headers(config: ServerConfig) -> dict[str, str]:
    """Return the headers with the key that the servers ask for. Raise ServerError where its variable is not set."""
    if config.api_key_variable is None:
        return {}
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ServerError(f"the environment variable {config.api_key_variable} (engine.api_key_variable) is empty")
    return {"Authorization": f"Bearer {key}"}
