"""Fused operators for policy-gradient training of agents on turns and search trees (docs/design.md#operators).

    from atpo_kernels import linear_logprob, turn_policy_loss, linear_turn_policy_loss, tree_attention

Each operator is a folder with the same files: `__init__` (public function, argument checks, dispatch), `reference`
(definition in plain PyTorch), `torch_impl` (PyTorch with bounded memory), `kernels` (Triton; a folder where one file
would be too long), `launch` (the host's side of the kernels) and `tiles` (how the work is cut). CUDA tensors take the
Triton kernels where Triton is installed, all others `torch_impl`.

Names are imported when they are first asked for: `atpo_kernels.choices` needs no PyTorch, and nothing here needs Triton
or a GPU until a kernel is launched.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atpo_kernels.fused_module import FusedLinearTurnPolicyLoss
    from atpo_kernels.linear_logprob import linear_logprob
    from atpo_kernels.linear_turn_policy_loss import linear_turn_policy_loss
    from atpo_kernels.records import LeafPaths, LinearTurnLoss, LossConfig, TokenWeights, TurnLoss
    from atpo_kernels.tree_attention import TreeBlocks, make_attention_blocks, make_tree_blocks, tree_attention
    from atpo_kernels.turn_policy_loss import turn_policy_loss

__all__ = [
    "FusedLinearTurnPolicyLoss",
    "LeafPaths",
    "LinearTurnLoss",
    "LossConfig",
    "TokenWeights",
    "TreeBlocks",
    "TurnLoss",
    "linear_logprob",
    "linear_turn_policy_loss",
    "make_attention_blocks",
    "make_tree_blocks",
    "tree_attention",
    "turn_policy_loss",
]

_OPERATORS = ("linear_logprob", "linear_turn_policy_loss", "tree_attention", "turn_policy_loss")
_MODULES = {
    **{name: name for name in _OPERATORS},
    "FusedLinearTurnPolicyLoss": "fused_module",
    **dict.fromkeys(("LeafPaths", "LinearTurnLoss", "LossConfig", "TokenWeights", "TurnLoss"), "records"),
    **dict.fromkeys(("TreeBlocks", "make_attention_blocks", "make_tree_blocks"), "tree_attention"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, whether they have been imported or not."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which the name of an operator is its function although its folder has the same name.

    Importing a folder binds it as an attribute of its package; here that binds the folder's function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPERATORS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
