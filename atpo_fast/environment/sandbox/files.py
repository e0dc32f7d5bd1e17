"""Files that code sees: Python, the system's programs and libraries, and a working directory in memory.

Nothing else is there: no run folder with the accepted answers, no data, no home, no sockets of servers.
"""

from __future__ import annotations

import os
import sys

from . import kernel

CONFINED = "only Python and the system's programs are there, read-only, and a working directory in memory"
DEVICES = ("null", "zero", "full", "random", "urandom")

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SETTINGS = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "nsswitch.conf", "passwd", "group"),
    *("fonts", "mime.types", "magic"),
)
_PARTS_OF_PYTHON = ("bin", "lib", "lib64", "include", "share", "pyvenv.cfg")


def visible() -> list[str]:
    """Return the files and folders that code may read, none of them inside another."""
    prefixes = dict.fromkeys((sys.prefix, sys.base_prefix))
    paths = [
        *_SYSTEM,
        *(f"/etc/{name}" for name in _SETTINGS),
        *(os.path.join(prefix, part) for prefix in prefixes for part in _PARTS_OF_PYTHON),
        *filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":")),
    ]
    real = [os.path.realpath(path) for path in paths]
    kept: list[str] = []
    for path in sorted(dict.fromkeys(filter(os.path.exists, [*paths, *real])), key=len):
        if path != "/" and not any(path == other or path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def own_root(workdir: str, file_mb: int, uid: int, gid: int) -> tuple[str, bool]:
    """Build a root in memory that holds what is `visible`, and change to it. Needs a mount namespace of its own."""
    memory = f"size={file_mb}m,nr_inodes=10000,uid={uid},gid={gid},mode=700"
    if kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE):
        return f"not closed: {kernel.error_text()}", False
    paths = visible()
    shown = [(path, os.open(path, os.O_PATH)) for path in paths if not os.path.islink(path)]
    links = [(path, os.readlink(path)) for path in paths if os.path.islink(path)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in DEVICES]
    root = workdir  # nobody else's; in the new root it is made again
    if kernel.mount("none", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m"):
        return f"not closed: {kernel.error_text()}", False
    for path, target in links:
        os.makedirs(os.path.dirname(f"{root}{path}"), exist_ok=True)
        os.symlink(target, f"{root}{path}")
    failed = [path for path, handle in (*shown, *devices) if not _bind(handle, path, root)]
    for folder in ("/proc", "/tmp", "/dev/shm", workdir):
        os.makedirs(f"{root}{folder}", exist_ok=True)
    kernel.mount("proc", f"{root}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    if kernel.change_root(root):
        return f"not closed: pivot_root failed: {kernel.error_text()}", False
    if kernel.make_read_only("/"):
        return f"few can be reached, but some may be written: mount_setattr failed: {kernel.error_text()}", False
    for folder in ("/dev/shm", workdir):
        if kernel.mount("none", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, memory):
            return f"read-only everywhere, without {folder}: {kernel.error_text()}", False
    return (f"{CONFINED}; not there: {', '.join(failed)}" if failed else CONFINED), True


def _bind(handle: int, path: str, root: str) -> bool:
    """Show an open file or folder at the same path under another root."""
    target = f"{root}{path}"
    source = f"/proc/self/fd/{handle}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    failed = kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    os.close(handle)
    return not failed
