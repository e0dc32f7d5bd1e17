"""The mutation check: which faults it makes, and that its child runs the faulty module and not the real one."""

from __future__ import annotations

import ast
from pathlib import Path

from bench.mutants.mutate import mutants
from bench.mutants.parts import PARTS, ROOT, module_name, name_of
from bench.mutants.survivors import Outcome, Survivor, keep, unknown_names
from bench.mutants.trial import Baseline, MutatedModule, try_mutant

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
        (8, "`2` becomes `3` (2)"),
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
    finder = MutatedModule(module_name(path), path, ast.parse("FAULT = 1"))
    spec = finder.find_spec("atpo_fast.credit.standardize", None)
    assert spec is not None and finder.find_spec("atpo_fast.credit", None) is None
    module = type(ast)("atpo_fast.credit.standardize")
    finder.exec_module(module)
    assert module.__dict__["FAULT"] == 1


def test_equal_faults_of_a_function_have_names_of_their_own() -> None:
    """Fails if marking one mutant as equivalent leaves out another, or lines take part in the name."""
    source = "def f(x):\n    return x + 1 + 1\n"
    names = [name_of(ROOT / "a.py", mutant.place, mutant.what) for mutant in mutants(source)]
    assert [name for name in names if "`1`" in name] == ["a.py: f: `1` becomes `2`", "a.py: f: `1` becomes `2` (2)"]
    assert names == [name_of(ROOT / "a.py", mutant.place, mutant.what) for mutant in mutants("\n\n" + source)]


def test_lines_of_a_fault_are_those_of_its_statement() -> None:
    """Fails if the tests of a whole body are run for a fault in its head, or those of other lines for one in it."""
    source = "def f(x):\n    if (x <\n            3):\n        return 5\n    return 0\n"
    found = {mutant.what: mutant.lines for mutant in mutants(source)}
    assert found["`3` becomes `4`"] == range(2, 4) and found["`5` becomes `6`"] == range(4, 5)


def test_equivalent_mutants_exist() -> None:
    """Fails if a mutant that is marked as equivalent is no longer made, so that its mark says nothing."""
    assert unknown_names() == []


def test_tests_of_a_line() -> None:
    """Fails if a test that does not run a line is tried, or the one that noticed most is not the first."""
    base = Baseline({"slow": 2.0, "fast": 1.0, "other": 0.5}, {"/f": {3: ["slow", "fast"], 4: [""]}}, [])
    assert base.tests_of(Path("/f"), range(3, 4)) == ["fast", "slow"]
    assert base.tests_of(Path("/f"), range(4, 5)) == [
        "other",
        "fast",
        "slow",
    ]  # it runs at import: all tests may see it
    assert base.tests_of(Path("/f"), range(9, 10)) == []
    base.kills["slow"] = 1
    assert base.tests_of(Path("/f"), range(3, 4)) == ["slow", "fast"]


def test_a_mutant_is_noticed_or_survives() -> None:
    """Fails if the child tests the real module, or a failing test is not seen."""
    path = ROOT / "atpo_fast" / "credit" / "standardize.py"
    test = "tests/credit/test_credit.py::test_question_with_one_leaf[grpo-1]"
    lines = range(1, len(path.read_text().splitlines()))
    base = Baseline({test: 1.0}, {str(path): {line: [test] for line in lines}}, [])
    (alone,) = (m for m in mutants(path.read_text()) if m.place == "standardize" and "size <= 1` becomes" in m.what)
    noticed = try_mutant(base, path, alone)
    assert noticed.killed and noticed.by == test
    (epsilon,) = (m for m in mutants(path.read_text()) if m.what == "`1e-08` becomes `1.00000001`")
    assert not try_mutant(base, path, epsilon).killed


def test_the_page_keeps_parts_that_were_not_run_again(tmp_path: Path) -> None:
    """Fails if a run of one part loses the outcome of another, or a survivor is not listed."""
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    keep({"loss": Outcome("abc", 1, 60.0, tried=4, killed=4)}, results, page)
    left = Outcome("def", 3, 90.0, tried=2, killed=1, survivors=[Survivor("a.py: f: x", 7, is_run=False)])
    keep({"credit": left}, results, page)
    text = page.read_text()
    assert "| loss | 1 | 0 | 4 | 4 | 100.0% | 1.0 | abc |" in text and "| 50.0% | 1.5 | def |" in text
    assert "* a.py: f: x (line 7, which no test runs)" in text
