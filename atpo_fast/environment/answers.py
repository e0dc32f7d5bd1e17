"""Answers of tools: turn what a tool answered or raised into text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from atpo_fast.environment.function_tool import ToolError

FailureKind = Literal["error", "timeout", "empty", "refused"]

_ERROR_CHARS = 200
_FINAL_CHARS = 2000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a try gave no answer. When it is `final`, its text answers the call without another try.

    `kind` refused is that of a call that the tool works on but does not accept (ToolError); it says nothing against
    the tool.
    """

    text: str
    final: bool = False
    kind: FailureKind = "error"


_EMPTY = Failure("returned empty output.", kind="empty")
Outcome = str | Failure  # of one call in one try


def answer_text(answer: Any, max_chars: int) -> Outcome:
    """Return a tool's answer as text, cut and without what is no text, or a failure when nothing is left."""
    if answer is None:
        return _EMPTY
    if isinstance(answer, bytes | bytearray):
        text = answer[: 4 * max_chars].decode("utf-8", errors="replace")
    elif isinstance(answer, str):
        text = answer
    elif isinstance(answer, dict | list | tuple):
        text = to_json(answer, fallback=str, inf_nan_mode="constants").decode()
    else:
        text = str(answer)
    text = _clean(text[:max_chars])
    return text if text.strip() else _EMPTY


def failure_of(error: BaseException) -> Failure:
    """Return the failure that an exception means; those that end a program are failures like others."""
    if isinstance(error, ToolError):
        return Failure(_clean(str(error)[:_FINAL_CHARS]), final=True, kind="refused")
    if not isinstance(error, Exception):
        error = RuntimeError(_one_line(error))
    kind: FailureKind = "timeout" if isinstance(error, TimeoutError) else "error"
    return Failure(f"failed: {_one_line(error)}", kind=kind)


def _one_line(error: BaseException) -> str:
    """Return an exception as one short line."""
    try:
        text = str(error)[: 10 * _ERROR_CHARS]
    except Exception:  # an exception of a tool may do anything
        text = ""
    line = " ".join(f"{type(error).__name__}: {text}".split())[:_ERROR_CHARS].removesuffix(":")
    return _clean(line)


def _clean(text: str) -> str:
    """Return text without control characters other than tab and line feed, and without halves of characters."""
    text = _SURROGATE.sub("\ufffd", text.replace("\r\n", "\n"))
    return _CONTROL.sub("", text.replace("\r", "\n"))
