"""The replicas of a server engine: requests with retries, health checks, and the calls that go to all of them.

Everything here runs on one event loop. A failed request takes its replica out of use until a health check brings it
back. A replica that comes back may have been restarted, so it is asked again what it serves and given the weights of
the last update before it gets requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import anyio
import httpx

from atpo_fast.common.certificates import certificates
from atpo_fast.config import ServerConfig
from atpo_fast.engines.server.protocol import ServerError, TransientError, top_logprob
from atpo_fast.engines.server.routing import Replica, Router

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_HEALTH_SECONDS = 10.0  # longest wait for an answer to a health check
_ADMIN_SECONDS = 600.0  # longest wait for sleep, wake and weights
_LONGEST_BACKOFF = 30.0
_DOWN_SECONDS = 1.0  # between checks of a replica that is down
_OPENING_SECONDS = 0.02
_PROBE_SECONDS = 15  # between the kernel's probes of a silent connection: a machine that vanishes closes none
_PROBES = 4  # unanswered ones that end the connection
_DEV_MODE = "start vLLM with VLLM_SERVER_DEV_MODE=1, in a network where nobody else reaches it"


class ReplicaPool:
    """The replicas of `config.urls`: requests with retries, and health checks.

    Args:
        config: addresses and limits.
        headers: HTTP headers of every request.
        temperature: the sampling temperature; where it is not 1, servers have to report log-probs after it.
    """

    def __init__(self, config: ServerConfig, headers: dict[str, str], temperature: float):
        self.config, self.temperature = config, temperature
        self.router = Router([Replica(_base(url)) for url in config.urls], config.max_requests, config.affinity_slack)
        self.weights: str | None = None  # folder of the last update
        self.max_positions: int | None = None  # longest path, as the servers say
        self.missing: set[str] = set()  # endpoints that servers lack, each logged once
        self._headers = headers
        self._client: httpx.AsyncClient | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._opening = True
        self._refused: ServerError | None = None  # error of a replica that waiting cannot cure

    @property
    def replicas(self) -> list[Replica]:
        """All replicas, whether they are up or down."""
        return self.router.replicas

    async def open(self) -> None:
        """Check the replicas until each has been asked and one is up.

        Raises:
            ServerError: none has come up in time, or one cannot do what is needed.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        # The servers stand in the cluster: the environment's proxies are not used, its certificates are.
        transport = httpx.AsyncHTTPTransport(
            verify=certificates(trust_env=True), limits=limits, socket_options=_socket_options()
        )
        self._client = httpx.AsyncClient(transport=transport, timeout=timeout, headers=self._headers)
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        while not all(replica.asked for replica in self.replicas) or not any(replica.up for replica in self.replicas):
            if self._refused is not None:
                raise self._refused
            if self._patience_is_over():
                raise ServerError(self._nobody())
            await asyncio.sleep(_OPENING_SECONDS)
        if self._refused is not None:
            raise self._refused
        self._opening = False

    async def close(self) -> None:
        """End the health checks and close all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    # Completions

    async def complete(self, tree: Hashable, name: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send one request, to other replicas where it fails, and return its answer as `read` reads it.

        Raises:
            ServerError: the servers cannot do it or refuse it, or every try failed.
        """
        avoid: Replica | None = None
        for tried in range(self.config.retries + 1):
            if tried:
                await asyncio.sleep(min(self.config.backoff_seconds * 2 ** (tried - 1), _LONGEST_BACKOFF))
            replica = await self.router.place(tree, avoid)
            try:
                body["model"] = replica.model
                return read(await self._ask(replica, "/v1/completions", body, self.config.timeout_seconds))
            except TransientError as error:
                problem, avoid = f"{replica.url}: {error}", replica
                if error.down:
                    self._suspect(replica, str(error))
                if error.redraw:
                    body["seed"] = (body["seed"] + 1) % 2**63
            except ServerError as error:
                raise ServerError(f"{replica.url}: {error}") from error
            finally:
                self.router.leave(replica)
        raise ServerError(f"{name} failed {self.config.retries + 1} times (engine.retries); last, {problem}")

    async def _ask(self, replica: Replica, path: str, body: Any, seconds: float, method: str = "POST") -> Any:
        """Return the JSON of an answer. Raise TransientError, and ServerError where the server refuses the request."""
        response = await self._send(replica, path, body, seconds, method)
        status = response.status_code
        if status == 429 or status >= 500:
            raise TransientError(f"HTTP {status} {_words(response)}", down=status != 429)
        if status >= 400:
            raise ServerError(f"{path} refuses the request: HTTP {status} {_words(response)}")
        try:
            return response.json()
        except ValueError as error:
            raise TransientError(f"an answer that is not JSON: {response.text[:200]!r}") from error

    async def _send(
        self, replica: Replica, path: str, body: Any, seconds: float, method: str = "POST"
    ) -> httpx.Response:
        assert self._client is not None
        try:
            with anyio.fail_after(seconds):  # `asyncio.wait_for` loses a cancellation that comes with the answer
                return await self._client.request(method, replica.url + path, json=body)
        except TimeoutError as error:
            replica.look.set()
            raise TransientError(f"no answer within {seconds:g} s") from error
        except httpx.HTTPError as error:
            words = str(error) or "the connection was lost"
            raise TransientError(f"{type(error).__name__}: {words}", down=True) from error

    # Health

    async def _watch(self, replica: Replica) -> None:
        """Check one replica for ever: set it up when it answers, and down when it does not."""
        while True:
            replica.look.clear()
            try:
                await self._check(replica)
            except Exception as error:
                self._out(replica, error)
            replica.asked = True
            if self._patience_is_over():
                self.router.give_up(self._nobody())
            wait = self.config.health_seconds if replica.up else min(_DOWN_SECONDS, self.config.health_seconds)
            with anyio.move_on_after(wait):
                await replica.look.wait()

    def _out(self, replica: Replica, error: Exception) -> None:
        problem = str(error) or type(error).__name__
        told = not replica.up and replica.asked and isinstance(error, TransientError)  # it has gone down already
        if problem != replica.problem and not told:
            _LOG.warning("%s is out of use: %s", replica.url, problem)
        if self._opening and isinstance(error, ServerError):
            self._refused = ServerError(f"{replica.url}: {problem}")
        self.router.set_down(replica, problem)

    async def _check(self, replica: Replica) -> None:
        response = await self._send(replica, "/health", None, _HEALTH_SECONDS, "GET")
        if response.status_code != 200:
            raise TransientError(f"/health answers HTTP {response.status_code}")
        if not replica.up:
            await self._prepare(replica)
            if replica.asked:
                _LOG.warning("%s is in use again", replica.url)
            self.router.set_up(replica)

    async def _prepare(self, replica: Replica) -> None:
        """Ask a replica what it serves, and give it the weights of the last update before it comes into use."""
        models = (await self._ask(replica, "/v1/models", None, _HEALTH_SECONDS, "GET")).get("data") or [{}]
        served = {str(model.get("id")): model for model in models}
        replica.model = self.config.model or next(iter(served))
        if replica.model not in served:
            raise ServerError(f"does not serve engine.model={replica.model!r}, but {sorted(served)}")
        longest = served[replica.model].get("max_model_len")
        if longest is not None:
            self.max_positions = min(int(longest), self.max_positions or int(longest))
        if self.weights is not None:
            await self._load_weights(replica, self.weights)
        if self.temperature != 1:
            await self._require_tempered(replica)

    async def _require_tempered(self, replica: Replica) -> None:
        """Raise ServerError where the server reports log-probs of the model's own distribution, at temperature 1."""
        body = {"model": replica.model, "prompt": [0], "max_tokens": 1, "logprobs": 1, "top_p": 1.0, "top_k": 0}
        at = [
            top_logprob(await self._ask(replica, "/v1/completions", body | {"temperature": t}, _ADMIN_SECONDS))
            for t in (1.0, self.temperature)
        ]
        if at[0] == at[1]:
            raise ServerError(
                f"reports log-probs before rollout.temperature={self.temperature:g}: start vLLM with "
                "--logprobs-mode processed_logprobs"
            )

    def _suspect(self, replica: Replica, problem: str) -> None:
        """Take a replica out of use until its health has been checked."""
        if replica.up:
            self._out(replica, TransientError(problem))
            replica.look.set()

    def _patience_is_over(self) -> bool:
        since = self.router.down_since
        return since is not None and time.monotonic() - since > self.config.patience_seconds

    def _nobody(self) -> str:
        problems = "; ".join(f"{replica.url}: {replica.problem}" for replica in self.replicas)
        return (
            f"no server was up for {self.config.patience_seconds:g} s (engine.patience_seconds): {problems}. "
            "Check engine.urls"
        )

    # Calls to all replicas

    async def ask_all(self, path: str, replicas: Iterable[Replica] | None = None) -> None:
        """POST to every replica that is up; an endpoint that one lacks is logged once, and not asked again."""
        up = [replica for replica in replicas or self.replicas if replica.up]
        await asyncio.gather(*(self._ask_optional(replica, path) for replica in up))

    async def _ask_optional(self, replica: Replica, path: str) -> None:
        endpoint = path.partition("?")[0]
        if endpoint in self.missing:
            return
        try:
            response = await self._send(replica, path, None, _ADMIN_SECONDS)
        except TransientError as error:
            self._suspect(replica, str(error))
            return
        if response.status_code in (404, 405) and endpoint not in self.missing:
            self.missing.add(endpoint)
            _LOG.warning("%s has no %s: it is not used; for it, %s", replica.url, endpoint, _DEV_MODE)
        elif response.status_code >= 400:
            raise ServerError(f"{replica.url}{path} failed: HTTP {response.status_code} {_words(response)}")

    async def update_weights(self, folder: str) -> list[str]:
        """Let all replicas load the weights in `folder`; return the addresses of those that have.

        A replica that is down, or goes down meanwhile, loads them when it comes back.

        Raises:
            ServerError: a replica refuses, or none is up.
        """
        self.weights = folder
        up = [replica for replica in self.replicas if replica.up]
        outcomes = await asyncio.gather(
            *(self._load_weights(replica, folder) for replica in up), return_exceptions=True
        )
        for replica, outcome in zip(up, outcomes, strict=True):
            if isinstance(outcome, TransientError):
                self._suspect(replica, str(outcome))
            elif isinstance(outcome, BaseException):
                raise ServerError(f"{replica.url}: {outcome}") from outcome
        loaded = [r.url for r, outcome in zip(up, outcomes, strict=True) if outcome is None]
        if not loaded:
            raise ServerError(f"no server has taken the new weights: {self._nobody()}")
        return loaded

    async def weights_are(self, folder: str, urls: Sequence[str]) -> None:
        """Note that another process has let the replicas at `urls` load `folder`; the others load it before use."""
        self.weights = folder
        for replica in self.replicas:
            if replica.url not in urls:
                self._suspect(replica, "it has not taken the last weights")

    async def _load_weights(self, replica: Replica, folder: str) -> None:
        """Let a replica load weights and forget its cache, which holds keys and values of the old ones."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}, "timeout": _ADMIN_SECONDS}
        response = await self._send(replica, "/collective_rpc", body, _ADMIN_SECONDS)
        if response.status_code in (404, 405):
            raise ServerError(f"it has no /collective_rpc, so it cannot be given weights: {_DEV_MODE}")
        if response.status_code >= 400:
            raise ServerError(
                f"it could not load the weights in {folder} (HTTP {response.status_code} {_words(response)}): it must "
                "be vLLM >=0.24 and see this folder under the same path (engine.weights_dir); after a failure "
                "it has to be restarted"
            )
        await self._ask_optional(replica, "/reset_prefix_cache")


def _socket_options() -> list[tuple[int, int, int]]:
    """Return the options with which the kernel finds out that a server's machine has vanished.

    A server that is only slow stays connected: its kernel answers the probes.
    """
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if sys.platform == "linux":
        options += [(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)]
        options += [(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)]
        options += [(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)]
        unanswered = 1000 * _PROBE_SECONDS * (1 + _PROBES)  # milliseconds, for data on its way, which stops the probes
        options += [(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unanswered)]
    return options


def _base(url: str) -> str:
    """Strip from an address what the paths begin with."""
    return url.rstrip("/").removesuffix("/v1")


def _words(response: httpx.Response) -> str:
    """Shorten the text of an error's answer."""
    text = " ".join(response.text.split())
    return text if len(text) <= 300 else text[:300] + " …"
