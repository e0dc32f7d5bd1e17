"""Limits and rights of the code's processes, and the memory that they take together."""

from __future__ import annotations

import os
import resource
import sys

from . import kernel

TYPE_CHECKING = False  # as in `main`
if TYPE_CHECKING:
    from typing import Any

_MB = 1 << 20
_OF_EACH = (b"RssAnon:", b"RssShmem:")
_SHARES = (b"Pss_Anon:", b"Pss_Shmem:")


def set_limits(job: dict[str, Any], own_count: bool) -> None:
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
            try:
                resource.setrlimit(limit, (bound, bound))
            except (OSError, ValueError):
                continue


def be_killed_first() -> None:
    """Let the kernel, where memory runs out, end this process and its children before any other."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return


def drop_privileges(uid: int) -> tuple[str, bool]:
    """Drop all capabilities for good; root becomes a user that nothing else belongs to."""
    how, strong = "the trainer's, without privileges", True
    kernel.no_new_privileges()
    for capability in range(64):
        kernel.prctl(kernel.PR_CAPBSET_DROP, capability)
    if os.geteuid() == 0:
        how, strong = _become(uid)
    kernel.drop_capabilities()
    return how, strong


def can_count_memory() -> bool:
    """Tell whether the kernel lists the children of a process, by which memory is counted."""
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def memory_of_children() -> int:
    """Return the bytes that all processes below this one hold together; what several of them share counts once."""
    processes = _below(os.getpid())
    return sum(_bytes(process, "status", _OF_EACH) or 0 for process in processes)


def shared_memory_of_children() -> int:
    """Return the same more exactly and slower: what is shared since a fork is counted once."""
    found = [_bytes(process, "smaps_rollup", _SHARES) for process in _below(os.getpid())]
    return memory_of_children() if None in found else sum(filter(None, found))


def _below(process: int) -> list[int]:
    """List the processes below one."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended; what was found before still counts
    return found + [other for child in list(found) for other in _below(child)]


def _bytes(process: int, name: str, fields: tuple[bytes, ...]) -> int | None:
    """Add up fields of a file of a process, which has them in kB. None: the file cannot be read; 0: it has ended."""
    try:
        with open(f"/proc/{process}/{name}", "rb") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(fields))
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:
        return None


def _threads_of_user() -> int:
    """Count the threads that the user runs already; the limit counts them where the user is not the sandbox's own."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                count += os.stat(f"/proc/{process}/task").st_nlink - 2
        except OSError:
            continue
    return count


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
