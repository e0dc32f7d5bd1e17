"""Secrets: what may be one, and texts without them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:api[_-]?key|key|token|secret|password|passwd|authorization|auth|cookie|credentials?)s?$",
    re.IGNORECASE,
)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_AUTHORISATION = re.compile(r"(?i)\b(bearer|basic)\s+(?!\$\{)[\w.~+/=-]{6,}")
_SHORTEST = 8  # characters of a value that is searched for in texts; shorter ones are also ordinary words
_REFERENCE = re.compile(r"\$\{(\w+)\}")


def may_be_secret(name: str) -> bool:
    """Tell whether a header, an environment variable or a key with this name holds a secret as a rule."""
    return _SECRET_NAME.search(name) is not None


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without what must not be read by others.

    Hidden are users and passwords in addresses, what follows `Bearer` and `Basic`, and the values of environment
    variables whose name says that they are secrets (`WANDB_API_KEY`).
    """
    text = _AUTHORISATION.sub(rf"\1 {HIDDEN}", _USER_OF_URL.sub(HIDDEN, text))
    for name, value in environment.items():
        if len(value) >= _SHORTEST and value in text and may_be_secret(name):
            text = text.replace(value, HIDDEN)
    return text


def shown(value: Any) -> Any:
    """Return plain data as it may be printed: without the values of keys that name secrets, and `redacted`."""
    if isinstance(value, dict):
        hidden = (
            HIDDEN if isinstance(key, str) and may_be_secret(key) else shown(inner) for key, inner in value.items()
        )
        return dict(zip(value, hidden, strict=True))
    if isinstance(value, list | tuple):
        return [shown(entry) for entry in value]
    return redacted(value) if isinstance(value, str) else value


def names_user(url: str) -> bool:
    """Tell whether an address names a user or a password (`http://me:secret@host`)."""
    return _USER_OF_URL.search(url) is not None


def filled_in(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text in which `${NAME}` stands for the environment variable.

    Raises:
        ValueError: the variable is not set; the message names it.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise ValueError(f"the environment variable {match[1]} is not set, and ${{{match[1]}}} stands for it")
        return environment[match[1]]

    return _REFERENCE.sub(value, text)


def is_written_out(name: str, text: str) -> bool:
    """Tell whether the value of a key or header is a secret itself, and not a reference `${NAME}` to one."""
    return may_be_secret(name) and bool(text) and _REFERENCE.search(text) is None
