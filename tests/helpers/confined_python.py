"""Answers calls of the python tool in a process that may do less than the tests: one JSON line each way.

    python tests/helpers/confined_python.py PYTHON [--user] [--no-namespaces] [--no-landlock] [--bubblewrap]

PYTHON: the interpreter of the code. `--user` (needs root): as a user without an account. `--no-namespaces`: the kernel
refuses namespaces, as in a container without privileges. `--no-landlock`: nor has it Landlock. `--bubblewrap`:
bubblewrap may be used where it is installed; without this option it never is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import atpo_fast

# Importing the package imports all of its tools, which costs more than all calls of a test. This process needs one:
# with an empty package in its place, only that tool's own modules are imported.
_package = ModuleType("atpo_fast.environment")
_package.__path__ = [str(Path(folder, "environment")) for folder in atpo_fast.__path__]
sys.modules[_package.__name__] = _package

from atpo_fast.environment import bubblewrap  # noqa: E402
from atpo_fast.environment.function_tool import ToolError  # noqa: E402
from atpo_fast.environment.python_tool import PythonTool  # noqa: E402
from atpo_fast.environment.sandbox import kernel  # noqa: E402

USER = 54321


class Log(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.getMessage()}")


def become_user() -> None:
    """Another user, who can read Python's packages wherever they lie."""
    if kernel.unshare(0x00020000) or kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE):
        raise SystemExit("cannot make a mount namespace")
    show_to_others([sys.prefix, sys.base_prefix, os.getcwd(), *filter(None, sys.path)])
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)


def show_to_others(folders: list[str]) -> None:
    """A way for others to folders below one that is closed to them, such as /root; the rest of it is hidden."""
    closed: dict[str, list[tuple[str, int]]] = {}
    for folder in filter(os.path.isdir, dict.fromkeys(folders)):
        for above in reversed(Path(folder).parents):
            if not os.stat(above).st_mode & 1:
                closed.setdefault(str(above), []).append((folder, os.open(folder, os.O_PATH)))
                break
    for top, inside in closed.items():
        kernel.mount("none", top, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
        for path, handle in inside:
            os.makedirs(path, exist_ok=True)
            kernel.mount(f"/proc/self/fd/{handle}", path, None, kernel.MS_BIND | kernel.MS_REC)
            os.close(handle)


def main() -> None:
    sys.executable = sys.argv[1]
    if "--user" in sys.argv:
        become_user()
    denied = {"unshare": 1} if "--no-namespaces" in sys.argv else {}
    denied |= {"landlock_create_ruleset": 38} if "--no-landlock" in sys.argv else {}
    if denied:
        kernel.no_new_privileges()
        if not kernel.deny_system_calls(denied):
            raise SystemExit("cannot filter system calls")
    if "--bubblewrap" not in sys.argv:
        bubblewrap.is_needed_and_works = lambda: False  # type: ignore[assignment]  # a stand-in without its cache
    elif not bubblewrap.is_needed_and_works():
        raise SystemExit("bubblewrap is not installed, or cannot make namespaces, or is not needed")
    log = Log()
    logging.getLogger("atpo_fast").addHandler(log)
    logging.getLogger("atpo_fast").setLevel(logging.INFO)
    tool = PythonTool(timeout_seconds=30)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        tool.timeout_seconds, tool.memory_mb = job["timeout_seconds"], job["memory_mb"]
        answer = []
        for _ in range(job["times"]):
            try:
                answer.append(tool(job["code"]))
            except ToolError as error:
                answer.append(str(error))
        handles = os.listdir("/proc/self/fd")
        with open("/proc/self/status") as file:
            memory = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        state = {"handles": len(handles), "threads": threading.active_count(), "memory_kb": memory}
        print(json.dumps({"answers": answer, "log": log.messages, **state}), flush=True)


if __name__ == "__main__":
    main()
