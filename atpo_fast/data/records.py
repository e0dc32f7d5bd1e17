"""Records of data files: .json (an array), .jsonl, .parquet, each also compressed as .gz."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a data file, and where it was read."""

    where: str  # place for error messages, such as "questions.jsonl, line 7"
    number: int  # number of the line or record, from 1
    value: dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """Read all records of a file; lines and records are counted from 1.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the type is unknown, the file is empty or broken, JSON is malformed, or a record is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (files are relative to data.root)")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind not in (".json", ".jsonl", ".parquet"):
        raise DataError(f"{path}: expected a .json, .jsonl or .parquet file (or one of them with .gz)")
    content = _read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty; expected at least one record")
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    records = list(readers[kind](path, content))
    if not records:
        raise DataError(f"{path}: the file holds no records; expected at least one")
    return records


def parse_line(where: str, number: int, line: bytes) -> Record:
    """Parse one line of a .jsonl file.

    Raises:
        DataError: the JSON is malformed or not an object; the message begins with `where`.
    """
    return _record(where, number, _parse(line, where))


def _read_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file: {error}") from error


def _json_records(path: Path, content: bytes) -> Iterator[Record]:
    values = _parse(content, str(path))
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {_name(values)}")
    for number, value in enumerate(values, start=1):
        yield _record(f"{path}, record {number}", number, value)


def _jsonl_records(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield parse_line(f"{path}, line {number}", number, line)


def _parquet_records(path: Path, content: bytes) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    for number, value in enumerate(values, start=1):
        yield _record(f"{path}, record {number}", number, value)


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error}") from error


def _record(where: str, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {_name(value)}")
    return Record(where, number, value)


def _name(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", type(None): "null"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
