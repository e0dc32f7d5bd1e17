"""Manifests: the hashes of a folder's files, so that a damaged, missing or foreign file is noticed before it is used.

A folder with a `manifest.json` was written to the end: the manifest is its last file. What the manifest does not list
is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """Length (bytes) and SHA-256 of a file."""

    size: int
    sha256: str


class DamagedError(ValueError):
    """A folder is not as its manifest says; the message says which file and how."""


def digest(path: Path) -> Digest:
    """Read a file and compute its digest. Raises OSError."""
    found = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return Digest(size, found.hexdigest())


def settle(path: Path) -> Digest:
    """Have a written file reach the disk, and compute its digest. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return digest(path)


def files_below(folder: Path) -> list[Path]:
    """List all files below a folder but its manifest, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def write_manifest(folder: Path, digests: Mapping[str, Digest] | None = None) -> None:
    """Write the manifest of a folder: of `digests` by relative path, or of all its files. Raises OSError."""
    if digests is None:
        digests = {str(path.relative_to(folder)): settle(path) for path in files_below(folder)}
    files = {name: {"bytes": found.size, "sha256": found.sha256} for name, found in sorted(digests.items())}
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": 1, "files": files}, indent=1))
    settle(path)


def read_manifest(folder: Path) -> dict[str, Digest]:
    """Read the manifest of a folder: a digest for each relative path.

    Raises DamagedError when it is missing or not a manifest.
    """
    path = folder / MANIFEST
    try:
        listed = json.loads(path.read_text())["files"]
        found = {name: Digest(int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in found):
        raise DamagedError(f"{MANIFEST} names a file outside of the folder")
    return found


def check_files(folder: Path, listed: Mapping[str, Digest], names: Iterable[str] | None = None) -> None:
    """Compare files with their digests: those of `names`, or all that are listed.

    Raises DamagedError for the first that is missing or differs, or that is not listed.
    """
    for name in listed if names is None else names:
        expected = listed.get(name)
        if expected is None:
            raise DamagedError(f"{name} is not in {MANIFEST}")
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                raise DamagedError(f"{name} has {size} bytes instead of {expected.size}")
            if digest(path) != expected:
                raise DamagedError(f"{name} has changed since it was written (its SHA-256 differs)")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None


def damage(folder: Path) -> str | None:
    """Say what is wrong with a folder that has a manifest; None where nothing is."""
    try:
        check_files(folder, read_manifest(folder))
    except DamagedError as error:
        return str(error)
    return None
