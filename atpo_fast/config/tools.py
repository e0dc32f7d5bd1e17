"""Section `tools`: what the policy can call, and the limits of a call."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.secrets import is_written_out, names_user
from atpo_fast.config.section import STRICT

BuiltinTool = Literal["search", "python"]


def check_address(key: str, url: str, instead: str) -> None:
    """Raise ValueError for an address that names a user or password, which would be saved with the configuration."""
    if names_user(url):
        raise ValueError(
            f"{key} names a user or a password, which would be saved with the configuration: use {instead}"
        )


@dataclass(config=STRICT, kw_only=True)
class MCPServerConfig:
    """A server of the Model Context Protocol: either a command to start, or an address."""

    command: list[str] = Field(default_factory=list)
    """Program and arguments of a server that is started and spoken to over its standard input and output."""
    url: str | None = None
    """Address of a running server (streamable HTTP)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the command; of the trainer's it gets only those such as PATH and HOME. A value may be
    `${NAME}`, which stands for the trainer's variable; secrets have to be written so."""
    cwd: str | None = None
    """Working directory of the command."""
    headers: dict[str, str] = Field(default_factory=dict)
    """HTTP headers, such as `{Authorization: "Bearer ${MY_TOKEN}"}`, where `${MY_TOKEN}` stands for the environment
    variable; secrets have to be written so."""
    tools: list[str] | None = None
    """Names of the tools to offer; none: all of the server's."""
    prefix: str = ""
    """Text put before the names of the tools, which are their tags."""

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server needs either a command or a url")
        for kind, given in (("env", self.env), ("headers", self.headers)):
            for name, value in given.items():
                if is_written_out(name, value):
                    raise ValueError(
                        f"{kind}.{name} of an MCP server is a secret that would be saved with the configuration: write "
                        "${NAME} in its place, and set that environment variable"
                    )
        check_address("url of an MCP server", self.url or "", "headers")


@dataclass(config=STRICT, kw_only=True)
class ToolsConfig:
    """The tools of the environment and the limits of their calls."""

    builtin: list[BuiltinTool] = Field(default_factory=lambda: list[BuiltinTool](["search"]))
    """Built-in tools offered, each called by its tag."""
    functions: list[str] = Field(default_factory=list)
    """More tools: typed Python functions (or tool objects) as package.module:function or path/to/file.py:function."""
    mcp: list[MCPServerConfig] = Field(default_factory=list)
    """More tools: those of MCP servers (needs the extra mcp)."""
    call_limit: int = Field(default=6, ge=1)
    """Number of tool calls per trajectory; the next one is answered with the published notice."""
    retries: int = Field(default=3, ge=0)
    """Number of further tries after a call that raised, timed out or answered nothing."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest time that one try may take."""
    timeouts: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Longest time of a try by tool, where it differs, such as {python: 30}."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """Wait before the second try; twice as long before each further one, 30 at most."""
    calls_per_tool: int = Field(default=32, ge=1)
    """Number of calls of one tool that run at once."""
    concurrency: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Number of calls at once by tool, where it differs, such as {search: 64, python: 2}."""
    cache: str | None = None
    """SQLite file that keeps the search's answers over runs; several runs may share it. Failures are not kept."""
    cache_mb: float = Field(default=1024.0, gt=0)
    """Size of the cache; beyond it the oldest answers are dropped."""
    published_cache: str | None = None
    """JSON file {query: formatted result} of the published code (.json or .json.gz); looked up first, never written."""
    python_memory_mb: int = Field(default=2048, ge=64)
    """Address space of each process of the python tool, and memory of all processes of a call together."""
    python_processes: int = Field(default=64, ge=1)
    """Number of processes and threads of one call of the python tool."""
    python_confinement: Literal["warn", "require"] = "warn"
    """What becomes of a run where the system does not let the python tool confine code fully. warn: it starts with a
    warning that says what does not hold. require: it does not start."""
    search_backend: Literal["bm25", "dense", "http"] = "bm25"
    """Where the search tool searches. bm25: in process over the corpus, or over `index_dir`. dense: in process over
    `index_dir`. http: a retrieval server."""
    index_dir: str | None = None
    """Index folder that `atpo-fast retriever` has built; none: the corpus is indexed in memory (bm25 only)."""
    search_url: str = "http://127.0.0.1:8000/retrieve"
    """Address of the retrieval server, asked once when a run starts. It is reached directly: the environment's proxies
    (HTTP_PROXY) are not used."""
    search_token_variable: str | None = None
    """Environment variable that holds the token that the retrieval server asks for; none: no token is sent."""
    top_k: int = Field(default=3, ge=1)
    """Number of passages per search."""
    passage_chars: int = Field(default=1000, ge=1)
    """Number of characters to which a passage is cut."""
    max_result_tokens: int = Field(default=2000, ge=16)
    """Number of tokens to which a tool result is cut."""

    def __post_init__(self) -> None:
        check_address("tools.search_url", self.search_url, "tools.search_token_variable")
        if self.search_backend == "dense" and self.index_dir is None:
            raise ValueError("tools.search_backend=dense needs tools.index_dir; build it with `atpo-fast retriever`")
