"""The program that the python tool starts: set up, run the code, end all that it has started (see `__init__.py`)."""

from __future__ import annotations

import ctypes
import marshal
import os
import sys
import time

from . import code, files, kernel, limits

TYPE_CHECKING = False  # of a type checker it is true; importing `typing` is a tenth of a start
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal  # without the enumerations around it, which are a fifth of a start

_FIRST_UID = 1_000_000_000  # of the user that code runs as when the trainer is root; the process id is added
_LOOK_SECONDS = 0.02  # between two looks at the memory
Report = dict[str, tuple[str, bool]]  # facility -> (how, as strong as it should be)


def main() -> None:
    """Read the job from standard input, set up, run; never returns."""
    report_file = int(sys.argv[1])
    job: dict[str, Any] = marshal.load(sys.stdin.buffer)  # `json` would be a tenth of a start, too
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"] and not job["bubblewrap"]:  # which itself ends with the tool
        os._exit(1)  # the tool was gone before the signal was asked for
    limits.be_killed_first()
    uid = _FIRST_UID + os.getpid() if os.geteuid() == 0 else os.getuid()
    gid = uid if os.geteuid() == 0 else os.getgid()
    report: Report = {}
    report["processes"] = ("own namespaces by bubblewrap", True) if job["bubblewrap"] else _enter_namespaces()
    namespace = report["processes"][1]
    if job["bubblewrap"]:
        report["files"] = files.CONFINED, True
    elif namespace:
        _fork_and_follow()
        report["files"] = files.own_root(job["workdir"], job["file_mb"], uid, gid)
    else:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    os.chdir(job["workdir"])
    report["memory"] = _memory(job["memory_mb"])
    _fork_and_keep(namespace, job["memory_mb"] << 20)
    limits.set_limits(job, own_count=os.geteuid() == 0 or (namespace and _release() >= (5, 14)))
    report["user"] = limits.drop_privileges(uid)
    if not namespace:
        report["files"] = _restrict_files(job["workdir"])
    report["network"] = _close_network(namespace)
    os.write(report_file, repr(report).encode())
    os.close(report_file)
    code.leave(code.run(job["code"]))


def can_make_namespaces() -> bool:
    """Return whether the kernel lets this process leave the system's namespaces, which it does then."""
    return _enter_namespaces()[1]


# --- processes ---------------------------------------------------------------------------------------------------


def _enter_namespaces() -> tuple[str, bool]:
    """Leave the system's namespaces; root needs no user namespace, everybody else does."""
    uid, gid = os.getuid(), os.getgid()
    error = 0
    for flags in ([kernel.NAMESPACES] if uid == 0 else []) + [kernel.NAMESPACES | kernel.CLONE_NEWUSER]:
        if kernel.unshare(flags) == 0:
            if flags & kernel.CLONE_NEWUSER:
                for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
            return "own namespaces", True
        error = ctypes.get_errno()
    return f"followed one by one (no namespaces: {os.strerror(error)})", False


def _fork_and_follow() -> None:
    """Return in a child, the first process of the namespace; here wait for it and end as it does."""
    child = os.fork()
    if child == 0:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    os._exit(_exit_code(status))


def _fork_and_keep(namespace: bool, memory: int) -> None:
    """Return in a child that will run the code; here wait for it, then end what it left behind and end as it did.

    When all processes of the code hold more than `memory` bytes together, they are ended.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.setsid()  # signals to its process group reach nobody else
        return
    signal.signal(signal.SIGTERM, _stop)
    counted = limits.can_count_memory()
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)  # orphans are adopted, and end here too
        if ended == child:
            break
        if ended:
            continue
        if counted and limits.memory_of_children() > memory and limits.shared_memory_of_children() > memory:
            _kill_children()
            os.write(2, f"\nMemoryError: the processes of the code held more than {memory >> 20} MB.\n".encode())
            os._exit(1)
        signal.sigtimedwait({signal.SIGCHLD}, _LOOK_SECONDS)
    if not namespace:  # else the kernel ends them with this process
        _kill_children()
    os._exit(_exit_code(status))


def _stop(*_: Any) -> None:
    _kill_children()
    os._exit(1)


def _kill_children() -> None:
    """Kill children until none is left: those of a killed child are adopted and come next."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
            try:
                with open(f"/proc/{process}/stat", "rb") as file:
                    if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                        os.kill(int(process), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# --- what is reported --------------------------------------------------------------------------------------------


def _memory(megabytes: int) -> tuple[str, bool]:
    """Say how memory is bounded."""
    if limits.can_count_memory():
        return f"{megabytes} MB for all processes of a call", True
    return f"{megabytes} MB for each process, however many there are", False


def _restrict_files(workdir: str) -> tuple[str, bool]:
    """Bound what can be opened where there is no root of its own."""
    devices = [f"/dev/{name}" for name in files.DEVICES]
    if kernel.restrict_files([*files.visible(), "/proc"], [workdir, *devices]):
        return "only Python and the system's programs can be read, and a working directory be written (Landlock)", True
    return "a private working directory: other files, and the trainer's, are open as to its user", False


def _close_network(namespace: bool) -> tuple[str, bool]:
    """Allow no sockets but pairs of them, and no system call that code does without."""
    if kernel.deny_system_calls(kernel.DENIED, new_users=False):
        return "own namespace without interfaces, no sockets" if namespace else "no sockets (seccomp)", True
    sys.addaudithook(_refuse_sockets)
    if namespace:
        return "own namespace without interfaces", True
    return "closed in Python only: other programs that the code starts can reach it", False


def _refuse_sockets(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and int(arguments[1]) != 1:
        raise PermissionError(13, "the network is closed")


def _release() -> tuple[int, ...]:
    """Return the version of the kernel."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
