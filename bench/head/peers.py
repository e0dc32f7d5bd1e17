"""Other implementations of the head operators, one adapter each; a peer that is not installed is skipped by name.

An adapter returns either a log-prob function (hidden, weight, targets, entropy_gradient) -> (logprob, entropy or None),
on top of which `vectorised_turn_loss` makes the turn loss, or a whole turn loss (hidden, weight, problem) -> loss.
Imports are inside the adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from atpo_kernels import linear_logprob
from bench.head.candidates import NOTES as OURS
from bench.head.problems import CLIP_HIGH, CLIP_LOW, Problem

LogProb = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
TurnLoss = Callable[[Tensor, Tensor, Problem], Tensor]
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The call of an implementation, and a note on how its work differs from ours."""

    package: str | None = None
    """Distribution that gives its version."""
    logprob: Callable[[], LogProb] | None = None
    turn_loss: Callable[[], TurnLoss] | None = None
    without_loss: Literal["computed", "ignore_index", "left out"] = "computed"
    """What becomes of tokens without loss: computed all the same, marked as targets to ignore, or gathered away."""
    entropy: bool = True
    """Whether it computes the entropy."""
    same_work: bool = True
    """Whether it computes what we do, so that a ratio of times means something."""
    note: str = ""

    @property
    def version(self) -> str:
        """Version of its package; torch's for plain PyTorch."""
        try:
            return version(self.package or "torch")
        except PackageNotFoundError:
            return "unknown"


def plain_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute by plain PyTorch: logits in the dtype of the inputs, statistics in float32, everything materialised."""
    logits = F.linear(hidden, weight).float()
    logprob = logits.log_softmax(-1)
    if entropy_gradient:
        entropy = -(logprob.exp() * logprob).sum(-1)
    else:
        with torch.no_grad():
            entropy = -logits.softmax(-1).mul_(logprob).sum(-1)
    return logprob.gather(-1, targets[:, None]).squeeze(-1), entropy


def vectorised_turn_loss(
    logprob: Tensor,  # (A,), whole turns
    old_logprob: Tensor,  # (A,)
    advantages: Tensor,  # (A / length,)
    share: Tensor,  # (A / length,) weight of each of the turn's tokens
    length: int,
) -> Tensor:
    """Compute the turn-clipped loss of turns of equal length by autograd, in eight small operations."""
    delta = (logprob - old_logprob).view(-1, length)
    mean = delta.detach().mean(1, keepdim=True).clamp_max(10)
    ratio = (mean + delta - delta.detach()).exp()
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return (torch.maximum(-advantages * ratio, -advantages * clipped) * share[:, None]).sum()


def _ours() -> LogProb:
    return lambda hidden, weight, targets, _: linear_logprob(hidden, weight, targets)


def _compiled() -> LogProb:
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("torch.compile is measured on CUDA only")
    return torch.compile(plain_logprob, dynamic=False)


def _trl() -> LogProb:
    function = import_module("trl.kernels").ChunkedLogProbFunction
    try:
        import_module("trl.trainer.utils")
    except ImportError:  # its backward takes one helper from there, which gathers ZeRO-3 weights
        stub = ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
        sys.modules["trl.trainer.utils"] = stub
    chunk = 32768  # of the vocabulary: what its trainer passes
    return lambda h, w, t, _: function.apply(h, w, None, t, 1.0, chunk, None, 1.0, ("entropy",))[:2]


def _liger_scaled_ce() -> LogProb:
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def logprob(hidden: Tensor, weight: Tensor, targets: Tensor, _: bool) -> tuple[Tensor, Tensor | None]:
        nll, entropy = function.apply(hidden, weight, targets, 1.0, IGNORED, 1, True)
        return -nll, entropy

    return logprob


def _liger_flce() -> LogProb:
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", ignore_index=IGNORED)
    return lambda hidden, weight, targets, _: (-loss(weight, hidden, targets), None)


def _cce() -> LogProb:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, t, _: (-function(h, w, t, reduction="none", impl="cce"), None)


def _verl() -> LogProb:
    """Load verl's kernel without its package, which imports Ray and more."""
    if "verl" not in sys.modules:
        spec = find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'verl'")
        root = spec.submodule_search_locations[0]
        for name, folder in (("verl", root), ("verl.utils", f"{root}/utils")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [folder]
    function = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda h, w, t, _: function(h, w, t, 1.0, "none", None)


def _quack() -> LogProb:
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda h, w, t, _: (-function(h, w, t, reduction="sum", ignore_index=IGNORED), None)


def _liger_grpo() -> TurnLoss:
    """Give Liger every turn as one of its sequences.

    Its chunk of sequences is set to 1024 tokens: chunks of one turn are slower.
    """
    cls = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    losses: dict[int, torch.nn.Module] = {}

    def turn_loss(hidden: Tensor, weight: Tensor, problem: Problem) -> Tensor:
        turns = problem.turns
        if turns.length not in losses:
            losses[turns.length] = cls(
                beta=0.0,
                compiled=hidden.is_cuda,
                use_ref_model=False,
                chunk_size=max(1, 1024 // turns.length),
                epsilon_low=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                loss_type="bnpo",
                importance_sampling_level="sequence",
            )
        loss, *_ = losses[turns.length](
            hidden.view(-1, turns.length, hidden.shape[1]),
            weight,
            problem.head.targets.view(-1, turns.length),
            turns.acting[:, None].expand(-1, turns.length).float(),
            turns.advantages,
            old_per_token_logps=turns.old_logprob.view(-1, turns.length),
        )
        return loss

    return turn_loss


def _liger_grpo_triton() -> TurnLoss:
    """Give Liger's Triton kernel of the loss the logits of whole turns, each as one of its sequences."""
    function = import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
    if not torch.cuda.is_available():
        raise ModuleNotFoundError("Liger's triton_grpo_loss is measured on CUDA only")

    def turn_loss(hidden: Tensor, weight: Tensor, problem: Problem) -> Tensor:
        turns = problem.turns
        padded = F.pad(hidden.view(-1, turns.length, hidden.shape[1]), (0, 0, 0, 1))  # it wants one position more
        loss, *_ = function(
            F.linear(padded, weight),
            turns.old_logprob.view(-1, turns.length),
            None,
            problem.head.targets.view(-1, turns.length),
            turns.advantages,
            completion_mask=turns.acting[:, None].expand(-1, turns.length).to(torch.int32).contiguous(),
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP_LOW,
            eps_high=CLIP_HIGH,
            inplace=True,
            loss_type="bnpo",
            importance_sampling_level="sequence",
            reduce=True,
        )
        return loss

    return turn_loss


PEERS: dict[str, Peer] = {
    "ours": Peer(package="atpo-kernels", logprob=_ours, without_loss="left out"),
    "plain": Peer(logprob=lambda: plain_logprob, note="logits in the dtype of the inputs, float32 statistics"),
    "compiled": Peer(logprob=_compiled, note="torch.compile of plain"),
    "trl": Peer(package="trl", logprob=_trl, without_loss="left out"),
    "liger_scaled_ce": Peer(package="liger-kernel", logprob=_liger_scaled_ce, without_loss="ignore_index"),
    "liger_flce": Peer(
        package="liger-kernel", logprob=_liger_flce, without_loss="ignore_index", entropy=False, note="no entropy"
    ),
    "cce": Peer(
        package="cut-cross-entropy",
        logprob=_cce,
        without_loss="ignore_index",
        entropy=False,
        note="no entropy; skips tiles of small gradient",
    ),
    "verl": Peer(package="verl", logprob=_verl),
    "quack": Peer(
        package="quack-kernels",
        logprob=_quack,
        without_loss="ignore_index",
        entropy=False,
        same_work=False,
        note="one scalar upstream gradient for all tokens, no entropy",
    ),
    "liger_grpo": Peer(
        package="liger-kernel",
        turn_loss=_liger_grpo,
        entropy=False,
        note="every turn as one sequence; no log-probs out, no entropy",
    ),
    "liger_grpo_triton": Peer(
        package="liger-kernel",
        turn_loss=_liger_grpo_triton,
        entropy=False,
        note="materialises the logits, then Liger's Triton loss on them; every turn as one sequence; no entropy",
    ),
} | {
    name: Peer(package="atpo-kernels", logprob=_ours, without_loss="left out", note=note) for name, note in OURS.items()
}
