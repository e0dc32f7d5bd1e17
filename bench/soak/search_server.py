"""The retrieval server of a soak: the package's own, with a share of its answers spoilt.

    python -m bench.soak.search_server CORPUS --port PORT --share FILE --seed SEED

FILE holds the share of searches that fail, and is read for each. What becomes of such a one is drawn: status 503, a
text that is no JSON, hits without documents, or no answer until the client leaves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from atpo_fast.commands.launcher import free_port
from atpo_fast.data.questions import Passage
from atpo_fast.retrieval import BM25Settings, build_index, open_index
from atpo_fast.retrieval.server import listen, make_app, serve
from bench.soak.job import ROOT

_START_SECONDS = 600.0
_ANSWERS = {"refused": (503, b"{}"), "no JSON": (200, b"<html>"), "no documents": (200, b'{"result": [[{}]]}')}
_SILENT = "silent"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class SearchServer:
    """The server as a process that can be killed and started again at the same address.

    Args:
        folder: folder for its corpus, its index and its output.
        passages: what it finds.
        seed: seed of what becomes of spoilt searches.
    """

    def __init__(self, folder: Path, passages: Iterable[Passage], seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._port, self._seed, self._starts = folder, free_port(), seed, 0
        lines = [json.dumps({"id": passage.id, "contents": passage.contents}) for passage in passages]
        (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
        self.spoil(0.0)
        self.process = self.start()

    def __enter__(self) -> SearchServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Address for `tools.search_url`."""
        return f"http://127.0.0.1:{self._port}/retrieve"

    def start(self) -> psutil.Popen:
        """Start the server, and wait until it answers."""
        self._starts += 1
        words = [str(self._folder / "corpus.jsonl"), f"--port={self._port}", f"--share={self._folder / 'share'}"]
        command = [sys.executable, "-m", "bench.soak.search_server", *words, f"--seed={self._seed + self._starts}"]
        with (self._folder / "output").open("ab") as output:
            self.process = psutil.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the search server does not start; see {self._folder / 'output'}")
            time.sleep(0.2)
        return self.process

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def spoil(self, share: float) -> None:
        """Let a share of the searches fail from now on."""
        partial = self._folder / "share.new"
        partial.write_text(str(share))
        partial.replace(self._folder / "share")

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url.replace("/retrieve", "/health"), trust_env=False).is_success
        except httpx.HTTPError:
            return False


class Spoilt:
    """An ASGI application that spoils a share of the searches that another one answers."""

    def __init__(self, app: App, share: Path, seed: int):
        self._app, self._share, self._random = app, share, random.Random(seed)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or spoil its answer."""
        search = scope["type"] == "http" and scope["path"] == "/retrieve"
        if not search or self._random.random() >= float(self._share.read_text()):
            await self._app(scope, receive, send)
            return
        how = self._random.choice([*_ANSWERS, _SILENT])
        while how == _SILENT and (await receive())["type"] != "http.disconnect":
            pass
        status, body = _ANSWERS.get(how, (503, b""))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Build the index where there is none, and serve it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--share", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    index = options.corpus.with_name("index")
    build_index(index, [str(options.corpus)], BM25Settings())
    app = make_app(open_index(index))
    app.add_middleware(Spoilt, share=options.share, seed=options.seed)
    serve(app, listen("127.0.0.1", options.port), lambda: None)


if __name__ == "__main__":
    main()
