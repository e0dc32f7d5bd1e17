"""JSON-lines files that survive a killed writer: one record per line, a broken last line is cut or skipped."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atpo_fast.common.files import replacing

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """Turn `value` into plain JSON data.

    Tensors and arrays become numbers or nested lists; nan and infinities become the strings "nan", "inf", "-inf",
    which `float` reads back (JSON itself has no such numbers).
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def append_records(path: Path | str, records: Iterable[Record]) -> None:
    """Append one line per record, all or none of them.

    A half-written last line left by a killed process is cut first. When the write fails (full disk) the file is put
    back to its former length.

    Raises:
        OSError: the file, which the error names, cannot be written.
    """
    path = Path(path)
    lines = b"".join(_encode(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_broken_tail(path)
    with path.open("ab", buffering=0) as file:  # unbuffered: nothing is left to be written at close
        start = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(start)
            error.filename = str(path)  # of a full disk the system says only that it is full
            raise


def read_records(path: Path | str) -> list[Record]:
    """Read all records of a file; a half-written last line is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not the last one is not a JSON object (names file and line).
    """
    return list(iterate_records(path))


def iterate_records(path: Path | str) -> Iterator[Record]:
    """Yield the records of a file as `read_records` reads them, for files that are larger than memory."""
    broken = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if broken:
                raise ValueError(f"{path}, line {broken}: not a JSON object; repair or delete the line")
            record = _decode(line)
            if record is None:
                broken = number
            else:
                yield record


def keep_records(path: Path | str, keep: Callable[[Record], bool]) -> None:
    """Rewrite a file with only the records for which `keep` is true; the file is replaced atomically."""
    kept = [_encode(record) for record in read_records(path) if keep(record)]
    with replacing(path) as partial:
        partial.write_bytes(b"".join(kept))


def _encode(record: Record) -> bytes:
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape


def _decode(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # also a cut UTF-8 sequence
        return None
    return record if isinstance(record, dict) else None


def _cut_broken_tail(path: Path) -> None:
    """Make the file end with a newline: complete a whole last line, drop a broken one."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        if _decode(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")
