"""Small faults in a module, one at a time: another comparison, operator, number or truth value."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
# Not code that a test could notice: messages of errors, checks of the program itself (also `zip(..., strict=True)`),
# types, decorators.
_SKIPPED_STATEMENTS = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one fault.

    Attributes:
        line: line of the fault.
        place: name of the function or class around it, such as `Credit.assign`; empty at the module's level.
        what: the fault in words, such as `< becomes <=`.
        lines: lines of the statement that holds the fault, without the body that the statement may have.
        source: the module without the fault.
        number: number of the fault among those of the module.
    """

    line: int
    place: str
    what: str
    lines: range
    source: str
    number: int

    def tree(self) -> ast.Module:
        """Build the syntax tree of the module with the fault."""
        module = ast.parse(self.source)
        found, change = _places(module)[self.number]
        _apply(found.node, change)
        return ast.fix_missing_locations(module)


def mutants(source: str) -> Iterator[Mutant]:
    """Yield a module with each of its possible faults, in the order of the source."""
    seen: Counter[tuple[str, str]] = Counter()  # the same fault may be made in several places of a function
    for number, (found, change) in enumerate(_places(ast.parse(source))):
        before = ast.unparse(found.node)
        _apply(changed := copy.deepcopy(found.node), change)
        what = f"`{before}` becomes `{ast.unparse(changed)}`"
        seen[found.place, what] += 1
        if seen[found.place, what] > 1:
            what += f" ({seen[found.place, what]})"
        yield Mutant(found.node.lineno, found.place, what, found.lines, source, number)


@dataclass(frozen=True, slots=True)
class _Found:
    """An expression, the name of the function around it, and the lines of its statement."""

    node: ast.expr
    place: str
    lines: range


def _places(module: ast.Module) -> list[tuple[_Found, int]]:
    """List (expression, number of the change) of everything that can be changed."""
    found = _expressions(module, "", range(0))
    return [(expression, change) for expression in found for change in range(_changes(expression.node))]


def _expressions(node: ast.AST, place: str, lines: range) -> Iterator[_Found]:
    """Yield the expressions of a tree that are code."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _SKIPPED_STATEMENTS):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            inner = place
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{place}.{child.name}".lstrip(".")
            here = _own_lines(child) if isinstance(child, ast.stmt) else lines
            if isinstance(child, ast.expr):
                yield _Found(child, place, lines)
            yield from _expressions(child, inner, here)


def _own_lines(statement: ast.stmt) -> range:
    """Return the lines of a statement, up to the first one of its body where it has one."""
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return range(statement.lineno, max(end, statement.lineno) + 1)


def _changes(node: ast.expr) -> int:
    """Count the changes of an expression itself."""
    if isinstance(node, ast.Compare):
        return len(node.ops)
    if isinstance(node, ast.BinOp):
        return int(type(node.op) in _OPERATORS)
    if isinstance(node, ast.Constant):
        return int(isinstance(node.value, bool | int | float))
    if isinstance(node, ast.UnaryOp):
        return int(isinstance(node.op, ast.USub | ast.Not) and not isinstance(node.operand, ast.Constant))
    return int(isinstance(node, ast.BoolOp | ast.IfExp))


def _apply(node: ast.expr, change: int) -> None:
    """Change an expression in place."""
    if isinstance(node, ast.Compare):
        node.ops[change] = _COMPARISONS[type(node.ops[change])]()
    elif isinstance(node, ast.BinOp):
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    elif isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):  # not x becomes not not x, which is the truth of x
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
