"""Rows of tables: CSV and TSV files, Parquet files, and folders that `datasets` saved with `save_to_disk`.

The cells of a CSV file stay text, so that `007` and `1,000` survive, with two exceptions: an empty cell is missing, and
a column of nothing but whole numbers that became floats (`42.0`) is a column of whole numbers. A cell that holds a list
of texts, as JSON or as Python prints it, becomes that list.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import DataError

Row = dict[str, Any]

_LONGEST_CELL = 1 << 30
# What pyarrow, json and dictionaries raise for a broken file: text, times and numbers out of range, missing keys.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
_WHOLE_FLOAT = re.compile(r"-?\d+\.0+")
_PRINTED_ARRAY = re.compile(r"""^\[\s*(['"]).*\1\s+(['"]).*\2\s*\]$""", re.DOTALL)


def csv_rows(path: Path, content: bytes, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    """Yield (number of the record's last line, its cells by column) of a file whose first line names the columns.

    Raises:
        DataError: not UTF-8, no or repeated column names, or a record with more cells than there are columns.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: malformed CSV: {error}") from error
    columns = _column_names(path, lines[0][1] if lines else [])
    for number, cells in lines[1:]:
        if len(cells) > len(columns):
            raise DataError(
                f"{path}, line {number}: {len(cells)} cells, but the first line names {len(columns)} columns "
                f"({', '.join(columns)}); a cell that holds {delimiter!r} must be quoted"
            )
    whole = {i for i in range(len(columns)) if _holds_whole_floats([c[i] for _, c in lines[1:] if i < len(c)])}
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        yield number, {columns[i]: _cell(cell, i in whole, where) for i, cell in enumerate(cells)}


def parquet_rows(path: Path, content: bytes) -> list[Row]:
    """Return the rows of a Parquet file. Raises DataError when it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return _plain_rows(pyarrow.parquet.read_table(BytesIO(content)))
    except (*_UNREADABLE, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: not a readable parquet file: {type(error).__name__}: {reason}") from error


def saved_dataset_rows(folder: Path) -> list[Row]:
    """Return the rows of a data set that `datasets` saved with `save_to_disk`.

    Raises:
        DataError: the folder is no such data set, is one of several splits, or a file of it cannot be read.
    """
    import pyarrow

    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(state.parent) for state in folder.glob("*/state.json")))
        raise DataError(f"{folder} holds several splits; name one of them: {splits}")
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{folder} is a folder, and not one of a data set saved with save_to_disk (it has no state.json)"
        )
    rows: list[Row] = []
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for entry in state["_data_files"]:
            with pyarrow.memory_map(str(folder / entry["filename"])) as source:
                rows += _plain_rows(pyarrow.ipc.open_stream(source).read_all())
    except (*_UNREADABLE, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: not a readable data set: {type(error).__name__}: {error}") from error
    return rows


def _plain_rows(table: Any) -> list[Row]:
    """Return the rows of an Arrow table, checked first: offsets of a damaged one lead outside of its memory."""
    table.validate(full=True)
    rows: list[Row] = table.to_pylist()
    return rows


def _column_names(path: Path, cells: list[str]) -> list[str]:
    columns = [cell.strip() for cell in cells]
    if not all(columns):
        raise DataError(f"{path}: the first line must name every column; found {columns}")
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: the first line names columns more than once: {', '.join(repeated)}")
    return columns


def _holds_whole_floats(cells: list[str]) -> bool:
    """Tell whether every cell of a column that is not empty is a whole number written as a float."""
    given = [cell.strip() for cell in cells if cell.strip()]
    return bool(given) and all(_WHOLE_FLOAT.fullmatch(cell) for cell in given)


def _cell(text: str, whole: bool, where: str) -> Any:
    """Return the value of a cell: None, a list of texts, or text."""
    bare = text.strip()
    if not bare:
        return None
    if whole:
        return bare.partition(".")[0]
    if not (bare.startswith("[") and bare.endswith("]")):
        return text
    found = _texts_of(bare)
    if found is None:
        return text
    if len(found) == 1 and _PRINTED_ARRAY.match(bare):
        raise DataError(f"{where}: {bare[:60]} looks like an array that NumPy printed; write the list as JSON")
    return found


def _texts_of(text: str) -> list[str] | None:
    """Return the list of texts that a cell holds, as JSON or as Python prints it; None when it holds something else."""
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value) else None
