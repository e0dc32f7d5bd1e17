"""Measure a head operator: time, memory and errors, and the matrix products of its size beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from bench.core.measure import Calls, Makers, collect, device_ms, one_line, peak_bytes, quantiles, side_by_side
from bench.core.records import commit
from bench.head import calls, turn_losses
from bench.head.cases import HeadCase
from bench.head.peers import PEERS
from bench.head.problems import Outcome, Problem, errors, make_problem, turn_coefficients

_GEMMS = ("logits", "hidden_gradient", "weight_gradient")


def makers(case: HeadCase, device: str) -> Makers:
    """Return what makes the call of each implementation; inputs are the same each time."""
    if case.operator == "turn_policy_loss":
        batch = turn_losses.make_log_probs(case, device)
        return {name: partial(turn_losses.make_call, name, batch) for name in case.implementations}
    problem = make_problem(case, device)
    return {name: partial(calls.make_call, name, case, problem) for name in case.implementations}


def measure(case: HeadCase, device: str, seconds: float) -> dict[str, Any]:
    """Run a case and return the fields of its record."""
    run = _run_turn_loss if case.operator == "turn_policy_loss" else _run_head
    return run(case, device, seconds)


def _run_head(case: HeadCase, device: str, seconds: float) -> dict[str, Any]:
    """Measure an operator on hidden states between the three plain matrix products of the same size."""
    problem = make_problem(case, device)
    rows = problem.turns.rows.numel()

    def first(_: str, call: calls.Call) -> dict[str, Any]:
        """Read errors from the first call, which may compile, and memory from the second."""
        found = errors(case, problem, call())
        collect(device)
        outcome, peak = peak_bytes(call, device)
        return {"errors": found, "peak_bytes": peak, "gradient_bytes": _gradient_bytes(outcome)}

    def about(name: str) -> dict[str, Any]:
        return {"note": PEERS[name].note, "same_work": PEERS[name].same_work, "version": _version(name)}

    gemms = partial(_gemms, problem, rows, case.mode)
    entries, _, samples = side_by_side(makers(case, device), first, about, device, seconds, beside=gemms)
    gemm_ms = {name: quantiles(samples[name])["p50"] for name in _GEMMS if samples.get(name)}
    flops = 2 * rows * case.shape[1] * case.shape[2]
    for entry in entries.values():
        if "ms" in entry:
            ms = entry["ms"]["p50"]
            counts = (2,) if case.mode == "forward" else (6, 8)
            entry["tflops"] = {f"{n}ADV": flops * n / 2 / ms / 1e9 for n in counts}
            entry["fraction_of_gemm"] = sum(gemm_ms.values()) / ms
    return {"rows": rows, "gemm_ms": gemm_ms, "implementations": entries}


def _gradient_bytes(outcome: Outcome) -> int:
    kept = (outcome.hidden_gradient, outcome.weight_gradient)
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def _gemms(problem: Problem, rows: int, mode: str) -> Calls:
    """Make what the work costs at least: the matrix products of the rows with loss, in the dtype of the inputs."""
    hidden, weight = problem.head.hidden.detach()[:rows], problem.head.weight.detach()
    logits: dict[str, Tensor] = {}

    def product() -> None:
        logits["value"] = hidden @ weight.t()

    product()
    found: Calls = {"logits": product}
    if mode != "forward":
        found["hidden_gradient"] = lambda: logits["value"] @ weight
        found["weight_gradient"] = lambda: logits["value"].t() @ hidden
    return found


def _run_turn_loss(case: HeadCase, device: str, seconds: float) -> dict[str, Any]:
    """Measure the loss on given log-probs: wall time, and on a GPU also the time of the device without the host."""
    batch = turn_losses.make_log_probs(case, device)

    def first(_: str, call: Callable[[], turn_losses.Result]) -> dict[str, Any]:
        error = _turn_loss_error(batch, call()[1])
        (_, gradient), peak = peak_bytes(call, device)
        kept = gradient.numel() * gradient.element_size()
        return {"errors": {"gradient": error}, "peak_bytes": peak, "gradient_bytes": kept}

    def about(name: str) -> dict[str, Any]:
        return {"note": turn_losses.NOTES.get(name, ""), "same_work": True, "version": _version(name)}

    entries, timed, _ = side_by_side(makers(case, device), first, about, device, seconds)
    for name, entry in entries.items():
        if device == "cuda" and "ms" in entry and name != "published_loop":
            try:
                entry["device_ms"] = device_ms(timed[name])
            except Exception as error:
                entry["device_ms_error"] = one_line(error)
    return {"rows": batch.turns.rows.numel(), "implementations": entries}


def _turn_loss_error(batch: turn_losses.LogProbs, gradient: Tensor) -> dict[str, float]:
    """Compare with float64, relative to the largest and to the mean true value."""
    turns, logprob = batch.turns, batch.logprob.detach().double()
    if batch.offsets is None:
        logprob, gradient = (x.view(-1, 2, turns.length)[:, 0].reshape(-1) for x in (logprob, gradient))
    truth = turn_coefficients(turns, logprob)
    gap = (gradient.double() - truth).abs()
    return {"max": float(gap.max() / truth.abs().max()), "mean": float(gap.mean() / truth.abs().mean())}


def _version(name: str) -> str:
    return commit() if name in ("ours", "published_loop") else PEERS[name].version
