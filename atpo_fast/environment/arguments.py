"""Arguments of tools: what the policy writes between the tags, read, checked, and described by a JSON schema."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import jsonschema
import pydantic
from typing_extensions import NotRequired, TypedDict

JsonSchema = dict[str, Any]
_MAX_FAULTS = 5


class ArgumentError(ValueError):
    """An argument that does not fit; the message tells the policy what is wrong."""


class TypedArguments:
    """Parser of arguments for a typed Python function.

    A function of one `str` parameter takes the text unchanged. Any other takes a JSON object with its parameters'
    names. Its values are checked against the type hints, and converted where pydantic converts JSON (a date, an enum).
    Where the only parameter is written as a JSON string (a date, a literal), its bare text is taken as well.

    Raises:
        ValueError: `*args`, `**kwargs`, positional-only parameters, or hints that cannot be resolved or described.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        where = f"function {getattr(function, '__qualname__', function)!r}"
        try:
            hinted = function if inspect.isroutine(function) else type(function).__call__
            hints = get_type_hints(hinted, include_extras=True)
            parameters = list(inspect.signature(function).parameters.values())
        except (NameError, TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot be a tool: {error}") from error
        for parameter in parameters:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"{where} cannot be a tool: {parameter} cannot be given by name")
        self.names = [parameter.name for parameter in parameters]
        only = hints.get(self.names[0], str) if len(parameters) == 1 else None
        self.raw = (get_args(only)[0] if get_origin(only) is Annotated else only) is str
        untyped = Any if len(parameters) > 1 else str
        fields = {p.name: _optional(hints.get(p.name, untyped), p.default) for p in parameters}
        arguments = TypedDict("arguments", fields)  # type: ignore[misc]
        arguments.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
        try:
            self._adapter = pydantic.TypeAdapter(arguments)
            self.schema = _without_titles(self._adapter.json_schema())
        except pydantic.errors.PydanticUserError as error:
            raise ValueError(f"{where} cannot be a tool: {error.message}") from error
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                self.schema["properties"][parameter.name].setdefault("default", _plain(parameter.default))

    def parse(self, text: str) -> dict[str, Any]:
        """Read keyword arguments from the text of a call.

        Raises:
            ArgumentError: the text does not fit the parameters.
        """
        if self.raw:
            return {self.names[0]: text}
        try:
            return self._validate(_read_object(text, self.schema))
        except ArgumentError:
            name = text_property(self.schema)
            if name:
                with contextlib.suppress(ArgumentError):
                    return self._validate({name: text})
            raise

    def _validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._adapter.validate_python(arguments))
        except pydantic.ValidationError as error:
            faults = [(fault["loc"], fault["msg"]) for fault in error.errors(include_url=False)]
            raise ArgumentError(_describe_faults(faults, self.schema)) from None


class SchemaArguments:
    """Parser of arguments that a JSON schema describes, as the OpenAI and MCP protocols give it.

    Where the schema's only property is a string, the text is taken unchanged unless it is a JSON object that fits.

    Raises:
        ValueError: not a JSON schema of an object.
    """

    def __init__(self, schema: JsonSchema) -> None:
        try:
            validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON schema: {error.message}") from error
        if schema.get("type", "object") != "object":
            raise ValueError(f"the arguments of a tool are an object, not {schema['type']!r}")
        self.schema = schema
        self._text_name = text_property(schema)
        self._validator = validator(schema)

    def parse(self, text: str) -> dict[str, Any]:
        """Read arguments by name from the text of a call.

        Raises:
            ArgumentError: the text does not fit the schema.
        """
        try:
            arguments = _read_object(text, self.schema)
            faults = [(tuple(error.path), error.message) for error in self._validator.iter_errors(arguments)]
        except ArgumentError:
            if not self._text_name:
                raise
            faults = [((), "")]
        if not faults:
            return arguments
        if self._text_name and self._validator.is_valid({self._text_name: text}):
            return {self._text_name: text}
        raise ArgumentError(_describe_faults(faults, self.schema))


def _optional(hint: Any, default: Any) -> Any:
    """Return the type of a parameter in the dictionary of arguments, which may leave out what has a default."""
    return hint if default is inspect.Parameter.empty else NotRequired[hint]


def text_property(schema: JsonSchema) -> str:
    """Return the name of the only property of a schema when that is a string, which a call may write as bare text."""
    properties = schema.get("properties", {})
    if len(properties) != 1:
        return ""
    ((name, content),) = properties.items()
    return str(name) if isinstance(content, dict) and content.get("type") == "string" else ""


def describe_object(schema: JsonSchema) -> str:
    """Return what a JSON object of a schema looks like, with each property's type in the place of its value."""
    required = schema.get("required", [])
    parts = [
        f'"{name}": {_type(content, schema)}{"" if name in required else " (optional)"}'
        for name, content in schema.get("properties", {}).items()
    ]
    return f"{{{', '.join(parts)}}}"


def _read_object(text: str, schema: JsonSchema) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the argument is not JSON ({error}). {_expected(schema)}") from None
    if not isinstance(arguments, dict):
        raise ArgumentError(f"the argument is a JSON {type(arguments).__name__}. {_expected(schema)}")
    return arguments


def _describe_faults(faults: list[tuple[tuple[int | str, ...], str]], schema: JsonSchema) -> str:
    lines = [": ".join(filter(None, [".".join(map(str, place)), message])) for place, message in faults[:_MAX_FAULTS]]
    return f"{'; '.join(lines)}. {_expected(schema)}"


def _expected(schema: JsonSchema) -> str:
    return f"Expected a JSON object {describe_object(schema)}."


def _type(content: Any, schema: JsonSchema) -> str:
    """Return the type of a property in words; definitions that are no enumeration are called by their names."""
    if not isinstance(content, dict):
        return "any"
    if "enum" in content:
        return " or ".join(json.dumps(value, default=str) for value in content["enum"][:10])
    if "anyOf" in content:
        return " or ".join(_type(choice, schema) for choice in content["anyOf"])
    if "$ref" in content:
        name = str(content["$ref"]).rpartition("/")[2]
        definition = schema.get("$defs", {}).get(name, {})
        return _type(definition, schema) if "enum" in definition else name
    kind = content.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _plain(value: Any) -> Any:
    """Return a default value as plain data."""
    return json.loads(pydantic.TypeAdapter(Any).dump_json(value, fallback=str))


def _without_titles(schema: Any) -> Any:
    """Return the schema without the titles that pydantic makes of names (a property called title is no text)."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))
    }
