"""The optimizer's state as pieces of parameters, on disk without regard to how ranks or a ZeRO stage divide it.

A rank holds pieces of flattened parameters: its partition under ZeRO-3, a slice of one large vector under ZeRO-1 and 2,
all of it without ZeRO. Each rank writes its own pieces, with where in the parameter they begin, as safetensors; whoever
loads reads the stretches that it needs, whichever files they are in. So nothing is gathered, nothing is unpickled, and
a checkpoint fits any number of ranks and any stage.

    state/rank_00000_000.safetensors    tensors `model.norm.weight|exp_avg|0`: parameter, key, first element
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from atpo_fast.common.errors import CheckpointError

MASTER = "master"  # the float32 weights behind low-precision ones
MOMENTS = ("exp_avg", "exp_avg_sq")
FOLDER = "state"


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a flattened parameter: `length` elements from `start` on."""

    name: str
    start: int
    length: int


class _Layout(Protocol):
    """How a kind of optimizer divides its state: what of it this rank holds, and access to that."""

    same_everywhere: bool
    """Whether every rank holds everything, so that each writes a share."""

    def stretch(self, parameter: Parameter) -> tuple[int, int]:
        """Return (first element, number of elements) of the parameter that this rank writes and reads."""

    def get(self, parameter: Parameter, key: str) -> Tensor:
        """Return the values of that stretch, (length,)."""

    def set(self, parameter: Parameter, key: str, values: Tensor) -> None:
        """Overwrite the values of that stretch."""

    def vectors(self) -> list[Tensor]:
        """Return the tensors to which the optimizer's own state belongs."""

    def state_made(self) -> None:
        """Take note that `vectors` have got a state."""


class OptimizerState:
    """Master weights and moments of an engine of ZeRO, read and written in pieces.

    Args:
        zero: the engine. Without a step taken it has no moments yet.
    """

    def __init__(self, zero: deepspeed.DeepSpeedEngine):
        self._parameters = {n: p for n, p in zero.module.named_parameters() if p.requires_grad}
        self._layout, self._optimizer = _layout(zero)
        low = next(iter(self._parameters.values())).dtype != torch.float32
        self._masters = (MASTER,) if low else ()  # float32 weights are their own masters

    @property
    def steps(self) -> int:
        """Number of steps that the moments have seen."""
        states = [self._optimizer.state.get(vector) for vector in self._layout.vectors()]
        return max((int(state["step"]) for state in states if state), default=0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name on disk, values) of every piece of this rank; the values are not copied."""
        keys = (*self._masters, *MOMENTS) if self.steps else self._masters
        rank, world = dist.get_rank(), dist.get_world_size()
        for number, (piece, parameter) in enumerate(self._pieces()):
            if self._layout.same_everywhere and number % world != rank:
                continue
            for key in keys:
                yield f"{piece.name}|{key}|{piece.start}", self._layout.get(parameter, key).detach()

    def restore(self, stored: StoredState, steps: int) -> None:
        """Read this rank's pieces. Raises CheckpointError when the files do not hold them all."""
        keys = self._masters
        if steps:
            self._make_moments(steps)
            keys = (*keys, *MOMENTS)
        with torch.no_grad():
            for piece, parameter in self._pieces():
                for key in keys:
                    self._layout.set(parameter, key, stored.read(piece, key))

    def _pieces(self) -> Iterator[tuple[Piece, Parameter]]:
        for name, parameter in self._parameters.items():
            start, length = self._layout.stretch(parameter)
            if length > 0:
                yield Piece(name, start, length), parameter

    def _make_moments(self, steps: int) -> None:
        """Give the optimizer the state that its first step would have made."""
        torchs_own = isinstance(self._optimizer, torch.optim.AdamW)
        for vector in self._layout.vectors():
            self._optimizer.state[vector] = {
                "step": torch.tensor(float(steps)) if torchs_own else steps,
                **{key: torch.zeros_like(vector, memory_format=torch.preserve_format) for key in MOMENTS},
            }
        self._layout.state_made()


class StoredState:
    """The pieces that all ranks of a checkpoint have written.

    Raises CheckpointError when a file is not safetensors of pieces.
    """

    def __init__(self, files: Sequence[Path]):
        self._found: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                for tensor in file.keys():  # noqa: SIM118  # it is no mapping
                    name, key, start = tensor.rsplit("|", 2)
                    (length,) = file.get_slice(tensor).get_shape()
                    self._found.setdefault((name, key), []).append((int(start), length, file, tensor))
            except Exception as error:  # safetensors has an error of its own, for which it is no OSError
                raise CheckpointError(f"{path}: not a file of optimizer state ({error})") from error
        for stretches in self._found.values():
            stretches.sort(key=lambda stretch: stretch[0])

    def read(self, piece: Piece, key: str) -> Tensor:
        """Read a stretch, (length,), from the files that cover it. Raises CheckpointError when they do not."""
        parts: list[Tensor] = []
        position, end = piece.start, piece.start + piece.length
        for start, length, file, tensor in self._found.get((piece.name, key), ()):
            if start <= position < start + length and position < end:
                stop = min(end, start + length)
                parts.append(file.get_slice(tensor)[position - start : stop - start])
                position = stop
        if position < end:
            raise CheckpointError(
                f"the checkpoint lacks {key} of {piece.name} from element {position} on: it is of another model"
            )
        return torch.cat(parts)


# --- layouts -------------------------------------------------------------------------------------------------------


def _layout(zero: deepspeed.DeepSpeedEngine) -> tuple[_Layout, torch.optim.Optimizer]:
    """Choose the layout of an engine's optimizer; returns it with the optimizer that does the steps."""
    wrapper = zero.optimizer
    if isinstance(wrapper, torch.optim.Optimizer) and not hasattr(wrapper, "optimizer"):
        return _Whole(wrapper, {}), wrapper
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _Partitioned(wrapper), wrapper.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapper, name):
            return _Sliced(wrapper, name), wrapper.optimizer
    masters = {
        low: master
        for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for low, master in zip(lows, highs, strict=True)
    }
    return _Whole(wrapper.optimizer, masters), wrapper.optimizer


class _Partitioned:
    """ZeRO-3: an equal share of every parameter for each rank, the last ones padded."""

    same_everywhere = False

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper

    def stretch(self, parameter: Any) -> tuple[int, int]:
        share = parameter.ds_tensor.ds_numel
        start = share * dist.get_rank(group=parameter.ds_process_group)
        return start, min(share, parameter.ds_numel - start)

    def get(self, parameter: Any, key: str) -> Tensor:
        _, length = self.stretch(parameter)
        state_key = None if key == MASTER else key
        values: Tensor = self._wrapper.get_local_fp32_param(parameter, state_key)
        return values[:length]

    def set(self, parameter: Any, key: str, values: Tensor) -> None:
        share = values.new_zeros(parameter.ds_tensor.ds_numel)
        share[: len(values)] = values
        if key == MASTER:
            safe_set_local_fp32_param(parameter, share)
        else:
            safe_set_local_optimizer_state(parameter, share, key)

    def vectors(self) -> list[Tensor]:
        return list(self._wrapper.fp32_partitioned_groups_flat)

    def state_made(self) -> None:
        """Do nothing: DeepSpeed looks the state up."""


class _Sliced:
    """ZeRO-1 and 2: all parameters behind one another, of which each rank has a slice."""

    same_everywhere = False

    def __init__(self, wrapper: Any, vectors: str):
        self._wrapper, self._vectors = wrapper, vectors
        if wrapper.optimizer.state:
            self.state_made()

    def stretch(self, parameter: Any) -> tuple[int, int]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0
        return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel

    def get(self, parameter: Any, key: str) -> Tensor:
        fragment: Tensor = parameter._hp_mapping.get_hp_fragment(None if key == MASTER else key)
        return fragment

    def set(self, parameter: Any, key: str, values: Tensor) -> None:
        self.get(parameter, key).data.copy_(values)

    def vectors(self) -> list[Tensor]:
        return list(getattr(self._wrapper, self._vectors))

    def state_made(self) -> None:
        self._wrapper._lazy_init_hp_params_optimizer_state()


class _Whole:
    """No ZeRO: every rank has everything.

    Args:
        optimizer: the optimizer.
        masters: float32 weights of low-precision parameters.
    """

    same_everywhere = True

    def __init__(self, optimizer: torch.optim.Optimizer, masters: dict[Parameter, Tensor]):
        self._optimizer, self._masters = optimizer, masters

    def stretch(self, parameter: Parameter) -> tuple[int, int]:
        return 0, parameter.numel()

    def get(self, parameter: Parameter, key: str) -> Tensor:
        vector = self._masters.get(parameter, parameter)
        values: Tensor = vector if key == MASTER else self._optimizer.state[vector][key]
        return values.flatten()

    def set(self, parameter: Parameter, key: str, values: Tensor) -> None:
        vector = self._masters.get(parameter, parameter)
        target = vector if key == MASTER else self._optimizer.state[vector][key]
        target.data.view(-1).copy_(values)

    def vectors(self) -> list[Tensor]:
        return [vector for group in self._optimizer.param_groups for vector in group["params"]]

    def state_made(self) -> None:
        """Do nothing: the state lies with each parameter."""
