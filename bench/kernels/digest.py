"""A digest of everything in this repository that decides what a kernel variant compiles to.

Two variants with one digest compile to the same code with one version of Triton. It covers the source of the kernel, of
the Triton functions that it calls and of the constants that it reads, and the variant's types, constants and options.
Comments, docstrings, line numbers and module names are left out, so that a kernel that was only moved keeps its digest.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any

from triton.language import constexpr

from bench.kernels.operators import Variant

LENGTH = 12  # hexadecimal digits


def digest(variant: Variant) -> str:
    """Hash the sources and the configuration of a variant."""
    parts = [
        *sorted(sources(variant.kernel)),
        repr(sorted(variant.types.items())),
        repr(sorted((name, str(value)) for name, value in variant.constants.items())),
        repr(sorted(variant.specialised)),
        f"{variant.num_warps} warps, {variant.num_stages} stages",
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:LENGTH]


@cache
def sources(kernel: Any) -> set[str]:
    """Collect the code of a Triton function, of those that it calls, and the constants that it reads."""
    found: set[str] = set()
    waiting = [kernel]
    seen = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        found.add(" ".join(tokens(function.src)))
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, constexpr):
                found.add(f"{name} = {value.value!r}")
            elif hasattr(value, "src") and hasattr(value, "fn"):
                waiting.append(value)
    return found


def tokens(code: str) -> Iterator[str]:
    """Split code into tokens, without comments, blank lines and docstrings."""
    starts_statement, is_docstring = True, False
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type == tokenize.STRING and starts_statement:
            is_docstring = True
        elif is_docstring:
            is_docstring = False  # the end of its line
        else:
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            yield token.string
