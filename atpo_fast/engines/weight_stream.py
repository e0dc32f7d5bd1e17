"""Weights on their way to an engine: in buckets of bounded size, and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

T = TypeVar("T")


def in_buckets(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Neighbours in groups whose sizes sum to at most `limit`; what is larger makes a group alone."""
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


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[str, torch.Size]]:
    """By Hugging Face name: the name under which a parameter is counted (tied ones share it), and its shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    first: dict[int, str] = {}
    return {
        name: (first.setdefault(id(parameter), name), parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def checked(
    named_parameters: Iterable[tuple[str, Tensor]], expected: dict[str, tuple[str, torch.Size]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on, each parameter once. Raises KeyError and ValueError as `update_weights` says."""
    missing = {counted for counted, _ in expected.values()}
    for name, tensor in named_parameters:
        if name not in expected:
            raise KeyError(f"the engine's model has no parameter {name!r}")
        counted, shape = expected[name]
        if tensor.shape != shape:
            raise ValueError(f"{name}: new weights have shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if counted in missing:  # else it is tied to one that has come
            missing.discard(counted)
            yield counted, tensor
    if missing:
        raise ValueError(f"new weights lack {len(missing)} parameters: {', '.join(sorted(missing)[:5])}")
