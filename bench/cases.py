"""Every case by name, those that must show something first."""

from __future__ import annotations

import attention_cases
import head_cases
import model_cases
from case import Case
from host_preparation import HOST


def for_device(kind: str) -> list[Case]:
    """Cases of "cuda" or "cpu", in the order in which they are run."""
    found = [*head_cases.for_device(kind), HOST, *attention_cases.for_device(kind), *model_cases.for_device(kind)]
    return unique(sorted(found, key=lambda case: not case.quick))


def unique(cases: list[Case]) -> list[Case]:
    """The first case of every name, in order."""
    by_name: dict[str, Case] = {}
    for case in cases:
        by_name.setdefault(case.name, case)
    return list(by_name.values())
