"""Measure a layer and the whole update in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atpo_fast.tree import overlap
from bench.core.measure import Makers, peak_bytes, side_by_side
from bench.core.records import package_version
from bench.packing.forests import PUBLISHED, forest_of_overlap, random_forest, written_out
from bench.packing.rows import flat_rows, tree_rows, visible_pairs, with_clipped_turns
from bench.update.cases import ModelCase
from bench.update.contenders import CONTENDERS, Model, Rows, make_layer, make_update, padded_tokens
from bench.update.models import SHAPES, Shape, Work, peak_flops


class Layouts:
    """A case's forest, packed in every way that is compared."""

    def __init__(self, case: ModelCase):
        shape = SHAPES[case.model]
        if case.overlap is None:
            forest = random_forest(case.trees, PUBLISHED.scaled(case.scale), shape.vocab)
        else:
            forest = forest_of_overlap(case.overlap, case.trees, case.scale, shape.vocab)
        longest = max(tree.unique_tokens for tree in written_out(forest))
        self.overlap = overlap(forest)
        self.trees = tree_rows(forest, case.max_tokens, longest if case.scope == "policy_update" else 0)
        self.repeated = tree_rows(forest, case.max_tokens)
        self.flat = flat_rows(forest, case.max_tokens)
        self.padded = flat_rows(forest, min(case.max_tokens, padded_tokens(longest)))
        self.unclipped = self.trees
        self.unique = _work(tree_rows(forest, max(tree.unique_tokens for tree in forest)))
        self.flattened = _work(self.flat)

    @torch.no_grad()
    def clip(self, share: float, model: Model) -> None:
        """Give the trees' rows old log-probs that clip a share of their turns."""
        clipped, unclipped = [], []
        for row in self.trees:
            logprob = model.policy(row.to(model.device))[0].cpu()
            clipped.append(with_clipped_turns(row, logprob, share))
            unclipped.append(replace(row, old_logprob=logprob))
        self.trees, self.unclipped = clipped, unclipped

    def rows(self, name: str) -> Rows:
        """Return the rows that a contender processes."""
        contender = CONTENDERS[name]
        if contender.padded:
            return self.padded
        if contender.flat:
            return self.flat
        if contender.repeated:
            return self.repeated
        return self.trees if contender.clipped else self.unclipped


@dataclass(frozen=True, slots=True)
class Setting:
    """The model of a case and its rows in every layout."""

    case: ModelCase
    layouts: Layouts
    model: Model

    @classmethod
    def of(cls, case: ModelCase, device: str) -> Setting:
        """Make the model and the rows of a case."""
        shape, layouts = SHAPES[case.model], Layouts(case)
        is_layer = case.scope == "decoder_layer"
        layers = 1 if is_layer else case.layers or shape.layers
        model = Model(shape, layers, getattr(torch, case.dtype), device, case.checkpointing)
        if not is_layer:
            model.make_states()
        if case.clipped:
            layouts.clip(case.clipped, model)
        return cls(case, layouts, model)

    def makers(self) -> Makers:
        """Return what makes the call of each implementation."""
        make = make_layer if self.case.scope == "decoder_layer" else make_update
        return {name: partial(make, name, self.model, self.layouts.rows(name)) for name in self.case.implementations}


def makers(case: ModelCase, device: str) -> Makers:
    """Return what makes the call of each implementation."""
    return Setting.of(case, device).makers()


def measure(case: ModelCase, device: str, seconds: float) -> dict[str, Any]:
    """Run a case and return the fields of its record."""
    setting = Setting.of(case, device)
    model, layouts, is_layer = setting.model, setting.layouts, case.scope == "decoder_layer"
    shape, layers = SHAPES[case.model], model.layers
    first = _first_layer(model, device) if is_layer else _first_update(model, device)
    least, warm = (3 if is_layer or device == "cpu" else 2), int(is_layer)  # an update's first call has warmed it up
    entries, _, _ = side_by_side(setting.makers(), first, _about, device, seconds, least=least, warm=warm)
    work = {"unique": layouts.unique, "flat": layouts.flattened}
    flops = {layout: done.flops(shape, layers, head=not is_layer) for layout, done in work.items()}
    for entry in entries.values():
        if "ms" in entry:
            entry |= _rates(entry["ms"]["p50"] / 1000, work, flops, peak_flops(device))
    bounds = _bounds(work, flops)
    if not is_layer:
        bounds["full_head"] = _full_head_bound(layouts, flops, shape)
    if case.clipped:
        bounds |= _clipped_bounds(entries["ours"].get("skipped_tokens", 0) / _tokens(layouts.trees))
    return {
        "parameters": sum(p.numel() for p in model.policy.parameters()),
        "layers": layers,
        "overlap_found": layouts.overlap,
        "tokens": {layout: done.tokens for layout, done in work.items()} | {"packed": _tokens(layouts.trees)},
        "pairs": {layout: done.pairs for layout, done in work.items()},
        "head_rows": {layout: done.head_rows for layout, done in work.items()},
        "rows": {"unique": len(layouts.trees), "flat": len(layouts.flat)},
        "flops": flops,
        "bounds": bounds,
        "implementations": entries,
    }


def _about(name: str) -> dict[str, Any]:
    return {"note": CONTENDERS[name].note, "same_work": True, "version": package_version(name)}


def _first_update(model: Model, device: str) -> Callable[[str, Callable[[], Tensor]], dict[str, Any]]:
    def first(_: str, call: Callable[[], Tensor]) -> dict[str, Any]:
        """Read memory, and loss and gradient, by which layouts can be seen to do the same."""
        model.optimizer.zero_grad()
        before = model.policy.skipped_tokens
        loss, peak = peak_bytes(call, device)
        gradients = [p.grad for p in model.policy.parameters() if p.grad is not None]
        found = {
            "loss": float(loss),
            "gradient_norm": float(torch.stack([g.double().norm() for g in gradients]).norm()),
            "peak_bytes": peak,
            "gradient_bytes": sum(g.numel() * g.element_size() for g in gradients),
            "skipped_tokens": model.policy.skipped_tokens - before,
        }
        model.optimizer.zero_grad()
        return found

    return first


def _first_layer(model: Model, device: str) -> Callable[[str, Callable[[], None]], dict[str, Any]]:
    def first(_: str, call: Callable[[], None]) -> dict[str, Any]:
        model.optimizer.zero_grad()
        _, peak = peak_bytes(call, device)
        kept = sum(p.numel() * p.element_size() for p in model.policy.parameters() if p.grad is not None)
        model.optimizer.zero_grad()
        return {"peak_bytes": peak, "gradient_bytes": kept}

    return first


def _rates(
    seconds: float, work: dict[str, Work], flops: dict[str, dict[str, float]], peak: float | None
) -> dict[str, Any]:
    """Return tokens a second, and MFU where the GPU's peak is known.

    On "unique" tokens MFU is what the GPU does; on "flat" ones it is effective: what it would have to do in the same
    time to go through the trajectories written out, and may be above 1.
    """
    found: dict[str, Any] = {"tokens_per_s": {layout: done.tokens / seconds for layout, done in work.items()}}
    if peak is not None:
        found["mfu"] = {layout: sum(parts.values()) / seconds / peak for layout, parts in flops.items()}
    return found


def _bounds(work: dict[str, Work], flops: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how many times faster trees can be than flat rows.

    `tokens` is T_flat / T_tree, the ratio of the layers' matrix products. `flops` is the ratio of all FLOPs, with the
    head on action rows in both.
    """
    unique, flat = (sum(flops[layout].values()) for layout in ("unique", "flat"))
    return {"tokens": work["flat"].tokens / work["unique"].tokens, "flops": flat / unique}


def _full_head_bound(layouts: Layouts, flops: dict[str, dict[str, float]], shape: Shape) -> float:
    """Return the ratio of all FLOPs with the head on every position of flat rows but the last of each sequence."""
    rows = layouts.flattened.tokens - sum(row.num_trajectories for row in layouts.flat)
    flat = flops["flat"] | {"head": 6.0 * rows * shape.hidden * shape.vocab}
    return sum(flat.values()) / sum(flops["unique"].values())


def _clipped_bounds(skipped: float) -> dict[str, float]:
    """Return the share of the tokens that stay in the backward, and how many times faster layers can be for it.

    With checkpointing a forward costs 1, its repetition on those tokens 1 and their backward 2.
    """
    kept = 1 - skipped
    return {"kept": kept, "clipped": 4 / (1 + 3 * kept)}


def _work(rows: Rows) -> Work:
    return Work(_tokens(rows), sum(visible_pairs(row.subtree_end) for row in rows), sum(r.num_actions for r in rows))


def _tokens(rows: Rows) -> int:
    return sum(row.num_tokens for row in rows)
