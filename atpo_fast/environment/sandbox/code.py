"""The code itself: run it as `__main__`, and leave."""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import os
import sys
import traceback
import types


def run(code: str) -> int:
    """Run code as `__main__`; a bare expression at its end is printed unless it is None. Return the exit status."""
    _fork_by_default()
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["-c"]
    try:
        tree = ast.parse(code, "<string>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<string>", "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<string>", "eval"), module.__dict__)
            if value is not None:
                print(value)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename in (__file__, ast.__file__):
            place = place.tb_next
        traceback.print_exception(type(error), error, place)
        return 1
    return 0


def leave(status: int) -> None:
    """End as an interpreter does, but without taking its modules apart, which takes longer than the start."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)


def _fork_by_default() -> None:
    """Let `multiprocessing` fork, as it does before Python 3.14: its server of forks listens at a socket."""
    if sys.version_info >= (3, 14):
        import multiprocessing

        multiprocessing.set_start_method("fork", force=True)
