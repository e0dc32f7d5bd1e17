"""Cases of a decoder layer and of the whole update (forward, loss, backward, optimizer)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from bench.core.case import Case

FLAT_PEERS = ("flat", "flat_varlen", "flat_xformers", "flat_full_head", "flat_varlen_full_head", "flat_padded")
PEERS = (*FLAT_PEERS, "tree_flex_dense")
CPU_PEERS = ("flat", "flat_full_head", "flat_padded")
LAYER_PEERS = ("flat", "flat_varlen", "flat_xformers", "tree_flex_dense")
OVERLAPS = {0.0: 2, 0.36: 1, 0.8: 4, 0.9: 8}  # what the published lengths are divided by: with long prompts, by more
CPU_SCALE = 16  # on a CPU, all lengths are divided by as much again


Checkpointing = Literal["none", "layer", "mlp"]


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """Trees of a forest against its trajectories written out, through a model of random weights."""

    measured_by: ClassVar[str] = "bench.update.measure"
    scope: Literal["decoder_layer", "policy_update"] = "policy_update"
    model: str
    """One of `models.SHAPES`."""
    overlap: float | None = None
    """Of a synthetic forest; None: drawn from the published search settings."""
    scale: float = 1.0
    """What the published numbers of tokens are divided by."""
    trees: int = 1
    max_tokens: int
    """Of a row."""
    clipped: float = 0.0
    """Share of the turns that are clipped, drawn at random."""
    checkpointing: Checkpointing = "none"
    layers: int | None = None
    """None: as many as the model has."""
    dtype: str = "bfloat16"

    def small(self) -> ModelCase:
        """Take a tiny model and short trees."""
        return replace(self, model="tiny", max_tokens=512, scale=80 * self.scale, dtype="float32")

    @property
    def bench(self) -> str:
        """Kind of record: a layer or an update."""
        return self.scope

    @property
    def name(self) -> str:
        """Model, forest, rows, and what differs from the defaults."""
        forest = "published" if self.overlap is None else f"overlap{self.overlap:g}"
        parts = [self.scope, self.model, forest, f"rows{self.max_tokens}", self.dtype]
        parts += [f"checkpoint_{self.checkpointing}"] if self.checkpointing != "none" else []
        parts += [f"clipped{self.clipped:g}"] if self.clipped else []
        parts += [f"layers{self.layers}"] if self.layers is not None else []
        return "-".join(parts)


def for_device(kind: str) -> list[ModelCase]:
    """List the cases of "cuda" or "cpu"."""
    return _cuda() if kind == "cuda" else _cpu()


def _cuda() -> list[ModelCase]:
    def update(model: str, max_tokens: int = 65536, **more: Any) -> ModelCase:
        return ModelCase(model=model, max_tokens=max_tokens, checkpointing="layer", peers=PEERS, **more)

    def synthetic(model: str, overlap: float, **more: Any) -> ModelCase:
        return update(model, overlap=overlap, scale=OVERLAPS[overlap], **more)

    small, middle, large = "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"
    must_show = [
        synthetic(middle, 0.36),
        synthetic(middle, 0.8),
        update(large),
        update(small),
        update(middle),
        replace(update(middle), checkpointing="mlp", peers=()),
        replace(update(large), clipped=0.5, peers=("none_clipped",)),
    ]
    layer = ModelCase(scope="decoder_layer", model=large, max_tokens=65536, peers=LAYER_PEERS)
    rest = [
        *(replace(layer, model=model) for model in (large, middle, small)),
        *(replace(layer, overlap=overlap, scale=OVERLAPS[overlap]) for overlap in OVERLAPS),
        *(synthetic(middle, overlap) for overlap in OVERLAPS),
        replace(synthetic(middle, 0.8, max_tokens=4096), peers=("tree_repeated", "flat")),
        *(
            replace(update(model, rows), peers=("tree_repeated", *PEERS))
            for model in (large, middle, small)
            for rows in (16384, 32768)
        ),
        *(synthetic(model, overlap) for model in (large, small) for overlap in (0.36, 0.8)),
        *(replace(update(model), clipped=0.5, peers=("none_clipped",)) for model in (middle, small)),
        replace(update(middle, 16384), checkpointing="none", peers=()),
    ]
    return [replace(case, quick=True) for case in must_show] + rest


def _cpu() -> list[ModelCase]:
    published = ModelCase(model="qwen3-20m", scale=CPU_SCALE, max_tokens=4096, dtype="float32", peers=CPU_PEERS)

    def synthetic(overlap: float) -> ModelCase:
        scale = CPU_SCALE * OVERLAPS[overlap]
        return replace(published, overlap=overlap, scale=scale, peers=("flat", "flat_full_head"))

    must_show = [
        synthetic(0.36),
        synthetic(0.8),
        published,
        replace(published, clipped=0.5, checkpointing="layer", peers=("none_clipped",)),
    ]
    layer = replace(published, scope="decoder_layer", peers=("flat", "tree_sdpa"))
    rest = [
        replace(synthetic(0.0), peers=("flat",)),
        replace(synthetic(0.9), peers=("flat",)),
        replace(synthetic(0.8), max_tokens=256, peers=("tree_repeated", "flat")),
        layer,
        *(replace(layer, overlap=overlap, scale=CPU_SCALE * OVERLAPS[overlap]) for overlap in (0.36, 0.8)),
    ]
    return [replace(case, quick=True) for case in must_show] + rest
