"""Weights on their way to an engine: in buckets of bounded size, and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from atpo_fast.adapters import adapter_weights

T = TypeVar("T")


def in_buckets(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield neighbours in groups whose sizes sum to at most `limit`; a larger item makes a group of its own."""
    bucket: list[T] = []
    filled = 0
    for item in items:
        if bucket and filled + size(item) > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size(item)
    if bucket:
        yield bucket


def parameter_shapes(model: nn.Module | PretrainedConfig) -> dict[str, tuple[str, torch.Size]]:
    """Map each Hugging Face name to the name under which the parameter is counted (tied ones share it), and its shape.

    A configuration gives the parameters of the causal LM that it describes.
    """
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    first: dict[int, str] = {}
    return {
        name: (first.setdefault(id(parameter), name), parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def adapter_shapes(model: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Map the names of a model's adapter weights as `parameter_shapes` does."""
    return {weight.name: (weight.name, weight.parameters[0].shape) for weight in adapter_weights(model)}


def checked(
    named_parameters: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[str, torch.Size]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on, each parameter once. Raise KeyError and ValueError as `Engine.update_weights` says."""
    missing = {counted for counted, _ in expected.values()}
    for name, tensor in named_parameters:
        if name not in expected:
            near = get_close_matches(name, expected, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise KeyError(f"the engine's model has no parameter {name!r}{hint}")
        counted, shape = expected[name]
        if tensor.shape != shape:
            raise ValueError(f"{name}: new weights have shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if counted in missing:  # else it is tied to one that has come
            missing.discard(counted)
            yield counted, tensor
    if missing:
        raise ValueError(f"new weights lack {len(missing)} parameters: {', '.join(sorted(missing)[:5])}")
