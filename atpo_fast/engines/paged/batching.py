"""Continuous batching in the paged engine: admit requests, decode one token of each, retire the finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atpo_fast.engines.base import Completion, FinishReason, Request, TurnKey
from atpo_fast.engines.paged.attention import AttentionGroup, PagedBatch, decode_group
from atpo_fast.engines.paged.kv_cache import CacheNode, PrefixCache
from atpo_fast.engines.paged.model import PagedModel
from atpo_fast.engines.paged.prefill import fill, path_slots
from atpo_fast.engines.paged.requests import InFlight, RequestTable, Rows, widen
from atpo_fast.engines.paged.shared_prompts import SharedPrompt, SharedPrompts
from atpo_fast.engines.sampling import Draw, candidate_logprobs, sample, uniforms
from atpo_fast.engines.stops import StopMatcher, StopTable
from atpo_fast.recurrent.segments import Segments

Ints = NDArray[np.int64]
Span = tuple[TurnKey, int, int]  # key of a turn, where its tokens start and end on the path

_ADMISSION_SHARE = 8  # admit when this share (1/n) of the batch is idle: prefill in few, large passes
# Padded keys gathered at once: on CPU as many as stay in its caches, on GPU as many as are small beside a model.
_KEYS_PER_GROUP = {"cpu": 1 << 13, "cuda": 1 << 18}


class ContinuousBatch:
    """The requests in flight of an engine: waiting ones are in a queue, the others in the rows of the batch.

    It exists while requests are in flight. What a request samples depends on its seed and on the index of the token in
    the completion, never on its row or on what is decoded beside it.

    Args:
        eos_ids: tokens that end a completion.
        missing: ids that are never sampled, (m,) on the model's device.
        batch_size: number of requests decoded at once, at most.
    """

    def __init__(
        self, model: PagedModel, cache: PrefixCache, eos_ids: Sequence[int], missing: Tensor, batch_size: int
    ) -> None:
        self.model, self.cache, self.missing = model, cache, missing
        self.eos_ids = np.asarray(eos_ids, dtype=np.int64)
        self.limit = self.batch_size = batch_size
        self.retired = 0  # requests since `limit` was changed
        self.waiting: deque[InFlight] = deque()
        self.table = RequestTable()
        self.rows: Rows | None = None
        self.stops = StopMatcher()
        self._shared = SharedPrompts()
        self._submitted = 0

    @property
    def idle(self) -> bool:
        """Whether no request waits or is being decoded."""
        return not self.waiting and self.rows is None

    def add(self, request: Request, prompt: Ints, stops: StopTable) -> None:
        """Queue a request; `prompt` (p,) holds its token ids."""
        self.waiting.append(InFlight(request, prompt, self._submitted, self.stops.add(stops)))
        self._submitted += 1
        key, _, end = _spans(request)[0]
        if key not in self.cache.nodes:
            self._shared.add(key, prompt[:end])

    def step(self) -> list[tuple[TurnKey, Completion]]:
        """Admit what fits and decode one token of every row; return the requests that this finished."""
        self._admit()
        assert self.rows is not None
        tokens, ended = self._sample(self.rows)
        finished = self._retire(self.rows, ended)
        left = np.flatnonzero(~ended)
        self._keep(left)
        if self.rows is not None:
            self._forward(_pick(tokens, left))
        return finished

    def drop(self, keys: Collection[TurnKey]) -> None:
        """Forget some requests; then they have nothing pinned."""
        self.waiting = deque(entry for entry in self.waiting if entry.request.turn_key not in keys)
        if self.rows is not None:
            gone = np.array([self.table.entry(index).request.turn_key in keys for index in self.rows.requests])
            for row in np.flatnonzero(gone):
                self._preempt(int(row))
            self._keep(np.flatnonzero(~gone))

    def _keep(self, left: Ints) -> None:
        """Keep the rows `left` and drop the others."""
        assert self.rows is not None
        if len(left) < len(self.rows.requests):
            self.rows = self.rows.select(left) if len(left) else None

    # Admission

    def _admit(self) -> None:
        """Reserve and fill the paths of as many waiting requests as fit, and add these to the rows."""
        running = 0 if self.rows is None else len(self.rows.requests)
        if not self.waiting or (running and (self.limit - running) * _ADMISSION_SHARE < self.limit):
            return
        admitted: list[InFlight] = []
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
            raise self._too_large(self.waiting[0], len(self.waiting[0].prompt) + 1)

    def _reserve(self, entry: InFlight, spare: int, new: dict[CacheNode, None]) -> bool:
        """Pin the request's path and give every token a slot if that leaves `spare` slots; return whether it does."""
        prompt, spans = entry.prompt, self._spans_in_cache(entry)
        known = [node for key, _, _ in spans if (node := self.cache.nodes.get(key)) is not None]
        self.cache.pin(known)
        missing = len(prompt) - sum(len(node.slots) for node in known) + spare
        if missing > self.cache.available or not self.cache.has_states(len(spans) - len(known) + 1):
            self.cache.unpin(known)
            return False
        parent, counted = None, self.cache.counters.prefilled_tokens
        for key, start, end in spans:
            node = self.cache.nodes.get(key)
            if node is None:
                node = CacheNode(key, parent, start, prompt[:0], np.empty(0, dtype=np.int64), pins=1)
                node.state = self.cache.allocate_state()
                self.cache.add(node)
            if len(node.slots) < end - start:
                self.cache.extend(node, prompt[start:end])
                new[node] = None
            parent = node
        assert parent is not None
        self.cache.touch(parent)
        entry.parent, entry.carried = parent, self.cache.allocate_state()
        self.cache.counters.cache_hit_tokens += len(prompt) - (self.cache.counters.prefilled_tokens - counted)
        return True

    def _spans_in_cache(self, entry: InFlight) -> list[Span]:
        """List the spans of a request's turns; what its prompt shares with other trees is a span of its own."""
        spans = _spans(entry.request)
        key, _, end = spans[0]
        root = self.cache.nodes.get(key)
        if root is not None:
            shared, start = None if root.parent is None else root.parent.key, root.start
        else:
            beginning = self._shared.beginning(entry.prompt[:end])
            shared = None if beginning is None else (SharedPrompt(beginning.tobytes()), 0)
            start = 0 if beginning is None else len(beginning)
        return spans if shared is None else [(shared, 0, start), (key, start, end), *spans[1:]]

    def _rows(self, admitted: list[InFlight]) -> Rows:
        """Build the rows of newly admitted requests, whose paths are filled."""
        admitted.sort(key=lambda entry: len(entry.prompt))
        lengths = np.array([len(entry.prompt) for entry in admitted])
        table = np.zeros((len(admitted), int(lengths[-1])), dtype=np.int64)
        parents = [entry.parent for entry in admitted if entry.parent is not None]
        for row, parent in enumerate(parents):
            table[row, : lengths[row]] = path_slots(parent)
        hidden = [parent.hidden for parent in parents if parent.hidden is not None]
        device = self.model.device
        above, carried = (
            torch.tensor(slots, device=device)
            for slots in ([parent.state for parent in parents], [entry.carried for entry in admitted])
        )
        if self.cache.states is not None:
            self.cache.states.copy(above, carried)
        return Rows(
            np.array([self.table.add(entry) for entry in admitted]),
            lengths,
            np.array([entry.state for entry in admitted], dtype=np.int32),
            torch.from_numpy(lengths).to(device),
            torch.from_numpy(table).to(device),
            torch.stack(hidden),
            carried,
        )

    # Decoding

    def _sample(self, rows: Rows) -> tuple[Tensor, NDArray[np.bool_]]:
        """Draw the next token of every row; return (R,) tokens on the device and (R,) whether the row is finished."""
        table, indices = self.table, rows.requests
        numbers = uniforms(table.seeds[indices], table.counts[indices])
        logits = self.model.logits(rows.hidden)
        draw = sample(logits, numbers, table.sampling(indices), self.missing)
        tokens = draw.tokens.cpu().numpy()
        table.append(indices, tokens, draw.logprobs.cpu().numpy(), draw.policy_logprobs.cpu().numpy())
        if table.top[indices].any():
            self._look_up_candidates(indices, logits, draw)
        rows.states = self.stops.next_state[rows.states, tokens]
        self.cache.counters.prefilled_tokens += len(tokens)
        self.cache.counters.decoded_tokens += len(tokens)
        stopped = self.stops.found[rows.states] >= 0
        full = table.counts[indices] >= table.max_new[indices]
        return draw.tokens, stopped | full | np.isin(tokens, self.eos_ids)

    def _look_up_candidates(self, indices: Ints, logits: Tensor, draw: Draw) -> None:
        """Keep the likeliest candidates' log-probs of the rows whose requests have asked for them."""
        asking = np.flatnonzero(self.table.top[indices])
        requests, rows = indices[asking], torch.from_numpy(asking).to(logits.device)
        drawn = Draw(*(values[rows] for values in draw))
        top, temperature = self.table.top[requests], self.table.temperature[requests]
        values = candidate_logprobs(logits[rows], drawn, temperature, top, self.missing)
        self.table.append_candidates(requests, values.cpu().numpy())

    def _forward(self, tokens: Tensor) -> None:
        """Give the sampled tokens (R,) of the rows slots, and forward them."""
        tokens = self._make_room(tokens)
        rows = self.rows
        assert rows is not None
        slots = self.cache.allocate(len(rows.requests))
        self.table.slots[rows.requests, self.table.counts[rows.requests] - 1] = slots
        placed = torch.from_numpy(slots).to(self.model.device)
        if rows.lengths[-1] >= rows.table.shape[1]:
            rows.table = widen(rows.table, rows.table.shape[1] * 5 // 4 + 32)
        rows.table.scatter_(1, rows.positions[:, None], placed[:, None])
        paged = PagedBatch(self.cache.pool, placed, self._groups(rows))
        states = None
        if self.cache.states is not None:
            one_each = Segments.with_own_heads(np.ones(len(slots), dtype=np.int64), self.model.device)
            states = self.cache.states.states(rows.carried, rows.carried, one_each)
        rows.hidden = self.model.forward(tokens, rows.positions, paged, states)
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
        """Send the later half of the requests back to the queue until every row left can have a slot.

        From then on no more are decoded at once than were left; the limit rises by one after as many retirements.
        Return the tokens of the rows left.
        """
        assert self.rows is not None
        while len(self.rows.requests) > self.cache.available:
            indices = self.rows.requests
            if len(indices) == 1:
                raise self._too_large(self.table.entry(int(indices[0])), int(self.rows.lengths[0]) + 1)
            self.limit, self.retired = len(indices) // 2, 0
            numbers = self.table.numbers[indices]
            late = numbers >= np.sort(numbers)[self.limit]
            for row in np.argsort(-numbers)[: np.count_nonzero(late)]:
                self.waiting.appendleft(self._preempt(int(row)))
            left = np.flatnonzero(~late)
            self._keep(left)
            tokens = _pick(tokens, left)
        return tokens

    def _preempt(self, row: int) -> InFlight:
        """Stop decoding a request, and forget what it has sampled."""
        assert self.rows is not None
        index = int(self.rows.requests[row])
        entry = self.table.entry(index)
        slots = self.table.slots[index, : int(self.rows.lengths[row]) - len(entry.prompt)]
        self.cache.pool.release(slots)
        self.cache.release_state(entry.carried)
        self.cache.counters.evicted_tokens += len(slots)
        self._unpin(entry)
        self.table.remove(index)
        return entry

    # Retirement

    def _retire(self, rows: Rows, ended: NDArray[np.bool_]) -> list[tuple[TurnKey, Completion]]:
        """Take finished rows out and return their completions; cache entries stay unless nothing can follow (eos)."""
        finished = []
        for row in np.flatnonzero(ended):
            index = int(rows.requests[row])
            entry, count = self.table.entry(index), int(self.table.counts[index])
            key = entry.request.turn_key
            tokens = self.table.tokens[index, :count].copy()
            slots = self.table.slots[index, : count - 1].copy()
            stop = self.stops.name(int(rows.states[row]))
            reason = self._reason(int(tokens[-1]), stop)
            if reason == "eos":
                self.cache.pool.release(slots)
                self.cache.release_state(entry.carried)
            else:
                node = CacheNode(key, entry.parent, len(entry.prompt), tokens, slots, state=entry.carried)
                node.filled, node.counted = count - 1, count
                self.cache.add(node)
            self._unpin(entry)
            completion = Completion(
                token_ids=tokens.tolist(),
                logprobs=self.table.logprobs[index, :count].tolist(),
                policy_logprobs=self.table.policy_logprobs[index, :count].tolist(),
                finish_reason=reason,
                stop=stop if reason == "stop" else None,
                top_logprobs=self.table.candidates(index),
            )
            finished.append((key, completion))
            self.table.remove(index)
        self._raise_limit(len(finished))
        return finished

    def _unpin(self, entry: InFlight) -> None:
        assert entry.parent is not None
        self.cache.unpin(entry.parent.path)
        entry.parent = None

    def _raise_limit(self, retired: int) -> None:
        self.retired += retired
        if self.retired >= self.limit:
            self.limit, self.retired = min(self.limit + 1, self.batch_size), 0

    def _reason(self, token: int, stop: str | None) -> FinishReason:
        if token in self.eos_ids:
            return "eos"
        return "length" if stop is None else "stop"

    def _too_large(self, entry: InFlight, needed: int) -> ValueError:
        states, spans = self.cache.states, len(self._spans_in_cache(entry))
        if states is not None and spans + 1 > states.limit:
            return ValueError(
                f"turn {entry.request.turn_key} needs {spans + 1} states (of the turns on its path and its own), but "
                f"cache_states={states.limit}: raise it"
            )
        return ValueError(
            f"turn {entry.request.turn_key} needs at least {needed} cache entries (a prompt of "
            f"{len(entry.prompt)} tokens and what it writes), but cache_tokens={self.cache.pool.limit}: raise it"
        )


def _pick(tokens: Tensor, rows: Ints) -> Tensor:
    """Select the tokens of `rows`: (R,) → (len(rows),)."""
    return tokens if len(rows) == len(tokens) else tokens[torch.from_numpy(rows).to(tokens.device)]


def _spans(request: Request) -> list[Span]:
    """List key, start and end of the turns on a request's path that have tokens."""
    starts = [0, *(part.end for part in request.path)]
    return [(part.key, start, part.end) for part, start in zip(request.path, starts, strict=False) if part.end > start]
