"""Stop strings found on token ids, without decoding during generation (docs/design.md#stop-strings).

The strings become one Aho-Corasick automaton over bytes. Walking the text of every vocabulary token through it once
gives a table `next_state[state, token]`; a batch is then advanced by one look-up. A stop string may be spread over
tokens or sit inside one; the token that completes it is kept, even if it extends beyond the string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

_TABLE_TOKENS = 16384  # tokens walked at once


class StopTable:
    """An automaton that finds a tuple of stop strings on token ids of a vocabulary.

    State 0 is the start; a state with `found[state] >= 0` is absorbing and names the stop string by its index.

    Args:
        token_bytes: the text each token id adds in the middle of a sequence.
        stops: the stop strings; none gives a table that never stops.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise ValueError(f"stop strings must not be empty, got {list(stops)!r}")
        step, found = _automaton([stop.encode() for stop in stops])
        self.stops = tuple(stops)
        self.found = found  # (states,) int64
        self.next_state = _walk_vocabulary(step, token_bytes)  # (states, V) int32


class StopTables:
    """The stop tables of a tokenizer, each built when it is first asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._token_bytes: list[bytes] | None = None
        self._tables: dict[tuple[str, ...], StopTable] = {}

    def table(self, stops: tuple[str, ...]) -> StopTable:
        """Return the table of some stop strings."""
        if stops not in self._tables:
            if self._token_bytes is None:
                self._token_bytes = vocabulary_bytes(self._tokenizer, self._vocab_size)
            self._tables[stops] = StopTable(self._token_bytes, stops)
        return self._tables[stops]


def end_of_sequence_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> list[int]:
    """List the tokens that end a completion: the tokenizer's own first, then those of the model's generation settings.

    Chat models often have several (`eos_token_id: [128001, 128008, 128009]`). A single id that was only taken over from
    the model's configuration may be a default of its architecture, so it counts where it is a special token.
    """
    own, others = _listed(tokenizer.eos_token_id), _listed(generation.eos_token_id if generation else None)
    if len(others) == 1 and getattr(generation, "_from_model_config", False):
        others = [index for index in others if index in _special_ids(tokenizer)]
    return list(dict.fromkeys([*own, *others]))


def folder_generation(folder: Path | str) -> GenerationConfig:
    """Read the generation settings of a model folder; where it has none, those of the model's configuration."""
    if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))


def missing_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> NDArray[np.int64]:
    """List the ids below `vocab_size` for which the tokenizer has no token, ascending.

    They are rows of the embedding that are there for its size to be a multiple of some number, and may never be
    sampled: no text would follow from them.
    """
    known = np.zeros(vocab_size, dtype=np.bool_)
    known[[index for index in tokenizer.get_vocab().values() if index < vocab_size]] = True
    return np.flatnonzero(~known)


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class StopMatcher:
    """Several tables joined, so that one look-up advances requests with different stops.

    Args:
        tables: tables, one per request; more can be added.
    """

    def __init__(self, tables: Sequence[StopTable] = ()):
        self._offsets: dict[StopTable, int] = {}
        self._names: list[str | None] = []
        self.found: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.next_state: NDArray[np.int32] = np.empty((0, 0), dtype=np.int32)
        self.start = np.array([self.add(table) for table in tables], dtype=np.int32)  # (N,) first state of each request

    def add(self, table: StopTable) -> int:
        """Add a table and return the first state of its requests. States given before keep their meaning."""
        if table not in self._offsets:
            offset = self._offsets[table] = len(self.found)
            self._names += [table.stops[i] if i >= 0 else None for i in table.found]
            self.found = np.concatenate([self.found, table.found])
            shifted = table.next_state + np.int32(offset) if offset else table.next_state
            self.next_state = np.concatenate([self.next_state, shifted]) if offset else shifted
        return self._offsets[table]

    def name(self, state: int) -> str | None:
        """Return the stop string that a state has found."""
        return self._names[state]


def _automaton(stops: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Build Aho-Corasick as a full table: (states, 256) next state and (states,) index of the stop found or -1."""
    goto: list[dict[int, int]] = [{}]
    found = [-1]
    for index, stop in enumerate(stops):
        state = 0
        for byte in stop:
            if byte not in goto[state]:
                goto[state][byte] = len(goto)
                goto.append({})
                found.append(-1)
            state = goto[state][byte]
        found[state] = index if found[state] < 0 else found[state]
    step = np.zeros((len(goto), 256), dtype=np.int32)
    queue = [(0, 0)]  # breadth first: (state, its longest proper suffix)
    for state, suffix in queue:
        if found[state] < 0 and state:
            found[state] = found[suffix]
        step[state] = step[suffix] if state else 0
        for byte, child in goto[state].items():
            queue.append((child, int(step[suffix, byte]) if state else 0))
            step[state, byte] = child
    ends = np.asarray(found, dtype=np.int64)
    absorbing = np.flatnonzero(ends >= 0)
    step[absorbing] = absorbing[:, None]
    return step, ends


def _walk_vocabulary(step: NDArray[np.int32], token_bytes: Sequence[bytes]) -> NDArray[np.int32]:
    """Compute (states, V): the state that follows each state after each token's bytes."""
    states = len(step)
    table = np.empty((states, len(token_bytes)), dtype=np.int32)
    by_length = np.argsort([len(text) for text in token_bytes], kind="stable")
    for ids in np.array_split(by_length, max(1, -(-len(by_length) // _TABLE_TOKENS))):
        lengths = np.array([len(token_bytes[i]) for i in ids])
        width = int(lengths.max(initial=0))
        joined = b"".join(token_bytes[i].ljust(width, b"\0") for i in ids)
        text = np.frombuffer(joined, dtype=np.uint8).reshape(len(ids), width)
        current = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(ids), axis=1)
        for column in range(width):
            first = int(np.searchsorted(lengths, column, side="right"))  # shorter tokens are done
            current[:, first:] = step[current[:, first:], text[first:, column]]
        table[:, ids] = current
    return table


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """List the UTF-8 text that each of `vocab_size` token ids adds in the middle of a sequence.

    Byte-level BPE gives raw bytes, so that a stop string may end inside a character. Any other tokenizer is asked:
    the text of an ordinary token followed by the token in question, less the text of the former. Ids without a token
    add nothing.
    """
    known = min(max(tokenizer.get_vocab().values(), default=-1) + 1, vocab_size)
    if _is_byte_level(tokenizer):
        texts = _byte_level_texts(tokenizer, known)
    else:
        texts = _decoded_texts(tokenizer, known)
    return texts + [b""] * (vocab_size - known)


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder: dict[str, Any] | None = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    return decoder is not None and decoder["type"] == "ByteLevel"


def _byte_level_texts(tokenizer: PreTrainedTokenizerBase, known: int) -> list[bytes]:
    alphabet = _byte_level_alphabet()
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    texts = []
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
        if index in added:
            texts.append(added[index].encode())
        elif token is None:  # a hole in the vocabulary
            texts.append(b"")
        else:
            texts.append(bytes(alphabet[char] for char in token))
    return texts


def _byte_level_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte-level vocabulary to its byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _decoded_texts(tokenizer: PreTrainedTokenizerBase, known: int) -> list[bytes]:
    anchor = _anchor(tokenizer, known)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefix = tokenizer.decode([anchor], **options)
    pairs = tokenizer.batch_decode([[anchor, index] for index in range(known)], **options)
    return [pair.removeprefix(prefix).encode() for pair in pairs]


def _anchor(tokenizer: PreTrainedTokenizerBase, known: int) -> int:
    """Choose an ordinary token to decode others after: one that reads as letters, else the first."""
    special = set(tokenizer.all_special_ids)
    for index in range(known):
        if index not in special and tokenizer.decode([index]).strip().isalpha():
            return index
    return 0
