"""Typed functions and JSON schemas as tools: what the policy writes is checked, and answered when it does not fit."""

from __future__ import annotations

import asyncio
import datetime
import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from atpo_fast.config import ToolsConfig, load_config
from atpo_fast.environment import FunctionTool, ToolBox, ToolCall, make_toolbox
from atpo_fast.environment.function_tool import load_tool


class Unit(enum.Enum):
    METRE = "m"
    MILE = "mi"


class Place(BaseModel):
    name: str
    height: float = 0.0


def convert(value: float, unit: Unit = Unit.METRE, *, digits: Annotated[int, Field(ge=0, le=9)] = 2) -> str:
    """Converts a length.

    Only to kilometres.
    """
    return f"{value * {Unit.METRE: 1, Unit.MILE: 1609.344}[unit] / 1000:.{digits}f} km"


def visit(places: list[Place], on: datetime.date, mood: Literal["good", "bad"] | None = None) -> dict[str, Any]:
    """Visits places."""
    return {"names": [place.name for place in places], "year": on.year, "mood": mood}


def look(query: str) -> str:
    """Looks something up."""
    return f"found {query}"


def born(on: datetime.date) -> int:
    return on.year


async def wait_for(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "waited"


def ask(tool: Any, argument: str) -> str:
    with ToolBox([tool], retries=3) as toolbox:
        (name,) = toolbox.names
        result = toolbox.run([ToolCall(name, argument)])[0]
    assert result.ok != result.text.startswith("Tool(")
    return result.text


# ---- typed functions


@pytest.mark.parametrize(
    ("function", "argument", "answer"),
    [
        (convert, '{"value": 5}', "0.01 km"),
        (convert, ' {"value": "1e3", "unit": "mi", "digits": 0}\n', "1609 km"),
        (visit, '{"places": [{"name": "K2"}], "on": "2020-02-03"}', '{"names":["K2"],"year":2020,"mood":null}'),
        (look, "who is it?", "found who is it?"),
        (look, '{"query": "x"}', 'found {"query": "x"}'),  # one text: taken as it is
        (wait_for, '{"seconds": 0}', "waited"),
        (born, "2020-02-03", "2020"),  # one value that JSON writes as a string: bare, or in an object
        (born, '{"on": "2020-02-03"}', "2020"),
    ],
)
def test_arguments_reach_the_function(function: Any, argument: str, answer: str) -> None:
    """Fails if arguments are not converted to what the type hints say."""
    assert ask(function, argument) == answer


EXPECTED = 'Expected a JSON object {"value": number, "unit": "m" or "mi" (optional), "digits": integer (optional)}.'


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("5", f"the argument is a JSON int. {EXPECTED}"),
        ("[1]", f"the argument is a JSON list. {EXPECTED}"),
        ("{}", f"value: Field required. {EXPECTED}"),
        ('{"value": "many"}', "value: Input should be a valid number, unable to parse string as a number."),
        ('{"value": 1, "unit": "ft"}', "unit: Input should be 'm' or 'mi'."),
        ('{"value": 1, "digits": 10}', "digits: Input should be less than or equal to 9."),
        ('{"value": 1, "colour": 2}', "colour: Extra inputs are not permitted."),
        ('{"value": 1', "the argument is not JSON (Expecting ',' delimiter: line 1 column 12 (char 11))."),
        ("five", "the argument is not JSON (Expecting value: line 1 column 1 (char 0))."),
        ("[" * 100_000, "the argument is not JSON ("),
        ('{"value": ' + "1" * 10_000 + "}", "the argument is not JSON ("),
        ('{"value": 1, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1}', "a: Extra inputs are not permitted; b: "),
    ],
)
def test_bad_arguments_are_answered_with_what_is_wrong(argument: str, text: str) -> None:
    """Fails if a bad argument raises, is tried again, or is answered without saying what is wrong."""
    calls = 0

    def counted(value: float, unit: Unit = Unit.METRE, *, digits: Annotated[int, Field(ge=0, le=9)] = 2) -> str:
        nonlocal calls
        calls += 1
        return "called"

    answer = ask(counted, argument)
    assert answer.startswith(f"Tool(counted) was not called: {text}")
    assert len(answer) < 1000 and calls == 0


def test_schemas() -> None:
    """Fails if what a prompt would say about a tool is not what the tool takes."""

    class Search:
        """Finds pages.

        With details.
        """

        name = "search"

        def __call__(self, argument: str) -> str:
            return argument

    with ToolBox([Search(), convert, look]) as toolbox:
        search, typed, raw = (schema["function"] for schema in toolbox.schemas())
        assert all(schema["type"] == "function" for schema in toolbox.schemas())
    text = {"type": "object", "properties": {"argument": {"type": "string"}}, "required": ["argument"]}
    assert search == {"name": "search", "description": "Finds pages.", "parameters": text}
    assert (typed["name"], typed["description"]) == ("convert", "Converts a length. Only to kilometres.")
    assert typed["parameters"] == {
        "type": "object",
        "properties": {
            "value": {"type": "number"},
            "unit": {"$ref": "#/$defs/Unit", "default": "m"},
            "digits": {"type": "integer", "minimum": 0, "maximum": 9, "default": 2},
        },
        "required": ["value"],
        "additionalProperties": False,
        "$defs": {"Unit": {"type": "string", "enum": ["m", "mi"]}},
    }
    assert raw["parameters"]["properties"] == {"query": {"type": "string"}}


def test_a_parameter_called_title_stays() -> None:
    """Fails if the titles that pydantic makes are dropped by name only."""

    def book(title: str, properties: int) -> str:
        return title

    assert set(FunctionTool(book).parameters["properties"]) == {"title", "properties"}
    assert ask(book, '{"title": "a", "properties": 1}') == "a"


def test_functions_that_cannot_be_tools() -> None:
    def many(*values: int) -> str:
        return ""

    def unknown(value: Nothing, other: int) -> str:  # type: ignore[name-defined]  # noqa: F821
        return ""

    def strange(value: ToolBox, other: int) -> str:
        return ""

    for function, message in ((many, "given by name"), (unknown, "Nothing"), (strange, "ToolBox")):
        with pytest.raises(ValueError, match=message):
            ToolBox([function])
    with pytest.raises(ValueError, match="<answer> has a meaning of its own"):
        ToolBox([FunctionTool(look, name="answer")])


# ---- JSON schemas

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def forecast(city: str, days: int = 1) -> str:
    return f"{city}: {days} days of rain"


def test_a_tool_by_its_json_schema() -> None:
    tool = FunctionTool(forecast, schema=WEATHER)
    with ToolBox([tool]) as toolbox:
        assert toolbox.names == ("weather",) and toolbox.schemas() == [WEATHER]
    assert ask(tool, '{"city": "Rome", "days": 2}') == "Rome: 2 days of rain"
    assert ask(tool, '{"city": 1, "days": 0}') == (
        "Tool(weather) was not called: city: 1 is not of type 'string'; days: 0 is less than the minimum of 1. "
        'Expected a JSON object {"city": string, "days": integer (optional)}.'
    )
    assert "'city' is a required property" in ask(tool, "{}")
    assert ask(tool, "Rome").startswith("Tool(weather) was not called: the argument is not JSON")


def test_a_schema_of_one_text_takes_plain_text_too() -> None:
    schema = {"name": "say", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
    tool = FunctionTool(lambda text="nothing": text, schema=schema)
    assert ask(tool, "hello") == "hello"
    assert ask(tool, '{"text": "hello"}') == "hello"
    assert ask(tool, '{"other": "hello", "text": 1}') == '{"other": "hello", "text": 1}'  # does not fit: a text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"name": "x"}, "no `parameters`"),
        ({"name": "x", "parameters": {"type": "string"}}, "are an object, not 'string'"),
        ({"name": "x", "parameters": {"type": "object", "properties": 3}}, "not a JSON schema"),
    ],
)
def test_bad_schemas(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionTool(forecast, schema=schema)


# ---- from the configuration


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_tools.py").write_text(
        "def double(value: int) -> int:\n    'Twice as much.'\n    return 2 * value\n"
        "class Greet:\n    name = 'greet'\n    def __call__(self, argument): return f'hello {argument}'\n"
        "class Group:\n    greet = Greet()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_tools"


def test_functions_from_yaml(module: str, tmp_path: Path) -> None:
    """Fails if a user cannot add a tool without touching the code."""
    (tmp_path / "run.yaml").write_text(
        f"tools:\n  builtin: [python]\n  functions: ['{module}:double', '{tmp_path}/{module}.py:Greet']\n"
        "  concurrency: {double: 2}\n  timeouts: {python: 20}\n"
    )
    config = load_config(tmp_path / "run.yaml").tools
    with make_toolbox(config, []) as toolbox:
        assert toolbox.names == ("python", "double", "greet")
        calls = [ToolCall("double", '{"value": 4}'), ToolCall("greet", "you"), ToolCall("python", "1 + 1")]
        assert [result.text for result in toolbox.run(calls)] == ["8", "hello you", "2"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("user_tools.double", "must look like package.module:name or path/to/file.py:name"),
        ("no_such_module:f", "there is no module 'no_such_module' in the working directory"),
        ("user_tools:treble", "has no 'treble'; it has double, Greet, Group, number"),
        ("none.py:f", "there is no file none.py"),
        ("user_tools:number", "3 cannot be called"),
    ],
)
def test_bad_paths(module: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_toolbox(ToolsConfig(builtin=[], functions=[path]), [])


def test_attributes_of_classes(module: str) -> None:
    assert load_tool(f"{module}:Group.greet")("you") == "hello you"
