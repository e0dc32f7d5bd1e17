"""A completions server for tests: the part of vLLM's HTTP interface that the server engine uses, around a real model.

It decodes with plain forwards of a Hugging Face model and draws as the paged engine does, so that both engines
give the same trees. `CompletionsServer.fault` decides for each request how it fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors.torch import load_file
from starlette.concurrency import run_in_threadpool
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atpo_fast.engines.sampling import SamplingTable, sample, uniforms
from atpo_fast.retrieval.server import listen
from tests.helpers.network import Host

_ANSWERS: dict[tuple[object, ...], str] = {}
"""What a model has written (JSON), by the digest of its weights, its tokenizer, what rules its draws, and the request:
many tests ask servers of one model the same."""

Fault = str | None  # "500", "429", "slow", "cut", "garbage", "no_ids", "no_logprobs"


class CompletionsServer:
    """One replica, in a thread of its own; use it as a context manager.

    Args:
        model: what it serves; the weights it is started with come back with every `start`.
        fault: what goes wrong with the n-th request since the beginning (from 0).
        dev_mode: offer the endpoints for weights, cache and sleep.
        host: where it listens; None: at the loopback address.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        *,
        fault: Callable[[int], Fault] = lambda number: None,
        dev_mode: bool = True,
        processed_logprobs: bool = True,
        max_model_len: int = 512,
        host: Host | None = None,
    ):
        self.make_model, self.tokenizer, self.fault = model, tokenizer, fault
        self.dev_mode, self.processed_logprobs, self.max_model_len = dev_mode, processed_logprobs, max_model_len
        self.bodies: list[dict[str, Any]] = []  # of completions asked for
        self.askers: list[str] = []  # addresses that they came from
        self.sampled_rows: int | None = None  # tokens are sampled from the first so many rows; None: from all
        self.running = self.most_running = 0
        self.called: list[str] = []  # other endpoints, with what they were given
        self.healthy = True
        self.slow_seconds = 600.0
        self.held = self.ever_held = 0  # requests that wait to be answered slowly; those that ever did
        self.on_change: Callable[[], None] = lambda: None  # called when one is held, and when one has been answered
        self.port, self.host = 0, host
        self._compute = threading.Lock()
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self.host.address if self.host else '127.0.0.1'}:{self.port}"

    def __enter__(self) -> CompletionsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start, on the same port as before."""
        self.model = self.make_model().eval()
        self._weights = _digest(self.model)
        self.cached: list[list[int]] = []  # token ids whose prefixes are in the cache
        with self.host.entered() if self.host else nullcontext():  # a socket stays where it was made
            bound = listen(self.host.address if self.host else "127.0.0.1", self.port)
        self.port = bound.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="critical", lifespan="off"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(bound,), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def kill(self) -> None:
        """End at once: connections are cut, and nobody listens any more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cut)
            self._thread.join(timeout=120)
            assert not self._thread.is_alive()

    def _run(self, bound: socket) -> None:
        self._loop.run_until_complete(self._server.serve([bound]))
        self._loop.close()

    def _cut(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:  # type: ignore[union-attr]
                connection.transport.abort()  # type: ignore[union-attr]
        for task in list(self._server.server_state.tasks):
            task.cancel()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> Response:
            return Response(status_code=200 if self.healthy else 503)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "tiny", "max_model_len": self.max_model_len}]}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            self.askers.append(request.client.host if request.client else "")
            return await self._complete(await request.json())

        if self.dev_mode:

            @app.post("/{endpoint}")
            async def other(endpoint: str, request: Request) -> Response:
                body = await request.body()
                self.called.append(f"{endpoint}?{request.url.query}" if request.url.query else endpoint)
                if endpoint == "collective_rpc":
                    return self._reload(json.loads(body))
                if endpoint == "reset_prefix_cache":
                    self.cached.clear()
                return JSONResponse({"success": True})

        return app

    def _reload(self, body: dict[str, Any]) -> Response:
        folder = Path(body["kwargs"]["weights_path"])
        if body["method"] != "reload_weights" or not folder.is_dir():
            return JSONResponse({"error": f"no weights in {folder}"}, status_code=500)
        parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        state = {name: tensor for part in parts for name, tensor in part.items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self.model.tie_weights()
        self._weights = _digest(self.model)
        return JSONResponse({"results": [None]})

    async def _complete(self, body: dict[str, Any]) -> Response:
        self.bodies.append(body)
        fault = self.fault(len(self.bodies) - 1)
        if fault in ("500", "429"):
            return JSONResponse({"error": {"message": "out of order"}}, status_code=int(fault))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if fault == "slow":
                await self._hold()
            answer = await run_in_threadpool(self._decode, body)
        finally:
            self.running -= 1
            self.on_change()
        (choice,) = answer["choices"]
        if fault == "no_ids":
            choice["token_ids"] = choice["prompt_token_ids"] = None
            choice["logprobs"]["tokens"] = ["word"] * len(choice["logprobs"]["tokens"])
        if fault == "no_logprobs":
            choice["logprobs"] = None
        text = json.dumps(answer)
        if fault == "garbage":
            return Response("<html>bad gateway</html>", media_type="text/html")
        if fault == "cut":
            return StreamingResponse(_half(text), media_type="application/json")
        return Response(text, media_type="application/json")

    async def _hold(self) -> None:
        self.held += 1
        self.ever_held += 1
        self.on_change()
        try:
            await asyncio.sleep(self.slow_seconds)
        finally:
            self.held -= 1

    def _decode(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request; text is what the same weights wrote before, where they were asked the same."""
        with self._compute:
            ids = list(body["prompt"])
            known = max((_shared(ids, other) for other in self.cached), default=0)
            rules = self._weights, self.tokenizer, self.sampled_rows, self.processed_logprobs
            asked = *rules, json.dumps(body, sort_keys=True)
            if asked not in _ANSWERS:
                _ANSWERS[asked] = json.dumps(self._write(body))
            choice = json.loads(_ANSWERS[asked])
            self.cached += [ids, ids + [int(name.partition(":")[2]) for name in choice["logprobs"]["tokens"]]]
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": known}}}

    @torch.inference_mode()
    def _write(self, body: dict[str, Any]) -> dict[str, Any]:
        """Token after token, with a whole forward for each; text is decoded to look for stop strings, as vLLM does."""
        ids = list(body["prompt"])
        temperature = float(body["temperature"])
        table = SamplingTable(np.array([temperature]), np.array([0]), np.array([1.0]))
        seed = np.array([body.get("seed", 0)], dtype=np.uint64)
        written: list[int] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        finish, cause = "length", None
        while len(written) < body["max_tokens"]:
            logits = self.model(torch.tensor([ids + written])).logits[:, -1]
            if self.sampled_rows is not None:
                logits[:, self.sampled_rows :] = -torch.inf
            draw = sample(logits, uniforms(seed, np.array([len(written)])), table)
            token = int(draw.tokens[0])
            scaled = logits / (temperature or 1.0) if self.processed_logprobs else logits
            reported = torch.log_softmax(scaled, dim=-1)[0]
            written.append(token)
            logprobs.append(float(reported[token]))
            likeliest = reported.topk(min(body["logprobs"], len(reported)))
            listed = [(token, logprobs[-1]), *zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)]
            tops.append({f"token_id:{candidate}": value for candidate, value in listed})
            text = self.tokenizer.decode(written, skip_special_tokens=body.get("skip_special_tokens", True))
            found = [stop for stop in body.get("stop", []) if stop in text]
            if found or token in body.get("stop_token_ids", []):
                finish, cause = "stop", found[0] if found else token
                break
        names = [f"token_id:{token}" for token in written]
        return {
            "index": 0,
            "text": "",
            "finish_reason": finish,
            "stop_reason": cause,
            "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops},
            "token_ids": written if body.get("return_token_ids") else None,
            "prompt_token_ids": ids if body.get("return_token_ids") else None,
        }


async def _half(text: str) -> AsyncIterator[bytes]:
    yield text[: len(text) // 2].encode()
    raise ConnectionResetError


def _digest(model: PreTrainedModel) -> str:
    found = hashlib.sha256(model.config.to_json_string().encode())
    for value in model.state_dict().values():
        found.update(value.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _shared(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
