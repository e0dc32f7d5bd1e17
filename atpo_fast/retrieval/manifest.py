"""The manifest of an index folder: what is indexed, with which settings, and whether the build is complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import IndexMismatchError
from atpo_fast.common.files import replacing

FORMAT = 1
_NAME = "manifest.json"
_SAMPLE = 1 << 16


@dataclass(slots=True)
class Manifest:
    """The contents of `manifest.json` in an index folder."""

    kind: str  # bm25 or dense
    corpus: list[dict[str, Any]]  # name, bytes and digest of both ends of each corpus file
    settings: dict[str, Any]  # settings that the numbers in the index depend on
    documents: list[str] = field(default_factory=list)  # files of JSON lines; empty until they are stored
    complete: bool = False
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Hash of all that distinguishes this index from another."""
        identity = [self.format, self.kind, self.corpus, self.settings]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest to `folder`, replacing an older one atomically."""
        with replacing(folder / _NAME) as partial:
            partial.write_text(json.dumps(asdict(self) | {"fingerprint": self.fingerprint}, indent=1) + "\n")


def make_manifest(kind: str, corpus: Sequence[Path], settings: dict[str, Any]) -> Manifest:
    """Make the manifest of an index that is to be built.

    Raises:
        FileNotFoundError: a corpus file is missing.
    """
    return Manifest(kind, [_describe(path) for path in corpus], settings)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of an index folder; None where there is none.

    Raises:
        IndexMismatchError: the manifest cannot be read, or another version of this program wrote it.
    """
    path = folder / _NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        values.pop("fingerprint")
        manifest = Manifest(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IndexMismatchError(f"{path} cannot be read ({error}); remove the folder or name another one") from error
    if manifest.format != FORMAT:
        raise IndexMismatchError(f"{path} has format {manifest.format}, not {FORMAT}; build the index again")
    return manifest


def differences(found: Manifest, wanted: Manifest) -> str:
    """Describe in words how two manifests differ; empty when they do not."""
    if found.fingerprint == wanted.fingerprint:
        return ""
    if found.kind != wanted.kind:
        return f"kind {found.kind}, not {wanted.kind}"
    if found.corpus != wanted.corpus:
        names = [
            ", ".join(f"{entry['name']} ({entry['bytes']:,} bytes)" for entry in m.corpus) for m in (found, wanted)
        ]
        return f"corpus {names[0]}, not {names[1]}" if names[0] != names[1] else f"other contents of {names[0]}"
    return ", ".join(
        f"{name} {found.settings.get(name)!r}, not {value!r}"
        for name, value in wanted.settings.items()
        if found.settings.get(name) != value
    )


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Lock the index folder while it is built.

    Raises:
        IndexMismatchError: another process is building in it.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise IndexMismatchError(f"{folder}: another process is building this index; wait for it") from error
        yield


def _describe(path: Path) -> dict[str, Any]:
    """Describe a file by name, size and a hash of both ends; the end of a .gz file holds a checksum of its contents."""
    if not path.is_file():
        raise FileNotFoundError(f"corpus file {path} does not exist")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = file.read(_SAMPLE)
        file.seek(max(0, size - _SAMPLE))
        ends += file.read()
    return {"name": path.name, "bytes": size, "digest": hashlib.sha256(ends).hexdigest()[:16]}
