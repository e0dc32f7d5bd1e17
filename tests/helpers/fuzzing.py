"""Damaged input for the fuzz tests: a good file with some changes, and any JSON around the keys that matter."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=int(os.environ.get("ATPO_FUZZ_EXAMPLES", "50")),
    deadline=None,
    derandomize="ATPO_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    print_blob=True,
)
"""Settings of every fuzz test: the same few examples with the other tests, as many others as `make fuzz` asks for."""
ODD_NUMBERS = [0, -1, 1.5, 10**18, -(10**18), 2**63, 10**400, float("nan"), float("inf"), True, False]
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "é",
    "nan",
    "-",
    "[",
    "{",
    "[[",
    "<answer>",
    "\\boxed{",
    "&lt;",
    "${X}",
    "a" * 300,
]


def values(keys: Sequence[str]) -> st.SearchStrategy[Any]:
    """JSON values of any shape, whose objects have these keys as often as others."""
    leaves = st.one_of(st.none(), st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS]), st.text(max_size=8), st.integers())
    names = st.one_of(st.sampled_from(list(keys)), st.text(max_size=3))
    return st.recursive(
        leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4))
    )


def changed(good: Any, keys: Sequence[str]) -> st.SearchStrategy[Any]:
    """Good JSON data in which one value, wherever it stands, is another one, is gone, or stands twice."""
    places = list(_places(good))
    return st.tuples(st.sampled_from(places), st.sampled_from(["replace", "remove", "repeat"]), values(keys)).map(
        lambda drawn: _edited(good, *drawn)
    )


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes with a few of them changed, cut out, inserted or repeated, or cut off."""
    edit = st.tuples(
        st.sampled_from(["set", "cut", "insert", "repeat", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=4)
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _damage(good, edits))


def written(value: Any) -> bytes:
    """JSON as files hold it, with NaN and halves of characters where the value has them."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _damage(content: bytes, edits: Sequence[tuple[str, float, bytes]]) -> bytes:
    for kind, place, other in edits:
        at = int(place * len(content))
        before, after = content[:at], content[at:]
        content = {
            "set": before + other + after[len(other) :],
            "cut": before + after[len(other) * 7 :],
            "insert": before + other + after,
            "repeat": before + after[:40] + after,
            "end": before,
        }[kind]
    return content


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _places(inner, (*path, key))


def _edited(value: Any, path: tuple[Any, ...], how: str, other: Any) -> Any:
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = _edited(copy[key], tuple(rest), how, other)
    elif how == "replace":
        copy[key] = other
    elif how == "remove":
        del copy[key]
    elif isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[f"{key} "] = copy[key]
    return copy
