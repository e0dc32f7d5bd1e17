"""A small MCP server over standard input and output, for the tests of the adapter."""

from __future__ import annotations

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("test")


@server.tool()
def add(a: int, b: int = 1) -> str:
    """Adds two numbers."""
    return f"{a} + {b} = {a + b}"


@server.tool()
def shout(text: str) -> str:
    """Says it louder."""
    return text.upper()


@server.tool()
def fail(text: str) -> str:
    """Cannot do it."""
    raise ValueError(f"cannot do {text}")


@server.tool()
def die(text: str) -> str:
    """Ends the server."""
    os._exit(3)


@server.tool(name="process.id")
def process_id(text: str) -> str:
    """The server's process."""
    return str(os.getpid())


@server.tool()
def wait(seconds: float, then: str) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return then


if __name__ == "__main__":
    if "--http" in sys.argv:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[-1]))
    else:
        server.run("stdio")
