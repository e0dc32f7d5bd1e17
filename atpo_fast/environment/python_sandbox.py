"""Run a piece of Python code under limits: the program that the python tool starts for each call.

Only the standard library is imported, and nothing of the package, so that it starts fast. `main` is what is started;
the trainer imports the module for its path only, which also leaves compiled code for the starts. Three processes:

1. the starter cuts itself off (user, mount, network, IPC and process namespaces, where the kernel allows them), unless
   bubblewrap has started it there (`bubblewrap.py`);
2. the keeper, the first process of its namespace, makes the file systems read-only, waits for the code, and takes
   every process that the code left behind with it when it ends;
3. the code's own process, without privileges and under resource limits.

Where bubblewrap or nobody has created namespaces, the first two are one. Without any it adopts orphans and kills them,
and the network is closed by a system-call filter or, where that fails too, in Python only. The tool is told what was
obtained, and logs it.

This guards against accidents and careless code of a policy. It is no guarantee against an attack on the kernel.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_MB = 1 << 20

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_FIRST_UID = 1_000_000_000  # of the user that code runs as when the trainer is root; the process id is added

_READ_ONLY = "read-only except an own working directory in memory"
Report = dict[str, tuple[str, bool]]  # facility -> (how, as strong as it should be)


def main() -> None:
    """Read the job from standard input, set up, run; never returns."""
    report_file = int(sys.argv[1])
    job: dict[str, Any] = json.load(sys.stdin)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"] and not job["bubblewrap"]:  # which itself ends with the tool
        os._exit(1)  # the tool was gone before the signal was asked for
    uid = _FIRST_UID + os.getpid() if os.geteuid() == 0 else os.getuid()
    report: Report = {}
    report["processes"] = ("own namespaces by bubblewrap", True) if job["bubblewrap"] else _enter_namespaces()
    if job["bubblewrap"]:
        report["files"] = _READ_ONLY, True
    elif report["processes"][1]:
        _fork_and_follow()
        report["files"] = _close_file_systems(job, uid)
    else:
        report["files"] = "a private working directory: other files, and the trainer's, are open as to its user", False
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.chdir(job["workdir"])
    _fork_and_keep(namespace=report["processes"][1])
    report["network"] = _close_network(namespace=report["processes"][1])
    _limit(job, own_count=os.geteuid() == 0 or (report["processes"][1] and _kernel() >= (5, 14)))
    report["user"] = _drop_privileges(uid)
    os.write(report_file, json.dumps(report).encode())
    os.close(report_file)
    _leave(_run(job["code"]))


# --- processes ---------------------------------------------------------------------------------------------------


def can_make_namespaces() -> bool:
    """Return whether the kernel lets this process leave the system's namespaces, which it does then."""
    return _enter_namespaces()[1]


def _enter_namespaces() -> tuple[str, bool]:
    """Leave the system's namespaces; root needs no user namespace, everybody else does."""
    uid, gid = os.getuid(), os.getgid()
    error = 0
    for flags in ([_NAMESPACES] if uid == 0 else []) + [_NAMESPACES | _CLONE_NEWUSER]:
        if _unshare(flags) == 0:
            if flags & _CLONE_NEWUSER:
                for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(text)
            return "own namespaces", True
        error = ctypes.get_errno()
    return f"followed one by one (no namespaces: {os.strerror(error)})", False


def _unshare(flags: int) -> int:
    return int(_LIBC.unshare(flags)) if hasattr(_LIBC, "unshare") else -1


def _fork_and_follow() -> None:
    """Return in a child, the first process of the namespace; here wait for it and end as it does."""
    child = os.fork()
    if child == 0:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    os._exit(_exit_code(status))


def _fork_and_keep(namespace: bool) -> None:
    """Return in a child that will run the code; here wait for it, then end what it left behind and end as it did."""
    child = os.fork()
    if child == 0:
        os.setsid()  # signals to its process group reach nobody else
        return
    signal.signal(signal.SIGTERM, _stop)
    while True:
        ended, status = os.waitpid(-1, 0)  # orphans are adopted, and end here too
        if ended == child:
            break
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
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{process}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    os.kill(int(process), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# --- files, network, privileges, limits --------------------------------------------------------------------------


def _close_file_systems(job: dict[str, Any], uid: int) -> tuple[str, bool]:
    """Make everything read-only, except a small file system in memory as working directory and as /dev/shm."""
    owner = f"uid={uid},gid={uid if os.geteuid() == 0 else os.getgid()},mode=700"
    memory = f"size={job['file_mb']}m,nr_inodes=10000,{owner}"
    read_only = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    if _mount(None, "/", None, _MS_REC | _MS_PRIVATE):
        return f"not closed: {_error()}", False
    if os.geteuid() == 0:
        _show_to_others([sys.prefix, sys.base_prefix, job["workdir"], *sys.path])
    if _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC):
        _mount("none", "/proc", "tmpfs", 0)  # better none than one that shows the trainer and its environment
    if _LIBC.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, len(read_only)):
        return f"a private working directory: mount_setattr failed: {_error()}", False
    if os.path.isdir("/dev/shm"):
        _mount("none", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, memory)
    if _mount("none", job["workdir"], "tmpfs", _MS_NOSUID | _MS_NODEV, memory):
        return f"read-only everywhere, without a working directory: {_error()}", False
    return _READ_ONLY, True


def _show_to_others(folders: list[str]) -> None:
    """Give another user a way to folders below one that is closed to others, such as /root; the rest of it is hidden.

    Root's code runs as another user, and Python's packages may lie there.
    """
    closed: dict[str, list[tuple[str, int]]] = {}
    for folder in filter(os.path.isdir, dict.fromkeys(folders)):
        for above in reversed(Path(folder).parents):
            if not os.stat(above).st_mode & 1:
                closed.setdefault(str(above), []).append((folder, os.open(folder, os.O_PATH)))
                break
    for top, inside in closed.items():
        _mount("none", top, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
        for path, handle in inside:
            os.makedirs(path, exist_ok=True)
            _mount(f"/proc/self/fd/{handle}", path, None, _MS_BIND | _MS_REC)
            os.close(handle)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> int:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    return int(_LIBC.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _close_network(namespace: bool) -> tuple[str, bool]:
    """Allow no sockets but those between processes of this machine."""
    if namespace:
        return "own namespace without interfaces", True
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if deny_system_calls({"socket": 13, "io_uring_setup": 38}):  # EACCES, ENOSYS
        return "system-call filter (seccomp)", True
    sys.addaudithook(_refuse_sockets)
    return "closed in Python only: other programs that the code starts can reach it", False


def deny_system_calls(errors: dict[str, int]) -> bool:
    """Let system calls fail with an error number (`socket` only for other families than AF_UNIX); False: impossible.

    A seccomp filter: for another architecture everything fails. `no_new_privs` has to be set before.
    """
    numbers = {
        "x86_64": (0xC000003E, {"socket": 41, "unshare": 272, "io_uring_setup": 425}),
        "aarch64": (0xC00000B7, {"socket": 198, "unshare": 97, "io_uring_setup": 425}),
    }
    if sys.platform != "linux" or os.uname().machine not in numbers:
        return False
    architecture, number = numbers[os.uname().machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, jump if, jump if, return
    allow, fail = 0x7FFF0000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, fail | 1)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, fail | 1)]  # the x32 interface
    for name, error in errors.items():
        if name == "socket":  # the first argument is the family; 1 is AF_UNIX
            code += [(equal, 0, 4, number[name]), (load, 0, 0, 16), (equal, 1, 0, 1)]
            code += [(answer, 0, 0, fail | error), (answer, 0, 0, allow)]
        else:
            code += [(equal, 0, 1, number[name]), (answer, 0, 0, fail | error)]
    code.append((answer, 0, 0, allow))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions)))
    return _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program)) == 0


def _refuse_sockets(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and int(arguments[1]) != 1:
        raise PermissionError(13, "the network is closed")


def _limit(job: dict[str, Any], own_count: bool) -> None:
    """Set the resource limits of the code and of everything it starts, each process by itself."""
    processes = job["processes"] + (0 if own_count else _threads_of_user() - 1)  # this process is counted already
    for name, value in (
        ("RLIMIT_AS", job["memory_mb"] * _MB),
        ("RLIMIT_FSIZE", job["file_mb"] * _MB),
        ("RLIMIT_CPU", job["cpu_seconds"]),
        ("RLIMIT_NPROC", processes),
        ("RLIMIT_NOFILE", 256),
        ("RLIMIT_CORE", 0),
    ):
        limit = getattr(resource, name, None)
        if limit is not None:
            hard = resource.getrlimit(limit)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(limit, (bound, bound))


def _threads_of_user() -> int:
    """Count the threads that the user runs already; the limit counts them where the user is not the sandbox's own."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += os.stat(f"/proc/{process}/task").st_nlink - 2
    return count


def _drop_privileges(uid: int) -> tuple[str, bool]:
    """Drop all capabilities for good; root becomes a user that nothing else belongs to."""
    how, strong = "the trainer's, without privileges", True
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        _prctl(_PR_CAPBSET_DROP, capability)
    if os.geteuid() == 0:
        how, strong = _become(uid)
    if hasattr(_LIBC, "capset"):
        _LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    return how, strong


def _become(uid: int) -> tuple[str, bool]:
    """Turn from root into a user without an account; only its process count where that one cannot import."""
    folders = [path for path in sys.path if os.path.isdir(path)]
    try:
        os.setgroups([])
        os.seteuid(uid)
        readable = all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in folders)
        os.seteuid(0)
        if not readable:
            os.setresuid(uid, 0, 0)
            return "root without privileges: others cannot read the folders of Python's packages", False
        if not os.stat(".").st_uid:
            os.chown(".", uid, uid)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        return f"root without privileges: {error}", False
    return "one of its own", True


def _prctl(option: int, value: int, pointer: int = 0) -> int:
    numbers = map(ctypes.c_ulong, (value, pointer, 0, 0))
    return int(_LIBC.prctl(option, *numbers)) if hasattr(_LIBC, "prctl") else -1


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _error() -> str:
    return os.strerror(ctypes.get_errno())


# --- the code ----------------------------------------------------------------------------------------------------


def _run(code: str) -> int:
    """Run code as `__main__`; a bare expression at its end is printed unless it is None. Return the exit status."""
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


def _leave(status: int) -> None:
    """End as an interpreter does, but without taking its modules apart, which takes longer than the start."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)
