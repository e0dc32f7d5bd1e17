"""The requests that are being decoded: a table by request, and the rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atpo_fast.engines.base import Request
from atpo_fast.engines.paged.kv_cache import CacheNode
from atpo_fast.engines.paged.states import START
from atpo_fast.engines.sampling import SamplingTable

Ints = NDArray[np.int64]

_FIRST_ROWS, _FIRST_COLUMNS = 16, 16


@dataclass(slots=True, eq=False)
class InFlight:
    """One request in flight, waiting or being decoded."""

    request: Request
    prompt: Ints  # (p,) token ids of the prompt
    number: int  # place in the order of submission
    state: int  # state of the stop automaton before the first token
    parent: CacheNode | None = None  # last node of its path, pinned while it is decoded
    carried: int = START  # slot of the layers' state after its tokens, while it is decoded


class RequestTable:
    """A table of the requests being decoded: arrays by request of parameters and of the samples so far.

    A request has an index from `add` to `remove`; then the next one takes it over, so that the table holds as many
    rows (N) as were ever decoded at once, and as many columns (C) as the longest completion has tokens, each at most
    doubled. Column c is the c-th token sampled.
    """

    def __init__(self) -> None:
        rows, shape = _FIRST_ROWS, (_FIRST_ROWS, _FIRST_COLUMNS)
        self.requests: list[InFlight | None] = []
        self._free: list[int] = []
        self.numbers: Ints = np.zeros(rows, dtype=np.int64)  # numbers of the requests, as all arrays here (N,)
        self.seeds = np.zeros(rows, dtype=np.uint64)
        self.temperature = np.zeros(rows)
        self.top_k: Ints = np.zeros(rows, dtype=np.int64)
        self.top_p = np.zeros(rows)
        self.max_new: Ints = np.zeros(rows, dtype=np.int64)
        self.counts: Ints = np.zeros(rows, dtype=np.int64)  # number of sampled tokens
        self.tokens: Ints = np.zeros(shape, dtype=np.int64)  # sampled tokens, (N, C)
        self.slots: Ints = np.zeros(shape, dtype=np.int64)  # slots of all tokens but the last, (N, C)
        self.logprobs = np.zeros(shape)
        self.policy_logprobs = np.zeros(shape)
        self.top: Ints = np.zeros(rows, dtype=np.int64)  # number of candidates asked for
        self.top_logprobs = np.zeros((*shape, 0))  # as `candidate_logprobs` has them, (N, C, most asked for so far + 1)

    def add(self, entry: InFlight) -> int:
        """Add a request and return its index."""
        if not self._free:
            self._free.append(len(self.requests))
            self.requests.append(None)
        if len(self.requests) > len(self.counts):
            self._double(axis=0)
        index, sampling = self._free.pop(), entry.request.sampling
        self.requests[index] = entry
        self.numbers[index] = entry.number
        self.seeds[index] = entry.request.seed & (2**64 - 1)
        self.temperature[index], self.top_k[index], self.top_p[index] = (
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )
        self.max_new[index], self.top[index] = sampling.max_new_tokens, sampling.top_logprobs
        self.counts[index] = 0
        return index

    def remove(self, index: int) -> None:
        """Remove a request and free its index for the next one."""
        self.requests[index] = None
        self._free.append(index)

    def entry(self, index: int) -> InFlight:
        """Return the request that has an index."""
        entry = self.requests[index]
        assert entry is not None
        return entry

    def sampling(self, indices: Ints) -> SamplingTable:
        """Look up the sampling parameters of some requests."""
        return SamplingTable(self.temperature[indices], self.top_k[indices], self.top_p[indices])

    def append(self, indices: Ints, tokens: Ints, logprobs: NDArray, policy_logprobs: NDArray) -> None:
        """Append one token to each of some requests; all arrays have shape (R,)."""
        columns = self.counts[indices]
        if columns.max() >= self.tokens.shape[1]:
            self._double(axis=1)
        self.tokens[indices, columns] = tokens
        self.logprobs[indices, columns] = logprobs
        self.policy_logprobs[indices, columns] = policy_logprobs
        self.counts[indices] += 1

    def append_candidates(self, indices: Ints, top_logprobs: NDArray) -> None:
        """Add the candidates' log-probs (R, K) to the token that was appended last to each of some requests."""
        missing = top_logprobs.shape[1] - self.top_logprobs.shape[2]
        if missing > 0:
            self.top_logprobs = np.pad(self.top_logprobs, [(0, 0), (0, 0), (0, missing)], constant_values=np.nan)
        columns = self.counts[indices] - 1
        self.top_logprobs[indices, columns] = np.nan
        self.top_logprobs[indices, columns, : top_logprobs.shape[1]] = top_logprobs

    def candidates(self, index: int) -> list[list[float]] | None:
        """Return the candidates' log-probs of each token of a request; None where it has not asked for any."""
        if not self.top[index]:
            return None
        values = self.top_logprobs[index, : self.counts[index]]
        return [token[~np.isnan(token)].tolist() for token in values]

    def _double(self, axis: int) -> None:
        for name, values in list(vars(self).items()):
            if isinstance(values, np.ndarray) and values.ndim > axis:
                setattr(self, name, np.concatenate([values, np.zeros_like(values)], axis=axis))


@dataclass(slots=True)
class Rows:
    """The requests being decoded, one row each, in ascending order of path length."""

    requests: Ints  # (R,) indices of the requests in the table
    lengths: Ints  # (R,) tokens on the path that have slots
    states: NDArray[np.int32]  # (R,) states of the stop automaton
    positions: Tensor  # (R,) `lengths` on the model's device
    table: Tensor  # (R, C) int64 slots of the path; C has room to grow
    hidden: Tensor  # (R, D) state that predicts the next token
    carried: Tensor  # (R,) int64 slots of the layers' states

    def select(self, rows: Ints) -> Rows:
        """Select some of the rows, in the given order."""
        index = torch.from_numpy(rows).to(self.table.device)
        picks = {np.ndarray: rows, torch.Tensor: index}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rows(**{name: value[picks[type(value)]] for name, value in values.items()})

    def join(self, other: Rows) -> Rows:
        """Join two sets of rows, sorted by length."""
        width = max(self.table.shape[1], other.table.shape[1])
        tables = [widen(rows.table, width) for rows in (self, other)]
        joined = Rows(
            np.concatenate([self.requests, other.requests]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.states, other.states]),
            torch.cat([self.positions, other.positions]),
            torch.cat(tables),
            torch.cat([self.hidden, other.hidden]),
            torch.cat([self.carried, other.carried]),
        )
        return joined.select(np.argsort(joined.lengths, kind="stable"))


def widen(table: Tensor, width: int) -> Tensor:
    """Add columns to `table` (R, C) up to `width`."""
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))
