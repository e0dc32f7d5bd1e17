"""Tools of MCP servers: programs that speak the Model Context Protocol over pipes or HTTP (package `mcp`)."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from atpo_fast.common.event_loop import EventLoopThread
from atpo_fast.common.secrets import filled_in
from atpo_fast.config import MCPServerConfig
from atpo_fast.environment.arguments import ArgumentError, SchemaArguments
from atpo_fast.environment.function_tool import ToolError

_LOG = logging.getLogger(__name__)
_RESTART_SECONDS = 60.0
_MAX_PAGES = 100


class MCPServer:
    """A connection to one server, on a thread of its own, and the tools that it offers.

    A server that dies fails the calls in flight and is started again by the next call, at most once in
    `restart_seconds`; until then its calls are answered as failed.

    Raises:
        ValueError: the package `mcp` is not installed, a tool that the configuration names is not offered, two tools
            get the same tag, or an environment variable that `${NAME}` stands for is not set.
        ConnectionError: the server cannot be started or reached.
    """

    def __init__(
        self, config: MCPServerConfig, *, timeout_seconds: float = 120.0, restart_seconds: float = _RESTART_SECONDS
    ) -> None:
        try:
            import mcp
        except ImportError as error:
            raise ValueError("tools.mcp needs the package `mcp`: pip install 'atpo-fast[mcp]'") from error
        self._mcp = mcp
        self._config = config
        self.where = f"MCP server {config.url or ' '.join(config.command)}"
        self._env = _filled_in(config.env, f"{self.where}: env")
        self._headers = _filled_in(config.headers, f"{self.where}: headers")
        self._timeout_seconds = timeout_seconds
        self._restart_seconds = restart_seconds
        self._restarted = float("-inf")
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()
        self._thread = EventLoopThread(self.where)
        try:
            offered = self._thread.submit(self._open()).result()
            self.tools = [MCPTool(self, tool, config.prefix) for tool in self._chosen(offered)]
        except BaseException:
            self.close()
            raise

    def call(self, name: str, arguments: dict[str, Any]) -> Future[str]:
        """Call a tool. The future fails with ConnectionError (server dead) or ToolError (the tool's own failure)."""
        return self._thread.submit(self._call(name, arguments))

    def close(self) -> None:
        """End the connection, and the server if it was started here."""
        if not self._thread.loop.is_closed():
            self._thread.submit(self._close()).result()
        self._thread.close()

    def _chosen(self, offered: list[Any]) -> list[Any]:
        wanted = self._config.tools
        if wanted is None:
            return offered
        by_name = {tool.name: tool for tool in offered}
        if missing := [name for name in wanted if name not in by_name]:
            raise ValueError(f"{self.where}: no tools {', '.join(missing)}; it offers {', '.join(by_name)}")
        return [by_name[name] for name in wanted]

    async def _open(self) -> list[Any]:
        self._connection = _Connection(self._transport(), self._mcp, self._timeout_seconds)
        try:
            return await asyncio.wait_for(asyncio.shield(self._connection.opened), self._timeout_seconds)
        except Exception as error:
            await self._close()
            raise ConnectionError(f"{self.where} cannot be used: {_reason(error)}") from error

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _transport(self) -> AbstractAsyncContextManager[Any]:
        config = self._config
        if config.command:
            parameters = self._mcp.StdioServerParameters(
                command=config.command[0], args=config.command[1:], env=self._env, cwd=config.cwd
            )
            return self._mcp.stdio_client(parameters)
        return _http_transport(str(config.url), self._headers)

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        import mcp_types

        connection = await self._ready()
        try:
            result = await connection.client.call_tool(name, arguments)
        except self._mcp.MCPError as error:
            if error.code in (mcp_types.INVALID_PARAMS, mcp_types.METHOD_NOT_FOUND):
                raise ToolError(f"Tool({name}) failed: {error}") from error
            if error.code not in (mcp_types.CONNECTION_CLOSED, mcp_types.INVALID_REQUEST):  # the latter: a lost session
                raise
            connection.dead = True
            raise ConnectionError("the MCP server died during the call") from error
        except Exception as error:  # of the transport
            connection.dead = True
            raise ConnectionError(f"the MCP server was lost: {_reason(error)}") from error
        text = _text(result)
        if result.is_error:
            raise ToolError(f"Tool({name}) failed: {text}")
        return text

    async def _ready(self) -> _Connection:
        """Return a connection that is not known to be dead; open a new one where there is none."""
        async with self._opening:
            if self._connection is None or self._connection.dead:
                if time.monotonic() - self._restarted < self._restart_seconds:
                    raise ConnectionError("the MCP server died again soon after it was started again")
                self._restarted = time.monotonic()
                _LOG.warning("%s died and is started again", self.where)
                await self._close()
                try:
                    await self._open()
                except ConnectionError as error:
                    _LOG.warning("%s", error)
                    raise ConnectionError("the MCP server died and cannot be started again") from error
            assert self._connection is not None
            return self._connection


class _Connection:
    """One session. All of it lives in one task, as the protocol's library asks for."""

    def __init__(self, transport: AbstractAsyncContextManager[Any], mcp: Any, timeout_seconds: float) -> None:
        self.dead = False
        self.opened: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.client: Any = None
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._live(transport, mcp, timeout_seconds))

    async def _live(self, transport: AbstractAsyncContextManager[Any], mcp: Any, timeout_seconds: float) -> None:
        try:
            async with mcp.Client(transport, read_timeout_seconds=timeout_seconds) as client:
                self.client = client
                tools = await _list_tools(client)
                if not self.opened.done():
                    self.opened.set_result(tools)
                await self._stop.wait()
        except Exception as error:
            if not self.opened.done():
                self.opened.set_exception(error)
        finally:
            self.dead = True
            self.opened.cancel()

    async def close(self) -> None:
        self._stop.set()
        await asyncio.wait([self._task], timeout=5.0)
        self._task.cancel()
        if self.opened.done() and not self.opened.cancelled():
            self.opened.exception()  # looked at


class MCPTool:
    """One tool of a server. Its tag is the server's name for it, with `_` for what a tag cannot hold."""

    def __init__(self, server: MCPServer, tool: Any, prefix: str) -> None:
        self.name = prefix + re.sub(r"[^\w-]", "_", tool.name)
        self.description = tool.description or tool.title or ""
        self._server = server
        self._tool_name = tool.name
        self._arguments = SchemaArguments(tool.input_schema)
        self.parameters = self._arguments.schema

    async def __call__(self, argument: str) -> str:
        """Return the tool's answer. Raises ToolError for an argument that does not fit; else as `MCPServer.call`."""
        try:
            arguments = self._arguments.parse(argument)
        except ArgumentError as error:
            raise ToolError(f"Tool({self.name}) was not called: {error}") from None
        return await asyncio.wrap_future(self._server.call(self._tool_name, arguments))

    def close(self) -> None:
        """Close the server's connection, which all of its tools share."""
        self._server.close()


def _http_transport(url: str, headers: dict[str, str]) -> AbstractAsyncContextManager[Any]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    stack = AsyncExitStack()

    class Transport(AbstractAsyncContextManager[Any]):
        async def __aenter__(self) -> Any:
            timeout = httpx2.Timeout(30.0, read=300.0)
            # Such a server may be anywhere, so the environment's proxies are used, NO_PROXY excepted (trust_env).
            client = await stack.enter_async_context(
                httpx2.AsyncClient(headers=headers, timeout=timeout, trust_env=True)
            )
            return await stack.enter_async_context(streamable_http_client(url, http_client=client))

        async def __aexit__(self, *exception: Any) -> bool | None:
            return await stack.__aexit__(*exception)

    return Transport()


async def _list_tools(client: Any) -> list[Any]:
    """Return all tools of a server, which sends them page by page."""
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
    return tools


def _text(result: Any) -> str:
    """Return the text of an answer; contents of other kinds are only named."""
    parts = [block.text if block.type == "text" else f"[{block.type} left out]" for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [str(result.structured_content)]
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """Return what went wrong, taken out of the exception groups that the protocol's library makes."""
    while isinstance(getattr(error, "exceptions", None), tuple | list) and error.exceptions:  # type: ignore[attr-defined]
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _filled_in(values: dict[str, str], where: str) -> dict[str, str]:
    """Fill environment variables into the values. Raise ValueError where one is not set."""
    try:
        return {name: filled_in(value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}; set it") from None
