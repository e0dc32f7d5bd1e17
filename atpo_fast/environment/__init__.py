"""What the policy acts in: the tag protocol, the tools and their running."""

from atpo_fast.environment.python_tool import PythonTool
from atpo_fast.environment.search import BM25Search, HTTPSearch
from atpo_fast.environment.tags import CALL_LIMIT_NOTICE, TAGS, TagVocabulary, ToolCall, format_result, parse_call
from atpo_fast.environment.tools import Tool, ToolBox, ToolResult, make_toolbox

__all__ = [
    "CALL_LIMIT_NOTICE",
    "TAGS",
    "BM25Search",
    "HTTPSearch",
    "PythonTool",
    "TagVocabulary",
    "Tool",
    "ToolBox",
    "ToolCall",
    "ToolResult",
    "format_result",
    "make_toolbox",
    "parse_call",
]
