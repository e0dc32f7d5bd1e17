"""One call of the transformers engine: admit requests, decode all of them token by token, retire the finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atpo_fast.rollout.engine import Completion, FinishReason, Request
from atpo_fast.rollout.kv_cache import CacheNode, Key, PrefixCache
from atpo_fast.rollout.paged_attention import AttentionGroup, PagedBatch, decode_group
from atpo_fast.rollout.paged_model import PagedModel
from atpo_fast.rollout.prefill import fill, path_slots
from atpo_fast.rollout.sampling import SamplingTable, sample, uniforms
from atpo_fast.rollout.stops import StopMatcher

Ints = NDArray[np.int64]

_ADMISSION_SHARE = 8  # admit when this share (1/n) of the batch is idle: prefill in few, large passes
# Padded keys gathered at once: on CPU as many as stay in its caches, on GPU as many as are small beside a model.
_KEYS_PER_GROUP = {"cpu": 1 << 13, "cuda": 1 << 18}


class Outputs:
    """What has been sampled so far, by request: row r is request r, column c its c-th token; grows as needed."""

    def __init__(self, requests: int):
        self.counts: Ints = np.zeros(requests, dtype=np.int64)  # tokens sampled
        self.tokens: Ints = np.zeros((requests, 16), dtype=np.int64)
        self.slots: Ints = np.zeros((requests, 16), dtype=np.int64)  # of all but the last token
        self.logprobs = np.zeros((requests, 16))
        self.policy_logprobs = np.zeros((requests, 16))

    def append(self, requests: Ints, tokens: Ints, logprobs: NDArray, policy_logprobs: NDArray) -> None:
        """Add one token to each of `requests`; all arrays (R,)."""
        columns = self.counts[requests]
        if columns.max() >= self.tokens.shape[1]:
            for name in ("tokens", "slots", "logprobs", "policy_logprobs"):
                values = getattr(self, name)
                setattr(self, name, np.concatenate([values, np.zeros_like(values)], axis=1))
        self.tokens[requests, columns] = tokens
        self.logprobs[requests, columns] = logprobs
        self.policy_logprobs[requests, columns] = policy_logprobs
        self.counts[requests] += 1


@dataclass(slots=True)
class Rows:
    """The requests being decoded, one row each, in ascending order of path length."""

    requests: Ints  # (R,)
    lengths: Ints  # (R,) tokens on the path that have slots
    states: NDArray[np.int32]  # (R,) of the stop automaton
    positions: Tensor  # (R,) `lengths` on the model's device
    table: Tensor  # (R, C) int64 slots of the path; C has room to grow
    hidden: Tensor  # (R, D) state that predicts the next token

    def select(self, rows: Ints) -> Rows:
        """Some of the rows, in the given order."""
        index = torch.from_numpy(rows).to(self.table.device)
        picks = {np.ndarray: rows, torch.Tensor: index}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rows(**{name: value[picks[type(value)]] for name, value in values.items()})

    def join(self, other: Rows) -> Rows:
        """Both sets of rows, sorted by length."""
        width = max(self.table.shape[1], other.table.shape[1])
        tables = [_widen(rows.table, width) for rows in (self, other)]
        joined = Rows(
            np.concatenate([self.requests, other.requests]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.states, other.states]),
            torch.cat([self.positions, other.positions]),
            torch.cat(tables),
            torch.cat([self.hidden, other.hidden]),
        )
        return joined.select(np.argsort(joined.lengths, kind="stable"))


class Generation:
    """State of one `generate` call.

    Args:
        prompts: (p,) int64 token ids of each request.
        eos_ids: tokens that end a completion.
        batch_size: most requests decoded at once.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Ints],
        model: PagedModel,
        cache: PrefixCache,
        stops: StopMatcher,
        eos_ids: Sequence[int],
        batch_size: int,
    ):
        self.requests, self.prompts, self.model, self.cache, self.stops = requests, prompts, model, cache, stops
        self.eos_ids = np.asarray(eos_ids, dtype=np.int64)
        self.limit = batch_size
        self.waiting = deque(range(len(requests)))
        self.paths: dict[int, CacheNode] = {}  # last path node of each request being decoded
        self.outputs = Outputs(len(requests))
        self.completions: dict[int, Completion] = {}
        self.rows: Rows | None = None
        params = [request.sampling for request in requests]
        self.params = SamplingTable(
            np.array([p.temperature for p in params], dtype=np.float64),
            np.array([p.top_k for p in params], dtype=np.int64),
            np.array([p.top_p for p in params], dtype=np.float64),
        )
        self.max_new = np.array([p.max_new_tokens for p in params])
        self.seeds = np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64)

    def run(self) -> list[Completion]:
        """Decode everything; completions in the order of the requests."""
        while self.waiting or self.rows is not None:
            self._admit()
            assert self.rows is not None
            tokens, finished = self._sample(self.rows)
            self._retire(self.rows, finished)
            left = np.flatnonzero(~finished)
            if len(left) < len(finished):
                self.rows = self.rows.select(left) if len(left) else None
                tokens = tokens[torch.from_numpy(left).to(tokens.device)]
            if self.rows is not None:
                self._forward(self.rows, tokens)
        return [self.completions[index] for index in range(len(self.requests))]

    # Admission

    def _admit(self) -> None:
        """Reserve and fill the paths of as many waiting requests as fit, and add them to the rows."""
        running = 0 if self.rows is None else len(self.rows.requests)
        if not self.waiting or (running and (self.limit - running) * _ADMISSION_SHARE < self.limit):
            return
        admitted: list[int] = []
        new: dict[CacheNode, None] = {}
        while self.waiting and running + len(admitted) < self.limit:
            if not self._reserve(self.waiting[0], running + len(admitted) + 1, new):
                break
            admitted.append(self.waiting.popleft())
        if admitted:
            fill(list(new), self.model, self.cache)
            rows = self._rows(admitted)
            self.rows = rows if self.rows is None else self.rows.join(rows)
        elif not running:
            raise self._too_large(self.waiting[0], len(self.prompts[self.waiting[0]]) + 1)

    def _reserve(self, index: int, spare: int, new: dict[CacheNode, None]) -> bool:
        """Pin the request's path and give every token a slot, if then `spare` slots are left; tell if it worked."""
        request, prompt = self.requests[index], self.prompts[index]
        spans = _spans(request)
        known = [node for key, _, _ in spans if (node := self.cache.nodes.get(key)) is not None]
        self.cache.pin(known)
        if len(prompt) - sum(len(node.slots) for node in known) + spare > self.cache.available:
            self.cache.unpin(known)
            return False
        parent, counted = None, self.cache.counters.prefilled_tokens
        for key, start, end in spans:
            node = self.cache.nodes.get(key)
            if node is None:
                node = CacheNode(key, parent, start, prompt[:0], np.empty(0, dtype=np.int64), pins=1)
                self.cache.add(node)
            _check_same(node, parent, start, prompt[start:end])
            if len(node.slots) < end - start:
                self.cache.extend(node, prompt[start:end])
                new[node] = None
            parent = node
        assert parent is not None
        self.cache.touch(parent)
        self.paths[index] = parent
        self.cache.counters.cache_hit_tokens += len(prompt) - (self.cache.counters.prefilled_tokens - counted)
        return True

    def _rows(self, admitted: list[int]) -> Rows:
        """Rows of newly admitted requests, whose paths are filled."""
        admitted.sort(key=lambda index: len(self.prompts[index]))
        requests = np.array(admitted)
        lengths = np.array([len(self.prompts[index]) for index in admitted])
        table = np.zeros((len(admitted), int(lengths[-1])), dtype=np.int64)
        for row, index in enumerate(admitted):
            table[row, : lengths[row]] = path_slots(self.paths[index])
        hidden = [self.paths[index].hidden for index in admitted]
        device = self.model.device
        return Rows(
            requests,
            lengths,
            self.stops.start[requests],
            torch.from_numpy(lengths).to(device),
            torch.from_numpy(table).to(device),
            torch.stack([state for state in hidden if state is not None]),
        )

    # Decoding

    def _sample(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Draw the next token of every row: (R,) tokens on the device, (R,) which rows are finished."""
        requests = rows.requests
        numbers = uniforms(self.seeds[requests], self.outputs.counts[requests])
        draw = sample(self.model.logits(rows.hidden), numbers, self.params.rows(requests))
        tokens = draw.tokens.cpu().numpy()
        self.outputs.append(requests, tokens, draw.logprobs.cpu().numpy(), draw.policy_logprobs.cpu().numpy())
        rows.states = self.stops.next_state[rows.states, tokens]
        self.cache.counters.prefilled_tokens += len(tokens)
        self.cache.counters.decoded_tokens += len(tokens)
        stopped = self.stops.found[rows.states] >= 0
        full = self.outputs.counts[requests] >= self.max_new[requests]
        return draw.tokens, stopped | full | np.isin(tokens, self.eos_ids)

    def _forward(self, rows: Rows, tokens: Tensor) -> None:
        """Forward the sampled tokens (R,), giving each a slot."""
        tokens = self._make_room(tokens)
        assert self.rows is not None
        rows = self.rows
        slots = self.cache.allocate(len(rows.requests))
        self.outputs.slots[rows.requests, self.outputs.counts[rows.requests] - 1] = slots
        placed = torch.from_numpy(slots).to(self.model.device)
        if rows.lengths[-1] >= rows.table.shape[1]:
            rows.table = _widen(rows.table, rows.table.shape[1] * 5 // 4 + 32)
        rows.table.scatter_(1, rows.positions[:, None], placed[:, None])
        paged = PagedBatch(self.cache.pool, placed, self._groups(rows))
        rows.hidden = self.model.forward(tokens, rows.positions, paged)
        rows.lengths = rows.lengths + 1
        rows.positions = rows.positions + 1
        self.cache.counters.forwarded_tokens += len(slots)

    def _groups(self, rows: Rows) -> list[AttentionGroup]:
        """Cut the rows, which are sorted by length, into attention calls of bounded size."""
        most = _KEYS_PER_GROUP.get(self.model.device.type, _KEYS_PER_GROUP["cuda"])
        groups, stop = [], len(rows.lengths)
        while stop:
            width = int(rows.lengths[stop - 1]) + 1
            start = max(0, stop - max(1, most // width))
            groups.append(decode_group(rows.table[start:stop, :width], rows.positions[start:stop], start))
            stop = start
        return groups[::-1]

    def _make_room(self, tokens: Tensor) -> Tensor:
        """Until every row can have a slot, send the later half of the requests back to start again.

        From then on this call decodes no more at once than were left. Returns the tokens of the rows left.
        """
        assert self.rows is not None
        while len(self.rows.requests) > self.cache.available:
            rows = self.rows
            if len(rows.requests) == 1:
                raise self._too_large(int(rows.requests[0]), int(rows.lengths[0]) + 1)
            self.limit = len(rows.requests) // 2
            late = rows.requests >= np.sort(rows.requests)[self.limit]
            for index in np.sort(rows.requests[late])[::-1]:
                self._send_back(int(index))
            left = np.flatnonzero(~late)
            self.rows = rows.select(left)
            tokens = tokens[torch.from_numpy(left).to(tokens.device)]
        return tokens

    def _send_back(self, index: int) -> None:
        slots = self.outputs.slots[index, : self.outputs.counts[index] - 1]
        self.cache.pool.release(slots)
        self.cache.counters.evicted_tokens += len(slots)
        self.outputs.counts[index] = 0
        self.cache.unpin(self.paths.pop(index).path)
        self.waiting.appendleft(index)

    # Retirement

    def _retire(self, rows: Rows, finished: NDArray[np.bool_]) -> None:
        """Write the completions of finished rows; keep their entries unless they ended for good (eos)."""
        for row in np.flatnonzero(finished):
            index = int(rows.requests[row])
            count = int(self.outputs.counts[index])
            tokens = self.outputs.tokens[index, :count].copy()
            slots = self.outputs.slots[index, : count - 1].copy()
            parent = self.paths.pop(index)
            stop = self.stops.name(int(rows.states[row]))
            reason = self._reason(int(tokens[-1]), stop)
            if reason == "eos":
                self.cache.pool.release(slots)
            else:
                node = CacheNode(self.requests[index].turn_key, parent, len(self.prompts[index]), tokens, slots)
                node.filled, node.counted = count - 1, count
                self.cache.add(node)
            self.cache.unpin(parent.path)
            self.completions[index] = Completion(
                token_ids=tokens.tolist(),
                logprobs=self.outputs.logprobs[index, :count].tolist(),
                policy_logprobs=self.outputs.policy_logprobs[index, :count].tolist(),
                finish_reason=reason,
                stop=stop if reason == "stop" else None,
            )

    def _reason(self, token: int, stop: str | None) -> FinishReason:
        if token in self.eos_ids:
            return "eos"
        return "length" if stop is None else "stop"

    def _too_large(self, index: int, needed: int) -> ValueError:
        return ValueError(
            f"turn {self.requests[index].turn_key} needs at least {needed} cache entries (a prompt of "
            f"{len(self.prompts[index])} tokens and what it writes), but cache_tokens={self.cache.pool.limit}: raise it"
        )


def _widen(table: Tensor, width: int) -> Tensor:
    """`table` (R, C) with columns added up to `width`."""
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))


def _spans(request: Request) -> list[tuple[Key, int, int]]:
    """Key, start and end of the turns on a request's path that have tokens."""
    starts = [0, *(part.end for part in request.path)]
    return [(part.key, start, part.end) for part, start in zip(request.path, starts, strict=False) if part.end > start]


def _check_same(node: CacheNode, parent: CacheNode | None, start: int, tokens: Ints) -> None:
    same = len(node.tokens) <= len(tokens) and np.array_equal(node.tokens, tokens[: len(node.tokens)])
    if not same or node.start != start or node.parent is not parent:
        raise ValueError(
            f"turn {node.key} is in the cache with other tokens or another parent; "
            "keys must be unique among live turns (release a finished tree before its name is used again)"
        )
