"""The code itself: run it as `__main__`, and leave.

Here and in the rest of the folder little is imported: `ast`, `contextlib`, `json`, `signal` and `traceback`, with what
they import, were half of a start. The compiler's own nodes and the interpreter's own way to show an error do the same.
"""

from __future__ import annotations

import _ast
import atexit
import builtins
import os
import sys
import types

_NODES_ONLY: int = _ast.PyCF_ONLY_AST
_show_error = sys.__excepthook__  # code may put another one in its place


def run(code: str) -> int:
    """Run code as `__main__`; a bare expression at its end is printed unless it is None. Return the exit status."""
    _fork_by_default()
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["-c"]
    try:
        tree = compile(code, "<string>", "exec", _NODES_ONLY, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
        exec(compile(tree, "<string>", "exec"), module.__dict__)
        if isinstance(last, _ast.Expr):
            value = eval(compile(_ast.Expression(last.value), "<string>", "eval"), module.__dict__)
            if value is not None:
                print(value)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename == __file__:
            place = place.tb_next
        _show_error(type(error), error.with_traceback(place), place)
        return 1
    return 0


def leave(status: int) -> None:
    """End as an interpreter does, but without taking its modules apart, which takes longer than the start."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # of a stream that the code put there, or closed
            continue
    os._exit(status & 0xFF)


def _fork_by_default() -> None:
    """Let `multiprocessing` fork, as it does before Python 3.14: its server of forks listens at a socket."""
    if sys.version_info >= (3, 14):
        import multiprocessing

        multiprocessing.set_start_method("fork", force=True)
