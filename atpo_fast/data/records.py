"""Records of data files: .json, .jsonl, .csv, .tsv, .parquet, each also as .gz, and saved data sets (`tables.py`).

A .json file holds an array of objects, an object whose `data` is such an array, or, as some data sets have it, one
object a line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError
from atpo_fast.data.tables import csv_rows, parquet_rows, saved_dataset_rows


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
        DataError: the type is unknown, the file is empty or broken, JSON or CSV is malformed, or a record is not an
            object.
    """
    path = Path(path)
    if path.is_dir():
        return _rows(path, saved_dataset_rows(path))
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist (files are relative to data.root)")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind not in _READERS:
        kinds = ", ".join(_READERS)
        raise DataError(f"{path}: expected a file of one of the types {kinds} (or one of them with .gz)")
    content = _read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty; expected at least one record")
    records = list(_READERS[kind](path, content))
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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file: {error}") from error


def _json_records(path: Path, content: bytes) -> list[Record]:
    if _holds_lines(content):
        return _jsonl_records(path, content)
    values = _parse(content, str(path))
    if isinstance(values, dict):  # TriviaQA, SQuAD
        values = next((values[key] for key in ("data", "Data") if isinstance(values.get(key), list)), values)
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a JSON array of objects, found {_name(values)}")
    return _rows(path, values)


def _holds_lines(content: bytes) -> bool:
    """Tell whether a .json file holds one object a line, which as a whole is no JSON."""
    first, _, rest = content.strip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _jsonl_records(path: Path, content: bytes) -> list[Record]:
    lines = enumerate(content.split(b"\n"), start=1)
    return [parse_line(f"{path}, line {number}", number, line) for number, line in lines if line.strip()]


def _csv_records(path: Path, content: bytes) -> list[Record]:
    return [Record(f"{path}, line {number}", number, row) for number, row in csv_rows(path, content)]


def _tsv_records(path: Path, content: bytes) -> list[Record]:
    return [Record(f"{path}, line {number}", number, row) for number, row in csv_rows(path, content, "\t")]


def _parquet_records(path: Path, content: bytes) -> list[Record]:
    return _rows(path, parquet_rows(path, content))


def _rows(path: Path, values: Sequence[Any]) -> list[Record]:
    return [_record(f"{path}, record {number}", number, value) for number, value in enumerate(values, start=1)]


_READERS: dict[str, Callable[[Path, bytes], list[Record]]] = {
    ".json": _json_records,
    ".jsonl": _jsonl_records,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".parquet": _parquet_records,
}


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: malformed JSON: nested too deeply") from error
    except ValueError as error:  # also a number of more digits than Python reads
        raise DataError(f"{where}: malformed JSON: {error}") from error


def _record(where: str, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {_name(value)}")
    return Record(where, number, value)


def _name(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", type(None): "null"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
