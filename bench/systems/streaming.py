"""The streaming schedule of rollouts against the synchronous one, with tools that take 10 to 500 ms.

    OMP_NUM_THREADS=1 python -m bench streaming

A simulated engine samples from the requests' seeds and sleeps as long as a decode step of a batch takes: a constant, a
time per row and a time per token that has to be prefilled. The trees of both schedules are compared turn by turn,
token ids and log-probs included. Writes bench/results/cpu/streaming.json; the target is 1.5 times fewer wall seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines import Completion, Engine, EngineCounters, Request
from atpo_fast.engines.base import TurnKey
from atpo_fast.environment import ToolBox
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.telemetry.phases import PhaseTimer
from atpo_fast.tree import TurnTree
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer
from bench.core.records import device_name, write_record

TARGET = 1.5
QUESTIONS, CHAINS, ROUNDS, EXPANSIONS = 16, 10, 2, 6
TURN_TOKENS = (20, 150)
CALL_SHARE, CALL_LIMIT = 0.75, 6  # share of turns that call a tool, and calls on a path at most
TOOL_SECONDS = (0.01, 0.5)
WORDS = "one two three four five six seven eight nine ten"
TOKENIZER = word_level_tokenizer(split_words(f"{WORDS} \n Page one is about"))
WORD_IDS = TOKENIZER.encode(f" {WORDS}", add_special_tokens=False)
OPEN, CLOSE = (TOKENIZER.encode(tag, add_special_tokens=False) for tag in ("<search>", "</search>"))
ANSWER = TOKENIZER.encode("<answer> nine</answer><eos>", add_special_tokens=False)


@dataclass(frozen=True)
class StepTime:
    """Duration of a decode step in seconds: `base + row * rows + token * prefilled tokens`."""

    base: float
    row: float
    token: float

    def of(self, rows: int, prefilled: int) -> float:
        """Return the seconds that a decode step of so many rows and prefilled tokens takes."""
        return self.base + self.row * rows + self.token * prefilled


SPEEDS = {
    "2 ms": StepTime(0.002, 2e-6, 1e-5),
    "5 ms": StepTime(0.005, 5e-6, 2e-5),
}


class SimulatedEngine(Engine):
    """An engine that draws turns from the requests' seeds and sleeps as long as decoding would take."""

    def __init__(self, step: StepTime) -> None:
        self.counters = EngineCounters()
        self.step = step
        self.steps = self.rows = 0
        self._left: dict[TurnKey, int] = {}  # number of tokens left to decode by request in flight
        self._written: dict[TurnKey, Completion] = {}
        self._prefill = 0
        self._due = 0.0  # when the next step ends

    def submit(self, requests: Sequence[Request]) -> None:
        """Begin requests: the last observation on each path is prefilled."""
        for request in requests:
            completion = write(request)
            self._left[request.turn_key] = len(completion.token_ids)
            self._written[request.turn_key] = completion
            self._prefill += len(request.prompt_ids) - (request.path[-2].end if len(request.path) > 1 else 0)

    def poll(self) -> list[tuple[TurnKey, Completion]]:
        """Run one decode step and return the turns that it ends."""
        self.steps, self.rows = self.steps + 1, self.rows + len(self._left)
        now = time.perf_counter()
        self._due = max(self._due, now - 0.001) + self.step.of(len(self._left), self._prefill)  # sleep is not exact
        time.sleep(max(0.0, self._due - now))
        self._prefill = 0
        self._left = {key: left - 1 for key, left in self._left.items()}
        done = [key for key, left in self._left.items() if left == 0]
        for key in done:
            del self._left[key]
        return [(key, self._written.pop(key)) for key in done]

    def release(self, tree: Hashable) -> None:
        """Do nothing: no prefix is kept."""

    def reset_prefix_cache(self) -> None:
        """Do nothing: no prefix is kept."""

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Do nothing: the engine has no weights."""

    def sleep(self) -> None:
        """Do nothing: there is no memory to give back."""

    def wake(self) -> None:
        """Do nothing: no memory was given back."""


def write(request: Request) -> Completion:
    """Draw a turn: words, then a call or the answer, with random log-probs."""
    rng = np.random.default_rng(request.seed)
    ids = rng.choice(WORD_IDS, size=rng.integers(*TURN_TOKENS)).tolist()
    calls = len(request.path) <= CALL_LIMIT and bool(rng.random() < CALL_SHARE)
    query = rng.choice(WORD_IDS, size=5).tolist()  # hardly ever the same twice: identical calls run once
    ids += [*OPEN, *query, *CLOSE] if calls else ANSWER
    logprobs = (-rng.exponential(size=len(ids))).tolist()
    return Completion(
        token_ids=ids,
        logprobs=logprobs,
        policy_logprobs=logprobs,
        finish_reason="stop" if calls else "eos",
        stop="</search>" if calls else None,
    )


class SlowSearch:
    """A search tool that takes a random time."""

    name = "search"

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, argument: str) -> str:
        """Answer after a random time of 10 to 500 ms."""
        time.sleep(self.rng.uniform(*TOOL_SECONDS))
        return "Page one is about " + argument


def roll_out(schedule: str, step: StepTime) -> tuple[list[TurnTree], dict[str, Any]]:
    """Roll out under a schedule and return the trees and what it took."""
    rollout = RolloutConfig(
        initial_chains=CHAINS,
        expansion_rounds=ROUNDS,
        expansions_per_round=EXPANSIONS,
        schedule=schedule,  # type: ignore[arg-type]
    )
    engine, timer = SimulatedEngine(step), PhaseTimer()
    toolbox = ToolBox([SlowSearch()], workers=QUESTIONS * CHAINS)
    search = TreeSearch(engine, TOKENIZER, toolbox, rollout, ToolsConfig(call_limit=CALL_LIMIT), cache_tokens=10**9)
    questions = [Question(id=f"q{i}", text="one", answers=("nine",)) for i in range(QUESTIONS)]
    prompts = [WORD_IDS * 10] * QUESTIONS
    begun = time.perf_counter()
    trees = in_order(search.roll_out(questions, prompts, seed=0, timer=timer))
    seconds, phases = time.perf_counter() - begun, timer.pop()
    return trees, {
        "seconds": seconds,
        "engine_seconds": phases["rollout/generate"],
        "waiting_seconds": phases.get("rollout/tools", 0.0),
        "decode_steps": engine.steps,
        "rows_per_step": engine.rows / engine.steps,
        "turns": search.counters.turns,
        "tool_calls": search.counters.tool_calls,
    }


def contents(trees: Sequence[TurnTree]) -> list[Any]:
    """List everything in the trees, in order."""
    return [
        (
            *(t.parent, t.finish_reason, t.tool, t.multiplicity),
            *(ids.tolist() for ids in (t.action_ids, t.observation_ids, t.logprobs)),
        )
        for tree in trees
        for t in tree.turns
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: measure, compare, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench streaming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    results = {}
    for name, step in SPEEDS.items():
        (expected, synchronous), (trees, streaming) = (roll_out(s, step) for s in ("synchronous", "streaming"))
        assert contents(trees) == contents(expected), "the schedules gave different trees"
        speedup = synchronous["seconds"] / streaming["seconds"]
        results[name] = {"synchronous": synchronous, "streaming": streaming, "speedup": speedup}
        seconds = f"{synchronous['seconds']:.1f} s synchronous, {streaming['seconds']:.1f} s streaming"
        print(f"decode step of {name}: {seconds}, {speedup:.2f}x, identical trees")
    write_record(
        "streaming",
        "streaming",
        "cpu",
        device=device_name("cpu"),
        questions=QUESTIONS,
        leaves=CHAINS + ROUNDS * EXPANSIONS,
        turn_tokens=TURN_TOKENS,
        tool_seconds=TOOL_SECONDS,
        step_seconds={name: [step.base, step.row, step.token] for name, step in SPEEDS.items()},
        identical_trees=True,
        target=TARGET,
        results=results,
    )
