"""Bubblewrap (`bwrap`) around the python tool, where the kernel refuses namespaces to the tool itself.

Some systems allow namespaces to no plain process but to bubblewrap, which is set-user-id there or named in the security
policy. Where the tool can make namespaces itself it does, and bubblewrap is not asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from atpo_fast.environment.sandbox import files

_PROBE_SECONDS = 20.0


def confine(command: Sequence[str], *, workdir: str, file_mb: int) -> list[str]:
    """Return a command that runs `command` in namespaces of bubblewrap's making.

    Of the files only those that `sandbox/files.py` names are there, read-only, and a file system in memory at `workdir`
    and at /dev/shm; there is no network, and no process but the command's own, which is the first of its namespace:
    with it ends all that it started.
    """
    memory = ["--size", str(file_mb << 20), "--perms", "0700", "--tmpfs"]
    shown = [*files.visible(), os.path.dirname(os.path.abspath(files.__file__))]
    mounts = ["--perms", "0755", "--tmpfs", "/"]
    for path in shown:
        mounts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    # The system's own devices, which only root may change. Bubblewrap's (`--dev`) need a second user namespace.
    for name in files.DEVICES:
        mounts += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    mounts += ["--proc", "/proc", "--dir", "/tmp", *memory, "/dev/shm", *memory, workdir, "--remount-ro", "/"]
    namespaces = ["--unshare-user", "--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"]
    return ["bwrap", *namespaces, *mounts, "--chdir", workdir, "--", *command]


@lru_cache(maxsize=1)
def is_needed_and_works() -> bool:
    """Return whether bubblewrap can confine code here and this process cannot; asked once.

    Root is not asked for: what the kernel refuses to root, it refuses to bubblewrap.
    """
    if shutil.which("bwrap") is None or os.geteuid() == 0:
        return False
    attempt = "from sandbox.main import can_make_namespaces; sys.exit(not can_make_namespaces())"
    folder = os.path.dirname(os.path.abspath(__file__))
    own = [sys.executable, "-I", "-B", "-c", f"import sys; sys.path.insert(0, {folder!r}); {attempt}"]
    return not _succeeds(own) and _succeeds(confine(["true"], workdir="/tmp", file_mb=1))


def _succeeds(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
