"""A retrieval server on this machine, for the tests of its protocol, its limits and its clients."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from typing import Any

from atpo_fast.retrieval import Retriever
from atpo_fast.retrieval.server import listen, make_app, serve


class Running:
    """A server in a thread, which ends with the tests' process."""

    def __init__(self, retriever: Retriever, **options: Any) -> None:
        bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        ready = threading.Event()
        app = make_app(retriever, **options)
        arguments = (app, bound, ready.set, options.get("limits"))
        threading.Thread(target=serve, args=arguments, daemon=True).start()
        assert ready.wait(120)

    def post(self, body: Any) -> Any:
        """The answer to a body: (status, JSON)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/retrieve", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null") if "json" in error.headers["Content-Type"] else None
