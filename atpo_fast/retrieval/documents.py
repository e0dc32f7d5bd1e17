"""A corpus on disk with random access by number: JSON lines, and the offset of each line.

Plain .jsonl files stay where they are. Others get a copy in the index folder, one document a line: .jsonl.gz
uncompressed, .json and .parquet, and question files, whose paragraphs become the documents.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from atpo_fast.common.errors import DataError
from atpo_fast.common.files import replacing
from atpo_fast.data.readers import read_passages
from atpo_fast.data.records import parse_line
from atpo_fast.retrieval.contents import TEXT_FIELDS, document_contents

_BOM = b"\xef\xbb\xbf"
_FLUSH_OFFSETS = 1 << 20


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file of JSON lines and the offsets of its documents."""

    path: Path
    offsets: NDArray[np.int64]  # (documents + 1,) first byte of each document, then the end of the file

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1


class Documents:
    """Documents of some files, numbered through in order. Reads from several threads are safe.

    Raises:
        FileNotFoundError: a file no longer exists.
        DataError: a file has another size than when it was indexed.
    """

    def __init__(self, files: Sequence[DocumentFile]) -> None:
        self._files = list(files)
        self._handles: list[IO[bytes]] = []
        for file in self._files:
            if not file.path.is_file():
                raise FileNotFoundError(f"corpus file {file.path} is gone; the index refers to it")
            if file.path.stat().st_size != file.offsets[-1]:
                raise DataError(f"corpus file {file.path} changed since it was indexed; build the index again")
            self._handles.append(file.path.open("rb"))
        self._ends = list(accumulate(len(file) for file in self._files))

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._ends[-1] if self._ends else 0

    def line(self, number: int) -> bytes:
        """Return the stored line of a document.

        Raises:
            IndexError: no such document.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        place = bisect_right(self._ends, number)
        row = number - (self._ends[place - 1] if place else 0)
        start, end = self._files[place].offsets[row : row + 2].tolist()
        return os.pread(self._handles[place].fileno(), end - start, start).strip()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a document as it is stored.

        Raises:
            IndexError: no such document.
            DataError: the line is not a JSON object.
        """
        return parse_line(self._where(number), number, self.line(number)).value

    def contents(self, number: int) -> str:
        """Return the text of a document. Raises as `__getitem__`, and DataError for a document without text."""
        document = self[number]
        try:
            return document_contents(document)
        except DataError as error:
            raise DataError(f"{self._where(number)}: {error}") from None

    def answer(self, number: int) -> bytes:
        """Return a document as the server sends it: as stored, with `contents` added, which published clients read."""
        document = self[number]
        if isinstance(document.get("contents"), str):
            return self.line(number)
        return json.dumps(document | {"contents": document_contents(document)}, ensure_ascii=False).encode()

    def _where(self, number: int) -> str:
        place = bisect_right(self._ends, number)
        return f"{self._files[place].path}, document {number - (self._ends[place - 1] if place else 0) + 1}"


def store_documents(source: Path, folder: Path, number: int, advance: Callable[[int], None]) -> Path:
    """Store the offsets of a corpus file's documents, after copying it where needed; return the file of JSON lines.

    Writes `documents_NNN.offsets` into `folder`, and a copy `documents_NNN.jsonl` where `source` is no plain .jsonl
    file of documents. `advance` is told how many bytes of the source were read.

    Raises:
        DataError: an unreadable file, or one without documents.
    """
    copy = folder / f"documents_{number:03d}.jsonl"
    lines: Iterator[bytes]
    suffixes = source.suffixes
    compressed = suffixes[-1:] == [".gz"]
    if ".jsonl" in suffixes[-2:] and _holds_documents(source):
        lines, target = _read_lines(source, compressed, advance), copy if compressed else None
    else:
        passages = read_passages(source)
        rows = ({"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages)
        lines, target = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows), copy
    count = _write_offsets(lines, folder / f"documents_{number:03d}.offsets", target)
    if not count:
        raise DataError(f"{source}: the file holds no documents")
    return target or source


def open_document_file(path: Path, folder: Path, number: int) -> DocumentFile:
    """Open a file of documents whose offsets `store_documents` has written."""
    return DocumentFile(path, np.memmap(folder / f"documents_{number:03d}.offsets", dtype=np.int64, mode="r"))


def _write_offsets(lines: Iterator[bytes], offsets_path: Path, copy: Path | None) -> int:
    """Write the offset of each line that is not blank, and the lines to `copy`; return the number of documents."""
    copying = replacing(copy) if copy else nullcontext(Path(os.devnull))
    offsets, position, count = array("q"), 0, 0
    with (
        replacing(offsets_path) as partial,  # renamed after the copy, so that offsets never lack their lines
        copying as partial_copy,
        partial.open("wb") as file,
        partial_copy.open("wb") as copied,
    ):
        for line in lines:
            if copy:
                copied.write(line)
            if line.strip(b" \t\r\n" + _BOM):
                offsets.append(position + (len(_BOM) if line.startswith(_BOM) else 0))
                count += 1
            position += len(line)
            if len(offsets) >= _FLUSH_OFFSETS:
                offsets.tofile(file)
                del offsets[:]
        offsets.append(position)
        offsets.tofile(file)
    return count


def _read_lines(source: Path, compressed: bool, advance: Callable[[int], None]) -> Iterator[bytes]:
    with source.open("rb") as raw, gzip.GzipFile(fileobj=raw) if compressed else nullcontext(raw) as lines:
        try:
            for number, line in enumerate(lines):
                yield line
                if number % 65536 == 0:
                    advance(raw.tell())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{source}: not a complete gzip file: {error}") from error


def _holds_documents(source: Path) -> bool:
    """Tell whether the first record is a document, not a question with paragraphs."""
    compressed = source.suffix == ".gz"
    for line in _read_lines(source, compressed, lambda done: None):
        if line.strip():
            record = parse_line(f"{source}, line 1", 1, line).value
            return "question" not in record and not set(TEXT_FIELDS).isdisjoint(record)
    return True
