"""What the policy acts in: the tag protocol, the tools and their running."""

from atpo_fast.environment.descriptions import describe_in_words, describe_tools, tool_schema
from atpo_fast.environment.escaping import Escaper
from atpo_fast.environment.function_tool import FunctionTool, ToolError
from atpo_fast.environment.python_tool import PythonTool
from atpo_fast.environment.result_cache import CachedTool, ResultCache
from atpo_fast.environment.search import BM25Search, HTTPSearch, IndexSearch
from atpo_fast.environment.session import ForkError, Result, Session, SessionLostError
from atpo_fast.environment.tags import (
    CALL_LIMIT_NOTICE,
    TAGS,
    TagVocabulary,
    ToolCall,
    escape_tags,
    format_result,
    parse_call,
    unescape_tags,
)
from atpo_fast.environment.tool_watch import ToolCounts, ToolWatch
from atpo_fast.environment.toolbox import Tool, ToolBox, ToolResult
from atpo_fast.environment.tools import check_tools, close_tools, described_schemas, make_toolbox, open_further_tools

__all__ = [
    "CALL_LIMIT_NOTICE",
    "TAGS",
    "BM25Search",
    "CachedTool",
    "Escaper",
    "ForkError",
    "FunctionTool",
    "HTTPSearch",
    "IndexSearch",
    "PythonTool",
    "Result",
    "ResultCache",
    "Session",
    "SessionLostError",
    "TagVocabulary",
    "Tool",
    "ToolBox",
    "ToolCall",
    "ToolCounts",
    "ToolError",
    "ToolResult",
    "ToolWatch",
    "check_tools",
    "close_tools",
    "describe_in_words",
    "describe_tools",
    "described_schemas",
    "escape_tags",
    "format_result",
    "make_toolbox",
    "open_further_tools",
    "parse_call",
    "tool_schema",
    "unescape_tags",
]
