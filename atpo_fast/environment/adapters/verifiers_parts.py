"""Parts of a rollout of verifiers' v1 interface that its harness would supply: tools, and the messages of a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from atpo_fast.environment.adapters.common import function_schema


def empty_trace(task: Any) -> tuple[Any, Any]:
    """Return a trace of a task without messages, and a subprocess runtime that is not started yet."""
    from verifiers.v1 import AgentConfig, AgentInfo, SubprocessConfig, Trace, TraceTask
    from verifiers.v1.runtimes import make_runtime
    from verifiers.v1.state import state_cls

    config = SubprocessConfig()
    about = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    agent = AgentInfo(config=AgentConfig(runtime=config))
    return Trace(task=about, agent=agent, state=state_cls(type(task))()), make_runtime(config)


def nodes(prompt: str, calls: Sequence[tuple[Any, str]], written: Sequence[str] = ()) -> list[Any]:
    """Return the nodes of a trace: the prompt, each call and its answer, then what the policy answered.

    `calls` holds calls and their results, `written` the text of each turn, where it is known.
    """
    from verifiers.v1 import AssistantMessage, MessageNode, ToolMessage, UserMessage

    messages: list[tuple[Any, bool]] = [(UserMessage(content=prompt), False)]
    for number, (call, text) in enumerate(calls):
        said = "".join(written[number : number + 1])
        messages.append((AssistantMessage(content=said, tool_calls=[call]), True))
        messages.append((ToolMessage(content=text, tool_call_id=call.id, name=call.name), False))
    messages += [(AssistantMessage(content=said), True) for said in written[len(calls) :]]
    return [
        MessageNode(parent=index - 1 if index else None, message=message, sampled=sampled)
        for index, (message, sampled) in enumerate(messages)
    ]


async def open_tools(task: Any, state: Any) -> dict[str, Callable[..., Any]]:
    """Set up the toolsets of a task around its state; returns the tools by the names that a harness gives them."""
    from verifiers.v1.utils.decorators import discover_decorated

    tools = {}
    for toolset in task.toolsets(task.config):
        await toolset.setup()
        await toolset.setup_task(task.data)
        toolset._inert_state = state  # what `toolset.state` is outside of a tool server
        prefix = f"{toolset.server_name}_" if toolset.server_name else ""
        for tool in discover_decorated(toolset, "tool"):
            tools[prefix + (tool.tool_name or tool.__name__)] = tool
    return tools


def tool_schemas(tools: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Describe tools in OpenAI's form, by their type hints and docstrings."""
    from pydantic import TypeAdapter

    adapter: Any = TypeAdapter  # typed for types alone, but takes functions
    return [function_schema(name, tool.__doc__, adapter(tool).json_schema()) for name, tool in tools.items()]
