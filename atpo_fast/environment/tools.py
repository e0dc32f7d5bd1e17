"""The configured tools, put into a tool box."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from typing_extensions import assert_never

from atpo_fast.common.errors import ConfigError, ToolFailureError
from atpo_fast.config import ToolsConfig
from atpo_fast.config.tools import BuiltinTool
from atpo_fast.data.questions import Passage
from atpo_fast.environment.arguments import JsonSchema
from atpo_fast.environment.descriptions import tool_schema
from atpo_fast.environment.function_tool import load_tool
from atpo_fast.environment.python_tool import HOW_TO_CONFINE, PythonTool
from atpo_fast.environment.result_cache import CachedTool, ResultCache, read_published_cache
from atpo_fast.environment.search import BM25Search, HTTPSearch, IndexSearch
from atpo_fast.environment.toolbox import Tool, ToolBox, ToolResult

__all__ = ["Tool", "ToolBox", "ToolResult", "make_toolbox"]

_LOG = logging.getLogger(__name__)
CHARS_PER_TOKEN = 16  # far above what tokenizers reach on text: cutting here never shortens a result that would fit
_TRY_SHARE = 0.9  # share of a try's time: code and servers stop before the tool box does, so that it abandons no thread


def open_further_tools(tools: ToolsConfig) -> list[Tool]:
    """Open the tools beyond the built-in ones: the configured functions, and the tools of the MCP servers.

    Raises:
        ValueError: a function that cannot be used, or an MCP server that does not offer what is asked for.
        ConnectionError: an MCP server cannot be started or reached.
    """
    opened: list[Any] = []
    try:
        opened += [load_tool(path) for path in tools.functions]
        for server in tools.mcp:
            from atpo_fast.environment.mcp_tools import MCPServer

            opened += MCPServer(server, timeout_seconds=tools.timeout_seconds).tools
    except BaseException:
        close_tools(opened)
        raise
    return opened


def described_schemas(
    tools: ToolsConfig, further: Sequence[Tool], of_sessions: Sequence[JsonSchema] = ()
) -> list[JsonSchema]:
    """Return the schemas of the tools that the prompt has to describe: none unless there are further tools.

    With further tools, or tools of sessions, that is all tools but the search, which the published prompt describes
    itself.
    """
    known = [PythonTool] if "python" in tools.builtin else []
    if not further and not of_sessions:
        return []
    return [*(tool_schema(tool) for tool in (*known, *further)), *of_sessions]


def make_toolbox(tools: ToolsConfig, passages: Sequence[Passage], further: Sequence[Tool] | None = None) -> ToolBox:
    """Make the box of all configured tools.

    Args:
        tools: names, settings and limits of the tools.
        passages: what the BM25 search searches.
        further: the tools that `open_further_tools` has opened, which belong to the tool box from now on; none: they
            are opened here.

    Raises:
        ValueError: a BM25 search without passages, an index of another kind, a function or cache that cannot be used,
            or as `ToolBox`.
        FileNotFoundError: no index at `tools.index_dir`.
        ConnectionError: an MCP server cannot be started or reached.
    """
    further = open_further_tools(tools) if further is None else further
    built_in: list[Any] = []
    try:
        for name in tools.builtin:
            built_in.append(_built_in(name, tools, passages))
        return ToolBox(
            [*built_in, *further],
            retries=tools.retries,
            timeout_seconds=tools.timeout_seconds,
            workers=tools.calls_per_tool,
            max_chars=CHARS_PER_TOKEN * tools.max_result_tokens,
            backoff_seconds=tools.backoff_seconds,
            concurrency=tools.concurrency,
            timeouts=tools.timeouts,
        )
    except BaseException:
        close_tools([*built_in, *further])
        raise


def _built_in(name: BuiltinTool, tools: ToolsConfig, passages: Sequence[Passage]) -> Any:
    """Make the built-in tool of some name."""
    if name == "python":
        return _python(tools)
    if name == "search":
        return _search(tools, passages)
    assert_never(name)


def check_tools(tools: ToolsConfig) -> None:
    """Find out, before anything expensive begins, whether the search server is there and how code is confined.

    Behind a cache of results a run may do without the server: then its absence is a warning.

    Raises:
        ToolFailureError: the server does not answer, or not by the protocol; or the python tool cannot start.
        ConfigError: code cannot be confined fully where `tools.python_confinement` asks for it.
    """
    if "python" in tools.builtin:
        _check_confinement(tools)
    if "search" not in tools.builtin or tools.search_backend != "http":
        return
    with HTTPSearch(
        tools.search_url,
        top_k=tools.top_k,
        timeout_seconds=_search_seconds(tools),
        token_variable=tools.search_token_variable,
    ) as search:
        try:
            search.probe()
        except ToolFailureError as error:
            if not (tools.cache or tools.published_cache):
                raise
            _LOG.warning("%s. Only what the cache of results holds will be answered", error)


def _check_confinement(tools: ToolsConfig) -> None:
    """Start the python tool once, which warns of what does not hold. Raises as `check_tools`."""
    tool = _python(tools)
    try:
        found = tool.confinement()
    except OSError as error:
        raise ToolFailureError(f"{error}; mend it, or take python out of tools.builtin") from error
    if found.weak and tools.python_confinement == "require":
        raise ConfigError(
            "tools.python_confinement=require, but code cannot be confined fully here "
            f"({found.described(found.weak)}). {HOW_TO_CONFINE}, or take python out of tools.builtin"
        )


def close_tools(tools: Iterable[Any]) -> None:
    """Close the tools that can be closed."""
    for tool in tools:
        if hasattr(tool, "close"):
            tool.close()


def _python(tools: ToolsConfig) -> PythonTool:
    return PythonTool(
        timeout_seconds=_TRY_SHARE * tools.timeouts.get("python", tools.timeout_seconds),
        memory_mb=tools.python_memory_mb,
        processes=tools.python_processes,
    )


def _search(tools: ToolsConfig, passages: Sequence[Passage]) -> Any:
    """Make the search tool, behind its caches."""
    tool: Any
    settings: dict[str, Any] = {"top_k": tools.top_k, "passage_chars": tools.passage_chars}
    if tools.search_backend == "http":
        tool = HTTPSearch(
            tools.search_url,
            top_k=tools.top_k,
            passage_chars=tools.passage_chars,
            timeout_seconds=_search_seconds(tools),
            token_variable=tools.search_token_variable,
        )
        settings["url"] = tools.search_url
    elif tools.index_dir is not None:
        tool = IndexSearch.open(
            tools.index_dir, kind=tools.search_backend, top_k=tools.top_k, passage_chars=tools.passage_chars
        )
        settings["index"] = str(Path(tools.index_dir).resolve())
    else:
        tool = BM25Search(passages, top_k=tools.top_k, passage_chars=tools.passage_chars)
        if tools.cache:
            settings["corpus"] = _digest(passages)
    if not (tools.cache or tools.published_cache):
        return tool
    return CachedTool(
        tool,
        ResultCache(tools.cache, max_mb=tools.cache_mb) if tools.cache else None,
        settings=settings,
        published=read_published_cache(tools.published_cache) if tools.published_cache else None,
    )


def _search_seconds(tools: ToolsConfig) -> float:
    return _TRY_SHARE * tools.timeouts.get("search", tools.timeout_seconds)


def _digest(passages: Sequence[Passage]) -> str:
    """Return a digest that distinguishes one corpus from another."""
    digest = blake2b(digest_size=16)
    for passage in passages:
        digest.update(passage.contents.encode(errors="surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()
