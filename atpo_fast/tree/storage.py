"""Search trees on disk: readable records for the report, lossless ones to roll out once and train later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from atpo_fast.common.jsonl import append_records, iterate_records, plain, read_records
from atpo_fast.tree import parquet
from atpo_fast.tree.turn_tree import CLIP_RANGES, SCORES, Floats, TokenIds, Turn, TurnTree, stored_fields

T = TypeVar("T")
Texts = list[tuple[str, str]]  # (action, observation) of every turn of a tree

ACTION_CHARS = 8000
OBSERVATION_CHARS = 2000


class Decoder(Protocol):
    """The part of a tokenizer that writing trees needs."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        ...


def tree_record(tree: TurnTree, step: int, tokenizer: Decoder) -> dict[str, Any]:
    """Make the line of one tree in a trees.jsonl: question_id, meta, step, and text and numbers of every turn.

    It is for people to read: long texts are cut in the middle.
    """
    texts = _texts(tree, tokenizer, (ACTION_CHARS, OBSERVATION_CHARS))
    turns = [_turn_record(tree, index, *text) for index, text in enumerate(texts)]
    return {"question_id": tree.question_id, "meta": tree.meta, "step": int(step), "turns": turns}


def read_trees(path: Path | str) -> list[dict[str, Any]]:
    """Read the records of a trees.jsonl; a half-written last line is skipped.

    Raises:
        FileNotFoundError, ValueError: as `atpo_fast.common.jsonl.read_records`.
    """
    return read_records(path)


def tree_to_json(tree: TurnTree) -> dict[str, Any]:
    """Write everything that a tree holds as JSON data, from which `tree_from_json` makes an equal tree."""
    data = {
        "question_id": tree.question_id,
        "meta": tree.meta,
        "turns": [stored_fields(turn) for turn in tree.turns],
        **{name: getattr(tree, name) for name in (*SCORES, *CLIP_RANGES)},
    }
    return plain(data)


def tree_from_json(data: dict[str, Any]) -> TurnTree:
    """Make the tree that `tree_to_json` wrote.

    Raises:
        ValueError: a field is missing or does not fit (names the question).
    """
    try:
        return _build(data)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        name = data.get("question_id") if isinstance(data, dict) else None
        raise ValueError(f"not a stored search tree (question {name!r}): {error!r}") from error


def append_forest(path: Path | str, trees: Sequence[TurnTree], tokenizer: Decoder | None = None) -> None:
    """Append trees losslessly, all or none of them.

    A path that ends in `.parquet` is a folder of Parquet files, one for each call; any other a file of JSON lines. With
    a tokenizer the records also hold decoded texts, and all that the report needs.

    Raises:
        OSError: the file cannot be written.
    """
    texts = [None if tokenizer is None else _texts(tree, tokenizer, None) for tree in trees]
    if is_parquet(path):
        parquet.append(path, trees, texts)
    else:
        append_records(path, (_forest_record(tree, text) for tree, text in zip(trees, texts, strict=True)))


def read_forest(path: Path | str) -> list[TurnTree]:
    """Read the trees that `append_forest` wrote; what a killed process left half-written is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record is not a stored tree.
    """
    return list(iterate_forest(path))


def iterate_forest(path: Path | str) -> Iterator[TurnTree]:
    """Yield the trees of `read_forest` one by one, for forests that are larger than memory."""
    return (_made(tree_from_json, record, path) for record in _records(path))


def forest_questions(path: Path | str) -> Counter[str]:
    """Count the trees of each question id in a forest; none where there is no such file.

    Raises ValueError as `read_forest`.
    """
    if not Path(path).exists():
        return Counter()
    if is_parquet(path):
        return Counter(parquet.questions(path))
    return Counter(str(record.get("question_id")) for record in iterate_records(path))


def read_forest_texts(path: Path | str, count: int) -> list[dict[str, Any]]:
    """Read the first `count` trees of a forest as records of a trees.jsonl; trees without texts get empty ones.

    Raises:
        FileNotFoundError, ValueError: as `read_forest`.
    """
    return [_made(_readable, record, path) for record in islice(_records(path), count)]


def is_parquet(path: Path | str) -> bool:
    """Tell whether a forest of this name is a folder of Parquet files."""
    return Path(path).suffix == ".parquet"


def _records(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the records of a forest."""
    return parquet.iterate(path) if is_parquet(path) else iterate_records(path)


def _made(make: Callable[[dict[str, Any]], T], record: dict[str, Any], path: Path | str) -> T:
    """Make something of a record; an error names the file."""
    try:
        return make(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `atpo-fast rollout` writes such files") from error


def _forest_record(tree: TurnTree, texts: Texts | None) -> dict[str, Any]:
    """Join the records of `tree_to_json` and, with texts, of `tree_record`."""
    record = tree_to_json(tree)
    if texts is None:
        return record
    turns = [_turn_record(tree, index, *text) | record["turns"][index] for index, text in enumerate(texts)]
    return record | {"step": 0, "turns": turns}


def _readable(record: dict[str, Any]) -> dict[str, Any]:
    tree = tree_from_json(record)
    texts = [(turn.get("text") or "", turn.get("observation") or "") for turn in record["turns"]]
    turns = [_turn_record(tree, index, *text) for index, text in enumerate(texts)]
    return {"question_id": tree.question_id, "meta": tree.meta, "step": 0, "turns": turns}


def _build(data: dict[str, Any]) -> TurnTree:
    root, *turns = data["turns"]
    tree = TurnTree(root["observation_ids"], question_id=data["question_id"], meta=data["meta"])
    for turn in turns:
        tree.add_turn(
            turn["parent"],
            turn["action_ids"],
            _floats(turn["logprobs"]),
            turn["observation_ids"],
            finish_reason=turn["finish_reason"],
            tool=turn["tool"],
            step_reward=turn.get("step_reward"),  # files of older versions have neither
            score=turn.get("score"),
        )
    for index, turn in enumerate(data["turns"]):
        if turn["reward"] is not None:
            tree.set_reward(index, float(turn["reward"]))
        if turn["multiplicity"] != 1:
            tree.set_multiplicity(index, turn["multiplicity"])
    # files of older versions have no clip ranges
    arrays = {name: data[name] for name in SCORES} | {name: data.get(name) for name in CLIP_RANGES}
    for name, values in arrays.items():
        if values is not None:
            setattr(tree, name, _per_turn(values, len(tree), name))
    return tree


def _per_turn(numbers: list[Any], turns: int, name: str) -> Floats:
    if len(numbers) != turns:
        raise ValueError(f"{name} has {len(numbers)} entries for {turns} turns")
    return _floats(numbers)


def _floats(numbers: list[Any]) -> Floats:
    return np.asarray([float(number) for number in numbers], dtype=np.float64)  # also "nan", "inf"


def _texts(tree: TurnTree, tokenizer: Decoder, limits: tuple[int, int] | None) -> Texts:
    """Decode (action, observation) of every turn; texts over their limit are cut in the middle."""
    action, observation = limits or (None, None)
    return [
        (_text(turn.action_ids, tokenizer, action), _text(turn.observation_ids, tokenizer, observation))
        for turn in tree.turns
    ]


def _turn_record(tree: TurnTree, index: int, text: str, observation: str) -> dict[str, Any]:
    turn = tree.turns[index]
    return {
        "parent": turn.parent,
        "text": text,
        "observation": observation,
        "action_tokens": len(turn.action_ids),
        "observation_tokens": len(turn.observation_ids),
        "nll": turn.nll if index else None,
        "tool": turn.tool,
        "finish_reason": turn.finish_reason,
        "value": None if tree.values is None else tree.values[index],
        "advantage": _advantage(tree, turn, index),
        "reward": turn.reward,
        "step_reward": turn.step_reward,
        "score": turn.score,
        "multiplicity": turn.multiplicity,
    }


def _advantage(tree: TurnTree, turn: Turn, index: int) -> float | None:
    """Return the turn's advantage; under trajectory credit only leaves have one."""
    if tree.leaf_advantages is not None:
        return float(tree.leaf_advantages[index]) if index and not turn.children else None
    return None if tree.advantages is None else float(tree.advantages[index])


def _text(ids: TokenIds, tokenizer: Decoder, limit: int | None) -> str:
    """Decode tokens; a text over `limit` characters keeps its beginning and its end."""
    text = tokenizer.decode(ids.tolist())
    if limit is None or len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters cut …]\n{text[-half:]}"
