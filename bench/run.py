"""Measure the head operators and their peers side by side: one record per case in bench/results/.

    python bench/run.py                     every case of this machine (a GPU where there is one), must-show cases first
    python bench/run.py --quick             the must-show cases alone
    python bench/run.py --cases turn_policy_loss,clipped       cases whose name has one of these in it
    python bench/run.py --list

Needs torch, and triton on a GPU; peers that are not installed are skipped by name. `report_results.py` makes tables and
plots of the records.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import calls as head_calls
import torch
import turn_losses
from cases import Case, for_device
from measure import Calls, clock, device_ms, interleaved, one_line, peak_bytes, quantiles, synchronize
from peers import PEERS
from problems import Outcome, Problem, errors, make_problem, turn_coefficients
from records import RESULTS, commit, device_name, environment, slug, write_record
from torch import Tensor

_SECONDS = {"cuda": 1.0, "cpu": 3.0}  # of samples per implementation
_GEMMS = ("logits", "hidden_gradient", "weight_gradient")


def run_case(case: Case, device: str, seconds: float | None = None) -> dict[str, Any]:
    """The fields of one record."""
    seconds = _SECONDS[device] if seconds is None else seconds
    run = _run_turn_loss if case.operator == "turn_policy_loss" else _run_head
    measured = run(case, device, seconds)
    return {
        "case": case.name,
        "device": device_name(device),
        "environment": environment(),
        "clock": clock(device),
        "mode": case.mode,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "peaked": case.peaked,
        "loss_tokens": case.loss_tokens,
        "clipped": case.clipped,
        "turn_length": case.turn_length,
        "quick": case.quick,
        **measured,
    }


def _run_head(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """An operator on hidden states, between the three plain matrix products of the same size."""
    problem = make_problem(case, device)
    entries: dict[str, dict[str, Any]] = {}
    calls: Calls = {}
    for name in case.implementations:
        entries[name] = {"note": PEERS[name].note, "same_work": PEERS[name].same_work}
        try:
            call = head_calls.make_call(name, case, problem)
            entries[name] |= _first_calls(call, case, problem, device)
            calls[name] = call
        except ImportError as error:
            entries[name]["skipped"] = one_line(error)
        except Exception as error:
            entries[name]["error"] = one_line(error)
        _collect(device)
    rows = problem.turns.rows.numel()
    samples, failed = interleaved(_gemms(problem, rows, case.mode) | calls, device, seconds)
    gemm_ms = {name: quantiles(samples.pop(name))["p50"] for name in list(samples) if name in _GEMMS}
    flops = 2 * rows * case.shape[1] * case.shape[2]
    for name, taken in samples.items():
        entries[name] |= {"version": _version(name)} | _timing(taken, failed.get(name))
        if "ms" in entries[name]:
            ms = entries[name]["ms"]["p50"]
            counts = (2,) if case.mode == "forward" else (6, 8)
            entries[name]["tflops"] = {f"{n}ADV": flops * n / 2 / ms / 1e9 for n in counts}
            entries[name]["fraction_of_gemm"] = sum(gemm_ms.values()) / ms
    return {"rows": rows, "gemm_ms": gemm_ms, "implementations": entries}


def _first_calls(call: Any, case: Case, problem: Problem, device: str) -> dict[str, Any]:
    """Errors from the first call, which may compile, and memory from the second."""
    found = errors(case, problem, call())
    _collect(device)
    outcome, peak = peak_bytes(call, device)
    return {"errors": found, "peak_bytes": peak, "gradient_bytes": _gradient_bytes(outcome)}


def _gradient_bytes(outcome: Outcome) -> int:
    kept = (outcome.hidden_gradient, outcome.weight_gradient)
    return sum(x.numel() * x.element_size() for x in kept if x is not None)


def _gemms(problem: Problem, rows: int, mode: str) -> Calls:
    """What the work costs at least: the matrix products of the rows with loss, in the dtype of the inputs."""
    hidden, weight = problem.head.hidden.detach()[:rows], problem.head.weight.detach()
    logits: dict[str, Tensor] = {}

    def product() -> None:
        logits["value"] = hidden @ weight.t()

    product()
    calls: Calls = {"logits": product}
    if mode != "forward":
        calls["hidden_gradient"] = lambda: logits["value"] @ weight
        calls["weight_gradient"] = lambda: logits["value"].t() @ hidden
    return calls


def _run_turn_loss(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """The loss on given log-probs: time from the host, and on a GPU also of the device alone."""
    batch = turn_losses.make_log_probs(case, device)
    entries: dict[str, dict[str, Any]] = {}
    calls: Calls = {}
    for name in case.implementations:
        entries[name] = {"note": turn_losses.NOTES.get(name, ""), "same_work": True}
        try:
            call = turn_losses.make_call(name, batch)
            _, gradient = call()
            entries[name]["errors"] = {"gradient": _turn_loss_error(batch, gradient)}
            (_, gradient), peak = peak_bytes(call, device)
            entries[name] |= {"peak_bytes": peak, "gradient_bytes": gradient.numel() * gradient.element_size()}
            calls[name] = call
        except Exception as error:
            entries[name]["error"] = one_line(error)
    samples, failed = interleaved(calls, device, seconds)
    for name, taken in samples.items():
        entries[name] |= {"version": _version(name)} | _timing(taken, failed.get(name))
        if device == "cuda" and name != "published_loop":
            try:
                entries[name]["device_ms"] = device_ms(calls[name])
            except Exception as error:
                entries[name]["device_ms_error"] = one_line(error)
    return {"rows": batch.turns.rows.numel(), "implementations": entries}


def _turn_loss_error(batch: turn_losses.LogProbs, gradient: Tensor) -> dict[str, float]:
    """Relative to the largest and to the mean true value."""
    turns, logprob = batch.turns, batch.logprob.detach().double()
    if batch.offsets is None:
        logprob, gradient = (x.view(-1, 2, turns.length)[:, 0].reshape(-1) for x in (logprob, gradient))
    truth = turn_coefficients(turns, logprob)
    gap = (gradient.double() - truth).abs()
    return {"max": float(gap.max() / truth.abs().max()), "mean": float(gap.mean() / truth.abs().mean())}


def _timing(taken: list[float], failure: str | None) -> dict[str, Any]:
    return {"error": failure} if failure is not None else {"ms": quantiles(taken), "samples": len(taken)}


def _version(name: str) -> str:
    return commit() if name in ("ours", "published_loop") else PEERS[name].version


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _summary(record: dict[str, Any]) -> str:
    def entry(name: str, found: dict[str, Any]) -> str:
        if "ms" not in found:
            return f"{name} {found.get('skipped') or found.get('error')}"
        return f"{name} {found['ms']['p50']:.3f} ms"

    return "; ".join(entry(name, found) for name, found in record["implementations"].items())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", help="parts of names, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--quick", action="store_true", help="the must-show cases alone")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is started")
    parser.add_argument("--seconds", type=float, help="seconds of samples per implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    parts = options.cases.split(",")
    chosen = [
        case
        for case in for_device(options.device)
        if any(part in case.name for part in parts) and (case.quick or not options.quick)
    ]
    begun = time.perf_counter()
    for at, case in enumerate(chosen):
        spent = time.perf_counter() - begun
        if options.list:
            print(case.name)
        elif options.budget is not None and spent > options.budget:
            print(f"budget of {options.budget:g} s spent: {len(chosen) - at} cases not run")
            break
        else:
            record = run_case(case, options.device, options.seconds)
            write_record(f"{slug(options.device)}-{case.name}", case.operator, options.results, **record)
            synchronize(options.device)
            print(f"[{spent:.0f} s] {case.name}: {_summary(record)}", flush=True)


if __name__ == "__main__":
    main()
