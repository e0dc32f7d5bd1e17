"""Search trees in a folder of Parquet files, which pandas, DuckDB, PyArrow and Hugging Face read as one table.

A Parquet file cannot be appended to, so every call of `append` adds one, which gets its name when it is complete.
Each record is a tree. Its `meta` is JSON text, so that it is restored exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atpo_fast.common.files import replacing
from atpo_fast.common.jsonl import plain
from atpo_fast.tree.turn_tree import CLIP_RANGES, SCORES, Floats, Turn, TurnTree, stored_fields

_TURN = {
    "parent": pa.int32(),
    "action_ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float64()),
    "observation_ids": pa.list_(pa.int64()),
    "finish_reason": pa.string(),
    "tool": pa.string(),
    "reward": pa.float64(),
    "step_reward": pa.float64(),
    "score": pa.float64(),
    "multiplicity": pa.int32(),
    "text": pa.string(),
    "observation": pa.string(),
}
_SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "meta": pa.string(),
        "turns": pa.list_(pa.struct(list(_TURN.items()))),
        **dict.fromkeys((*SCORES, *CLIP_RANGES), pa.list_(pa.float64())),
    }
)
_BATCH = 16  # number of records read at once


def append(folder: Path | str, trees: Sequence[TurnTree], texts: Sequence[Sequence[tuple[str, str]] | None]) -> None:
    """Add a file of `trees`; `texts[i]` are (action, observation) of every turn of tree i, or None.

    Raises:
        OSError: the file cannot be written.
    """
    folder = Path(folder)
    number = max((int(path.stem.removeprefix("part-")) for path in _files(folder)), default=-1) + 1
    rows = [_row(tree, text) for tree, text in zip(trees, texts, strict=True)]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    with replacing(folder / f"part-{number:06d}.parquet") as partial:  # readers skip names with a dot
        pq.write_table(table, partial, compression="zstd")


def iterate(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the trees as records of `atpo_fast.tree.storage.tree_to_json`, with `text` and `observation` in each turn.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is damaged, or not one of search trees (names the file).
    """
    for row in _rows(Path(folder), _SCHEMA.names):
        record = {name: row[name] for name in ("question_id", "turns", *SCORES)}
        record |= {name: row.get(name) for name in CLIP_RANGES}
        yield record | {"meta": json.loads(row["meta"])}


def questions(folder: Path | str) -> Iterator[str]:
    """Yield the question id of every tree. Raises as `iterate`."""
    for row in _rows(Path(folder), ["question_id"]):
        yield row["question_id"]


def _rows(folder: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no folder of Parquet files")
    for path in _files(folder):
        try:
            with pq.ParquetFile(path) as file:
                there = file.schema_arrow.names  # in older files without clip ranges
                read = [name for name in columns if name in there or name not in CLIP_RANGES]
                for batch in file.iter_batches(batch_size=_BATCH, columns=read):
                    batch.validate(full=True)  # offsets of a damaged one lead outside of its memory
                    yield from batch.select(read).to_pylist()
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a Parquet file of search trees ({error}); delete it to continue") from error


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def _row(tree: TurnTree, texts: Sequence[tuple[str, str]] | None) -> dict[str, Any]:
    answers = tree.meta.get("answers")
    pairs: Sequence[tuple[str | None, str | None]] = texts or [(None, None)] * len(tree)
    return {
        "question_id": _utf8(tree.question_id),
        "question": _utf8(str(tree.meta.get("question", ""))),
        "answers": [_utf8(str(answer)) for answer in answers] if isinstance(answers, list | tuple) else None,
        "meta": json.dumps(plain(tree.meta)),
        "turns": [_turn(turn, *pair) for turn, pair in zip(tree.turns, pairs, strict=True)],
        **{name: _list(getattr(tree, name)) for name in (*SCORES, *CLIP_RANGES)},
    }


def _turn(turn: Turn, text: str | None, observation: str | None) -> dict[str, Any]:
    return stored_fields(turn) | {
        "text": None if text is None else _utf8(text),
        "observation": None if observation is None else _utf8(observation),
    }


def _list(values: Floats | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _utf8(text: str) -> str:
    """Escape lone surrogates, which Parquet's strings cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()
