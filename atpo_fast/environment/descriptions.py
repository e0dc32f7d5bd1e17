"""Descriptions of tools for the prompt: what they do, what they take, and how the policy calls them.

The published prompt speaks of the search tool, and of nothing else. As soon as there are tools of the user's own, all
tools but the search are described: in the chat template's own way where it shows tools, and in words where it does not.
How a tool is called is always said in words, because the template speaks of a way of its own, which nobody reads here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atpo_fast.data.chat_templates import template_shows_tools
from atpo_fast.data.prompts import NO_TOOLS, Prompt, ToolDescriptions
from atpo_fast.environment.arguments import JsonSchema, describe_object, text_property
from atpo_fast.environment.escaping import Escaper
from atpo_fast.environment.tags import TAGS, close_tag, open_tag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = {"type": "object", "properties": {"argument": {"type": "string"}}, "required": ["argument"]}


def tool_schema(tool: Any) -> JsonSchema:
    """Return a tool in OpenAI's form: `{"type": "function", "function": {name, description, parameters}}`.

    A tool without `parameters` takes one text; one without a `description` is described by the first paragraph of its
    docstring.
    """
    description = getattr(tool, "description", None)
    if description is None:
        description = (inspect.getdoc(tool if inspect.isclass(tool) else type(tool)) or "").partition("\n\n")[0]
    parameters = getattr(tool, "parameters", None) or _TEXT
    function = {"name": tool.name, "description": " ".join(description.split()), "parameters": parameters}
    return {"type": "function", "function": function}


def describe_tools(
    schemas: Sequence[JsonSchema], tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, with_search: bool = True
) -> ToolDescriptions:
    """Return what a prompt says about tools beyond the published search tool.

    Args:
        schemas: the tools in OpenAI's form (`tool_schema`).
        tokenizer: its added tokens are escaped in the descriptions, as the tags are; its template may show tools.
        prompt: the prompt, which may do without the chat template.
        with_search: whether there is the search tool too.
    """
    if not schemas:
        return NO_TOOLS
    names = [schema["function"]["name"] for schema in schemas]
    escape = Escaper(tokenizer, names)
    safe = [_escaped(schema, escape) for schema in schemas]
    if prompt.chat and template_shows_tools(tokenizer, safe, prompt.roles):
        return ToolDescriptions(text=_text(safe, with_search, details=False), schemas=tuple(safe))
    return ToolDescriptions(text=_text(safe, with_search, details=True))


def describe_in_words(schemas: Sequence[JsonSchema], *, with_search: bool = True) -> str:
    """Return the description of tools as text, nothing of it escaped; empty without tools."""
    return _text(schemas, with_search, details=True) if schemas else ""


def _text(schemas: Sequence[JsonSchema], with_search: bool, details: bool) -> str:
    """Return how tools are called, one line each; with what they do and what their arguments are, if asked for."""
    others = "Besides the search tool you may call" if with_search else "There is no search tool; you may call"
    opening, closing = open_tag(TAGS.result), close_tag(TAGS.result)
    lines = [
        f"{others} the following tools. A call is written exactly as shown here, with values in the place of their "
        f"types (what is optional may be left out); its result will be between {opening} {closing}."
    ]
    for schema in schemas:
        function = schema["function"]
        line = call_form(function["name"], function["parameters"])
        if details:
            line = f"{line}: {function['description'] or 'no description.'}"
            if not text_property(function["parameters"]):
                line += f" JSON schema: {json.dumps(function['parameters'], ensure_ascii=False)}"
        lines.append(line)
    return "\n".join(lines)


def call_form(name: str, parameters: JsonSchema) -> str:
    """Return a call of a tool with types in the place of values: `<add> {"a": integer} </add>`."""
    text = text_property(parameters)
    argument = f"the {text.replace('_', ' ')}" if text else describe_object(parameters)
    return f"{open_tag(name)} {argument} {close_tag(name)}"


def _escaped(value: Any, escape: Escaper) -> Any:
    """Return a schema whose texts hold no tag and no added token."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return [_escaped(item, escape) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item, escape) for key, item in value.items()}
    return value
