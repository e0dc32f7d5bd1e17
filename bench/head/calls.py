"""The timed calls: what every implementation does in a case."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from atpo_kernels import linear_turn_policy_loss
from bench.head.candidates import CHANGES, changed
from bench.head.cases import HeadCase
from bench.head.peers import IGNORED, PEERS, LogProb, Peer, vectorised_turn_loss
from bench.head.problems import CLIP_HIGH, CLIP_LOW, Outcome, Problem

Call = Callable[[], Outcome]


def make_call(name: str, case: HeadCase, problem: Problem) -> Call:
    """Make the call of one implementation on one problem.

    Raises ImportError for a package that is not installed, ValueError for an implementation that cannot do the case.
    """
    if name in CHANGES:
        import_module("atpo_kernels.linear_turn_policy_loss.launch")  # there is nothing to change without Triton
        return _under(name, make_call("ours", case, problem))
    peer = PEERS[name]
    if case.operator == "linear_turn_policy_loss":
        if name == "ours":
            return lambda: _ours_turn(problem)
        if peer.turn_loss is not None:
            turn_loss = peer.turn_loss()
            return lambda: _differentiated(turn_loss(*_leaves(problem), problem), problem, None, None)
        logprob = _of(peer)
        return lambda: _turn_on_logprob(peer, logprob, problem)
    logprob = _of(peer)
    if case.mode == "forward":
        return lambda: _forward(logprob, problem)
    if case.mode == "entropy_gradient" and not peer.entropy:
        raise ValueError("no entropy")
    return lambda: _gradient(logprob, problem, case.mode == "entropy_gradient")


def _under(name: str, call: Call) -> Call:
    """Make a call of ours under the changes of a candidate; its backward is part of it."""

    def under() -> Outcome:
        with changed(name):
            return call()

    return under


def _of(peer: Peer) -> LogProb:
    if peer.logprob is None:
        raise ValueError("gives no log-probs")
    return peer.logprob()


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.head.hidden, problem.head.weight


def _differentiated(loss: Tensor, problem: Problem, logprob: Tensor | None, entropy: Tensor | None) -> Outcome:
    gradients = torch.autograd.grad(loss, _leaves(problem))
    values = (None if x is None else x.detach() for x in (logprob, entropy))
    return Outcome(*values, *gradients)


@torch.no_grad()
def _forward(logprob: LogProb, problem: Problem) -> Outcome:
    return Outcome(*logprob(*_leaves(problem), problem.head.targets, False), None, None)


def _gradient(logprob: LogProb, problem: Problem, through_entropy: bool) -> Outcome:
    values, entropy = logprob(*_leaves(problem), problem.head.targets, through_entropy)
    if values.dim() == 0:  # a sum over tokens: another gradient, and no log-probs
        return _differentiated(values, problem, None, None)._replace(hidden_gradient=None, weight_gradient=None)
    loss = torch.dot(values.float(), problem.upstream[0])
    if through_entropy:
        assert entropy is not None
        loss = loss + torch.dot(entropy.float(), problem.upstream[1])
    return _differentiated(loss, problem, values, entropy)


def _ours_turn(problem: Problem) -> Outcome:
    hidden, weight = _leaves(problem)
    turns, targets, old = problem.turns, problem.head.targets, problem.turns.old_logprob
    advantages = turns.advantages
    if len(turns.rows) < len(targets):
        hidden, targets, old = hidden.index_select(0, turns.rows), targets[turns.rows], old[turns.rows]
        advantages = advantages[turns.rows[:: turns.length] // turns.length]
    out = linear_turn_policy_loss(
        hidden,
        weight,
        targets,
        old,
        advantages,
        turn_offsets=turns.offsets,
        reduction="token-mean",
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
    )
    return _differentiated(out.loss, problem, out.logprob, out.entropy)


def _turn_on_logprob(peer: Peer, logprob: LogProb, problem: Problem) -> Outcome:
    """Compute the loss of `vectorised_turn_loss` on a peer's log-probs."""
    hidden, weight = _leaves(problem)
    turns, targets, old = problem.turns, problem.head.targets, problem.turns.old_logprob
    advantages, share = turns.advantages, turns.acting / max(turns.rows.numel(), 1)
    if len(turns.rows) < len(targets):
        if peer.without_loss == "left out":
            hidden, targets, old = hidden.index_select(0, turns.rows), targets[turns.rows], old[turns.rows]
            at = turns.rows[:: turns.length] // turns.length
            advantages, share = advantages[at], share[at]
        elif peer.without_loss == "ignore_index":
            targets = torch.where(turns.acting.repeat_interleave(turns.length), targets, IGNORED)
    values, entropy = logprob(hidden, weight, targets, False)
    loss = vectorised_turn_loss(values.float(), old, advantages, share, turns.length)
    return _differentiated(loss, problem, values, entropy)
