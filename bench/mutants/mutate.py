"""Small faults in a module, one at a time: another comparison, operator, number or truth value."""

from __future__ import annotations

import ast
import copy
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
# Not code that a test could notice: messages of errors, checks of the program itself, types, decorators.
_SKIPPED_STATEMENTS = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one fault.

    Attributes:
        line: line of the fault.
        what: the fault in words, such as `< becomes <=`.
        tree: the module's syntax tree.
    """

    line: int
    what: str
    tree: ast.Module


def mutants(source: str) -> Iterator[Mutant]:
    """Yield a module with each of its possible faults, in the order of the source."""
    module = ast.parse(source)
    for number in range(len(_places(module))):
        changed = copy.deepcopy(module)
        node, change = _places(changed)[number]
        before = ast.unparse(node)
        _apply(node, change)
        yield Mutant(node.lineno, f"`{before}` becomes `{ast.unparse(node)}`", ast.fix_missing_locations(changed))


def _places(module: ast.Module) -> list[tuple[ast.expr, int]]:
    """List (expression, number of the change) of everything that can be changed."""
    return [(node, change) for node in _expressions(module) for change in range(_changes(node))]


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions of a tree that are code."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _SKIPPED_STATEMENTS):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


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
