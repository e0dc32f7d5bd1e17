"""An MCP server without the package `mcp`, whose import takes a second: its messages are written out, one JSON a line.

It speaks an older version of the protocol than `mcp_server.py`, and has some of the same tools.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

VERSION = "2025-06-18"
NUMBERS = {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}}
TEXT = {"text": {"type": "string"}}
TOOLS = {
    "add": ("Adds two numbers.", NUMBERS, ["a"]),
    "shout": ("Says it louder.", TEXT, ["text"]),
    "die": ("Ends the server.", TEXT, ["text"]),
    "process.id": ("The server's process.", TEXT, ["text"]),
}


def call(name: str, arguments: dict[str, Any]) -> str:
    """Return what a tool answers."""
    if name == "add":
        a, b = arguments["a"], arguments.get("b", 1)
        return f"{a} + {b} = {a + b}"
    if name == "die":
        os._exit(3)
    return str(os.getpid()) if name == "process.id" else str(arguments["text"]).upper()


def result(method: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a request; none: the method is not known."""
    if method == "initialize":
        about = {"name": "written", "version": "1"}
        return {"protocolVersion": VERSION, "capabilities": {"tools": {}}, "serverInfo": about}
    if method == "tools/list":
        schemas = {
            name: {"type": "object", "properties": properties, "required": required}
            for name, (_, properties, required) in TOOLS.items()
        }
        tools = [{"name": name, "description": TOOLS[name][0], "inputSchema": schemas[name]} for name in TOOLS]
        return {"tools": tools}
    if method == "tools/call":
        text = call(parameters["name"], parameters["arguments"])
        return {"content": [{"type": "text", "text": text}], "isError": False}
    return None


def main() -> None:
    """Answer requests until the client closes the pipe; notifications have no number and no answer."""
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        found = result(message["method"], message.get("params", {}))
        answer = {"error": {"code": -32601, "message": "no such method"}} if found is None else {"result": found}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}), flush=True)


if __name__ == "__main__":
    main()
