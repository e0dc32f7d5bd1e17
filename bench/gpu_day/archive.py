"""The records of all stages in one folder, and one archive to send, renewed after every case.

Nothing here ends a session: where a file cannot be written (a full disk), a line says so once, and what was found has
been printed by then.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Archive:
    """What a session has found so far, in its folder.

    Args:
        folder: folder of the session; stages write into `stages/NAME/` below it.
        say: prints a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self._say = folder, say
        self._complained = False
        self._seen: set[tuple[str, int]] = set()
        self.attempt(lambda: (folder / "stages").mkdir(parents=True, exist_ok=True))

    @property
    def file(self) -> Path:
        """The file to send."""
        return self.folder / "gpu_day.tar.gz"

    def stage_folder(self, name: str) -> Path:
        """Make the folder into which a stage writes its records and its log."""
        folder = self.folder / "stages" / name
        self.attempt(lambda: folder.mkdir(parents=True, exist_ok=True))
        return folder

    def records(self) -> list[Record]:
        """Read the records of all stages; of the same case the last one in which ours was timed."""
        return [record | {"stage": path.parts[-3]} for path, record in self._chosen()]

    def renew(self, summary: Callable[[], str], force: bool = False) -> None:
        """Write records, summary and archive again if a stage has written a record since; with `force` always."""
        seen = {(str(path), path.stat().st_mtime_ns) for path in self._paths()}
        if seen != self._seen or force:
            self._seen = seen
            self.attempt(lambda: self._write(summary()))

    def _paths(self) -> list[Path]:
        """List the records of all stages, the oldest first."""
        return sorted(self.folder.glob("stages/*/*pu/*.json"), key=lambda path: path.stat().st_mtime_ns)

    def _chosen(self) -> list[tuple[Path, Record]]:
        """Choose a record for each case, with its file."""
        found: dict[str, tuple[Path, Record]] = {}
        for path in self._paths():
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError):
                continue  # half written when its process was stopped
            if path.stem not in found or _has_ours(record) or not _has_ours(found[path.stem][1]):
                found[path.stem] = path, record
        return list(found.values())

    def _write(self, summary: str) -> None:
        (self.folder / "summary.md").write_text(summary)
        for path, _ in self._chosen():
            target = self.folder / "records" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        aside = self.file.with_suffix(".partial")
        with tarfile.open(aside, "w:gz") as archive:
            for name in ("summary.md", "records", "stages"):
                if (self.folder / name).exists():
                    archive.add(self.folder / name, arcname=name)
        aside.replace(self.file)

    def attempt(self, write: Callable[[], Any]) -> None:
        """Write something; complain once where that fails."""
        try:
            write()
        except (OSError, ValueError) as error:
            if not self._complained:
                self._say(f"cannot write into {self.folder}: {error}; what is found is printed")
            self._complained = True


def _has_ours(record: Record) -> bool:
    """Say whether our implementation was timed; records of probes have no implementations and count."""
    implementations = record.get("implementations")
    return implementations is None or "ms" in implementations.get("ours", {})
