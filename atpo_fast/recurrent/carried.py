"""What carries a layer's state into a packed row and out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from atpo_fast.recurrent.segments import Segments


class CarriedStates(ABC):
    """The states that the segments of a row start from and leave, by layer.

    A model gets it as the argument `seq_idx`, which transformers passes to every layer with a state.
    """

    segments: Segments

    @abstractmethod
    def continue_inputs(self, layer: int, own: Tensor, width: int) -> Tensor:  # (T, C) -> (H * width + T, C)
        """Put the last `width` inputs of the convolution of every head, zeros where none came before, before the row's.

        Keep what later rows need of them.
        """

    @abstractmethod
    def initial(self, layer: int, like: Tensor) -> Tensor | None:
        """Return the heads' states (H, ...), None where all are zero; `like` is a tensor of the row's graph."""

    @abstractmethod
    def final(self, layer: int, out: Tensor, states: Tensor) -> Tensor:  # (T, ...), (n, ...) -> (T, ...)
        """Take the states in which the segments of the last level leave the layer; return `out`."""
