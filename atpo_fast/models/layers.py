"""What the layers of a Hugging Face causal LM compute, as far as trees depend on it, read from its configuration.

The policy's packed rows and the embedded engine's cache both need to know how far each layer sees and which shape its
keys have. `find_problems` says of a model what of it they would compute wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from atpo_fast.recurrent.layers import NEEDED, known_types

FULL, SLIDING = "full_attention", "sliding_attention"
_WORDS = {
    FULL: "full attention",
    "linear_attention": "a layer with a state",
    "conv": "a short convolution",
    "mlp": "an MLP",
    "moe": "a mixture of experts",
}
_SAME_KIND = {"attention": FULL}  # other names for the same
_DROPOUT = "attention_dropout"
# Rotary frequencies that follow the longest position of a call, which in a packed row is another trajectory's.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer of a model: what it computes, and the shape of its keys and values."""

    index: int
    kind: str
    """The name in `config.layer_types`: full_attention, sliding_attention, linear_attention, ..."""
    window: int | None = None
    """A query sees the last `window` keys of its path; None: all."""
    query_heads: int = 0
    key_heads: int = 0
    head_dim: int = 0
    supported: bool = True
    """Whether trees can be computed through the layer."""

    @property
    def attends(self) -> bool:
        """Whether the layer has keys and values."""
        return self.kind in (FULL, SLIDING)

    @property
    def description(self) -> str:
        """What the layer is, in words."""
        return f"attention over a window of {self.window}" if self.window else _WORDS.get(self.kind, self.kind)


def describe_layers(config: PretrainedConfig) -> list[Layer]:
    """Describe every decoder layer of a model, supported or not. Raises ValueError where windows have no size."""
    kinds, window = _kinds(config), getattr(config, "sliding_window", None)
    known = {FULL, SLIDING, *known_types(config)}
    if SLIDING in kinds and not window:
        raise ValueError(f"{config.model_type}: layer_types has {SLIDING}, but sliding_window={window}")
    own = getattr(config, "per_layer_config", None)  # Gemma 4: other shapes for layers of other kinds
    found = []
    for index, kind in enumerate(kinds):
        shape = config if own is None else own[index]
        heads = config.num_attention_heads
        width = getattr(shape, "head_dim", None) or config.hidden_size // heads
        keys = getattr(shape, "num_key_value_heads", None) or heads
        seen = window if kind == SLIDING else None
        found.append(Layer(index, kind, seen, heads, keys, width, supported=kind in known))
    return found


def _kinds(config: PretrainedConfig) -> list[str]:
    """Name the kind of every layer; a model without such a list has the same everywhere."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds:
        return [_SAME_KIND.get(kind, kind) for kind in kinds]
    return [SLIDING if getattr(config, "sliding_window", None) else FULL] * config.num_hidden_layers


def layer_problems(layers: Iterable[Layer]) -> list[str]:
    """Say which layers are of no supported kind: a line for each kind, with the layers' numbers."""
    kinds: dict[str, list[int]] = {}
    for layer in layers:
        if not layer.supported:
            kinds.setdefault(layer.kind, []).append(layer.index)
    return [f"{_numbers(found)} of type {kind}: not supported on trees" for kind, found in kinds.items()]


def find_problems(model: PreTrainedModel) -> list[str]:
    """List what of a model would be computed wrongly on trees, by layer where it is one; empty: nothing known.

    Only the model's classes and configuration are looked at, so it may be on the device "meta".
    """
    config = model.config
    if getattr(config, "num_hidden_layers", None) is None:
        return [f"{type(model).__name__} is more than a language model; give a checkpoint of its text part"]
    return [*layer_problems(describe_layers(config)), *_structure_problems(model), *_config_problems(config)]


def _structure_problems(model: PreTrainedModel) -> Iterator[str]:
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False) and model.config.model_type not in NEEDED:
        yield f"{name} does not let its attention be replaced"
    layers: Sequence[nn.Module] | None = getattr(model.base_model, "layers", None)
    if layers is None or not isinstance(model.get_output_embeddings(), nn.Module):
        yield f"{name} is no causal LM with decoder layers at .model.layers and a head at .lm_head"
        return
    attention = {layer.index for layer in describe_layers(model.config) if layer.attends}
    hidden = [i for i, layer in enumerate(layers) if i in attention and any(map(_keeps_state, layer.modules()))]
    if hidden:
        yield f"{_numbers(hidden)}: a recurrent or convolutional part beside the attention is not supported on trees"


def _keeps_state(module: nn.Module) -> bool:
    """Say whether a module mixes tokens without attention: a convolution over them, or a state-space recurrence."""
    return isinstance(module, nn.Conv1d) or "A_log" in module._parameters


def _config_problems(config: PretrainedConfig) -> Iterator[str]:
    bidirectional: Any = getattr(config, "use_bidirectional_attention", None)
    if bidirectional in (True, "all"):
        yield f"use_bidirectional_attention={bidirectional}: tokens see later ones, which a tree does not have"
    if rate := getattr(config, _DROPOUT, None):
        yield f"{_DROPOUT}={rate}: attention over trees has no dropout; set it to 0"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in ropes.values() if any(isinstance(x, dict) for x in ropes.values()) else [ropes]:
        if rope and rope.get("rope_type") in _ROPE_BY_LENGTH:
            yield f"rope_type={rope['rope_type']}: its frequencies follow the longest trajectory of a row"


def _numbers(layers: Sequence[int]) -> str:
    """Name layers by number: "layers 0-4, 6-10"."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(words)}"
