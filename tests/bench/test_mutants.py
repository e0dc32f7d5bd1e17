"""The mutation check: which faults it makes, and that its child runs the faulty module and not the real one."""

from __future__ import annotations

import ast

from bench.mutants.__main__ import PARTS, ROOT, _module_name, _Mutated
from bench.mutants.mutate import mutants

SOURCE = '''
"""A docstring with 1 + 1."""
def f(x: int = 3) -> bool:
    """Compare 1 < 2."""
    if x < 2 and not x:
        raise ValueError(f"{x + 1}")
    assert x == 5
    return -x * 2 >= 4 or (x if x else 0)
'''


def test_the_faults() -> None:
    """Fails if a kind of fault is left out, if two come at once, or if messages, checks and annotations are changed."""
    found = [(mutant.line, mutant.what) for mutant in mutants(SOURCE)]
    assert found == [
        (3, "`3` becomes `4`"),
        (5, "`x < 2 and (not x)` becomes `x < 2 or not x`"),
        (5, "`x < 2` becomes `x <= 2`"),
        (5, "`2` becomes `3`"),
        (5, "`not x` becomes `not not x`"),
        (8, "`-x * 2 >= 4 or (x if x else 0)` becomes `-x * 2 >= 4 and (x if x else 0)`"),
        (8, "`-x * 2 >= 4` becomes `-x * 2 > 4`"),
        (8, "`-x * 2` becomes `-x / 2`"),
        (8, "`-x` becomes `+x`"),
        (8, "`2` becomes `3`"),
        (8, "`4` becomes `5`"),
        (8, "`x if x else 0` becomes `0 if x else x`"),
        (8, "`0` becomes `1`"),
    ]


def test_every_part_has_modules_and_tests() -> None:
    """Fails if a file was moved, so that a part would be checked without modules or tests."""
    for part in PARTS.values():
        assert all(list(ROOT.glob(pattern)) for pattern in part.modules)
        assert all((ROOT / test).exists() for test in part.tests)


def test_the_faulty_module_is_loaded() -> None:
    """Fails if the real module is run in the place of the faulty one."""
    path = ROOT / "atpo_fast" / "credit" / "standardize.py"
    finder = _Mutated(_module_name(path), path, ast.parse("FAULT = 1"))
    spec = finder.find_spec("atpo_fast.credit.standardize", None)
    assert spec is not None and finder.find_spec("atpo_fast.credit", None) is None
    module = type(ast)("atpo_fast.credit.standardize")
    finder.exec_module(module)
    assert module.__dict__["FAULT"] == 1
