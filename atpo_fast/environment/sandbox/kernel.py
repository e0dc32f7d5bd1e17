"""System calls that Python has no function for: namespaces, mounts, the system-call filter and Landlock."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 24, 36
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
CLONE_NEWUSER = 0x10000000
NAMESPACES = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

_NUMBERS = {  # of system calls, by architecture
    "x86_64": {
        "pivot_root": 155,
        **{"socket": 41, "shmget": 29, "mount": 165, "unshare": 272, "setns": 308, "memfd_create": 319, "bpf": 321},
        **{"userfaultfd": 323, "perf_event_open": 298, "add_key": 248, "request_key": 249, "keyctl": 250, "clone": 56},
    },
    "aarch64": {
        "pivot_root": 41,
        **{"socket": 198, "shmget": 194, "mount": 40, "unshare": 97, "setns": 268, "memfd_create": 279, "bpf": 280},
        **{"userfaultfd": 282, "perf_event_open": 241, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220},
    },
}
_NUMBERS_OF_ALL = {
    **{"io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "clone3": 435},
    **{"mount_setattr": 442, "landlock_create_ruleset": 444, "memfd_secret": 447},
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_EPERM, _EACCES, _ENOSYS = 1, 13, 38
DENIED = {
    "socket": _EACCES,  # pairs of sockets, which Python's own modules use, are made by another call
    **dict.fromkeys(("io_uring_setup", "memfd_create", "memfd_secret", "shmget", "clone3", "userfaultfd"), _ENOSYS),
    **dict.fromkeys(("mount", "open_tree", "move_mount", "fsopen", "fsmount", "mount_setattr"), _EPERM),
    **dict.fromkeys(("unshare", "setns", "bpf", "perf_event_open", "add_key", "request_key", "keyctl"), _EPERM),
}
"""System calls that code does without, and the error that each fails with: they reach servers of this machine, hold
memory that no process is charged for, or give privileges in a namespace of the code's own."""


def error_text() -> str:
    """Return the error of the last call in words."""
    return os.strerror(ctypes.get_errno())


def prctl(option: int, value: int, pointer: int = 0) -> int:
    """Call prctl; -1 is a failure."""
    numbers = map(ctypes.c_ulong, (value, pointer, 0, 0))
    return int(_LIBC.prctl(option, *numbers)) if hasattr(_LIBC, "prctl") else -1


def no_new_privileges() -> None:
    """Let no program that is started from here have more rights than this process."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Drop all capabilities of this process."""
    if hasattr(_LIBC, "capset"):
        _LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def unshare(flags: int) -> int:
    """Leave namespaces; -1 is a failure."""
    return int(_LIBC.unshare(flags)) if hasattr(_LIBC, "unshare") else -1


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> int:
    """Mount something; not 0 is a failure."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    return int(_LIBC.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def make_read_only(folder: str) -> int:
    """Make every file system from a folder on read-only; not 0 is a failure (Linux before 5.12)."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    arguments = (_AT_FDCWD, os.fsencode(folder), _AT_RECURSIVE, attributes, len(attributes))
    return int(_LIBC.syscall(_SYS_MOUNT_SETATTR, *arguments))


def change_root(folder: str) -> int:
    """Make a mounted folder the root, and let go of the old one; not 0 is a failure."""
    number = _NUMBERS.get(os.uname().machine, {}).get("pivot_root")
    if number is None:
        return -1
    os.chdir(folder)
    if _LIBC.syscall(number, b".", b"."):  # the old root lies on the new one then, and is taken off
        return -1
    failed = int(_LIBC.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    return failed


def deny_system_calls(errors: dict[str, int], new_users: bool = True) -> bool:
    """Let system calls fail with an error number; False: impossible here.

    A seccomp filter: for another architecture everything fails. `no_new_privileges` has to be called before. Without
    `new_users`, processes cannot be started in a user namespace of their own either.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _NUMBERS:
        return False
    numbers = _NUMBERS[machine] | _NUMBERS_OF_ALL
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: load a word, jump if, return
    allow, fail = 0x7FFF0000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT[machine]), (answer, 0, 0, fail | _EPERM)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, fail | _EPERM)]  # the x32 interface
    for name, error in errors.items():
        code += [(equal, 0, 1, numbers[name]), (answer, 0, 0, fail | error)]
    if not new_users:
        code += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16)]  # its first argument: flags
        code += [(any_bit, 0, 1, CLONE_NEWUSER), (answer, 0, 0, fail | _EPERM)]
    code.append((answer, 0, 0, allow))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions)))
    return prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(program)) == 0


_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # of Landlock, on all architectures
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read files, list folders
_READ_FILE, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 1, 1 << 14
_RIGHTS = ((1, (1 << 13) - 1), (2, (1 << 14) - 1), (3, (1 << 15) - 1), (5, (1 << 16) - 1))  # (from version, rights)
_SIGNALS_AND_ABSTRACT_SOCKETS = 3


def landlock_version() -> int:
    """Return the version of Landlock; 0 or less: the kernel does not have it."""
    return int(_LIBC.syscall(_CREATE_RULESET, None, 0, 1)) if sys.platform == "linux" else -1


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Let this process and its children open nothing but what lies in some folders, or is one of some files.

    From version 6 on they can also signal nobody else. `no_new_privileges` has to be called before. False: impossible.
    """
    version = landlock_version()
    if version < 1:
        return False
    handled = max(rights for since, rights in _RIGHTS if since <= version)
    attributes = struct.pack("QQQ", handled, 0, _SIGNALS_AND_ABSTRACT_SOCKETS)[: 24 if version >= 6 else 8]
    rules = int(_LIBC.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    if rules < 0:
        return False
    try:
        for paths, rights in ((readable, _READ), (writable, handled)):
            for path in paths:
                _allow(rules, path, rights & handled)
        return _LIBC.syscall(_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    """Add a path to Landlock's rules, if it is there."""
    try:
        handle = os.open(path, os.O_PATH)
    except OSError:
        return
    if not os.path.isdir(path):  # of a file, only what files have
        rights &= 1 | _READ_FILE | _WRITE_FILE | _TRUNCATE
    _LIBC.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, handle), 0)
    os.close(handle)
