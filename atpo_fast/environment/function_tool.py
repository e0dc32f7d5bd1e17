"""Function tools: Python functions that the policy can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from atpo_fast.common.errors import ConfigError
from atpo_fast.environment.arguments import ArgumentError, JsonSchema, SchemaArguments, TypedArguments
from atpo_fast.environment.own_code import load_own


class ToolError(Exception):
    """A failure that no further try would mend: the call is answered with its text, and not tried again."""


class FunctionTool:
    """A Python function as a tool.

    Its tag is the function's name, its description the docstring, and its arguments are described by the signature
    (`TypedArguments`) or by an OpenAI JSON schema, which then also gives tag and description. `async` functions run on
    the tool box's event loop.

    Args:
        function: called with keyword arguments. What it returns is turned into text by the tool box.
        name: another tag.
        schema: `{"type": "function", "function": {"name", "description", "parameters"}}`, or the inner object.

    Raises:
        ValueError: a function or schema that cannot describe a tool.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, schema: JsonSchema | None = None
    ) -> None:
        described = {} if schema is None else schema.get("function", schema)
        self.function = function
        self.name = str(name or described.get("name") or getattr(function, "__name__", ""))
        self.description = str(described.get("description") or inspect.getdoc(function) or "")
        self._arguments: TypedArguments | SchemaArguments
        if schema is None:
            self._arguments = TypedArguments(function)
        else:
            if not isinstance(described.get("parameters"), dict):
                raise ValueError(f"tool {self.name!r}: its schema has no `parameters`")
            self._arguments = SchemaArguments(described["parameters"])
        self.parameters = self._arguments.schema
        self.is_async = is_async(function)

    def __call__(self, argument: str) -> Any:
        """Return the function's answer, or a coroutine of it. Raises ToolError for an argument that does not fit."""
        try:
            arguments = self._arguments.parse(argument)
        except ArgumentError as error:
            raise ToolError(f"Tool({self.name}) was not called: {error}") from None
        return self.function(**arguments)


def load_tool(reference: str) -> Callable[[str], Any]:
    """Load a tool of the user's own: a function, a tool object, or a class that makes one.

    Raises:
        ConfigError: nothing callable is there; the message says what is missing.
    """
    found = load_own(reference, "tools.functions")
    if inspect.isclass(found):
        found = found()
    if not callable(found):
        raise ConfigError(f"tools.functions={reference}: {found!r} cannot be called")
    return as_tool(found)


def as_tool(tool: Callable[..., Any]) -> Callable[[str], Any]:
    """Return a tool unchanged, and a plain function, which has no `name`, as a FunctionTool."""
    return tool if getattr(tool, "name", None) else FunctionTool(tool)


def is_async(tool: Any) -> bool:
    """Return whether a call of a tool gives a coroutine."""
    called = getattr(tool, "__call__", None)  # noqa: B004 (the method itself is looked at)
    known: bool = getattr(tool, "is_async", False)
    return known or inspect.iscoroutinefunction(tool) or inspect.iscoroutinefunction(called)
