"""A rank's inference side: engine, tools and tree search, fed with the policy's weights; and its batches of trees.

A batch that is begun ahead is sampled by the weights of the step before it: its staleness is 1. One thread rolls it
out; the engine belongs to that thread until `join`, so weights are synced only after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from transformers import AutoConfig

from atpo_fast.adapters import AdapterSettings
from atpo_fast.common.errors import StopRequested
from atpo_fast.data.questions import Question
from atpo_fast.engines import make_engine
from atpo_fast.engines.base import LeaderFailedError
from atpo_fast.environment import ToolWatch, check_tools, make_toolbox
from atpo_fast.environment.decoding import decode
from atpo_fast.environment.sessions import StateTree, with_opening
from atpo_fast.policy import Policy
from atpo_fast.rollout import TreeSearch, begin_sessions
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.run import Run
from atpo_fast.train.schedule import Draw
from atpo_fast.train.weights import adapter_parameters, whole_parameters
from atpo_fast.tree import TurnTree


class Sampler:
    """The sampler of this rank's questions.

    The engine holds its own copy of the model at `folder`, because ZeRO-3 shards the trainer's; `sync` brings it up
    to date, a bucket of parameters at a time. `adapters` are those of the policy, for an engine that can hold them.
    """

    def __init__(self, run: Run, folder: Path | str, device: torch.device, adapters: AdapterSettings | None = None):
        config = run.config
        self._run = run
        check_tools(config.tools)
        self._policy: Policy | None = None  # policy whose weights the engine has; None: it has those of its folder
        positions: int = AutoConfig.from_pretrained(folder).max_position_embeddings
        self.engine = make_engine(
            config,
            folder,
            run.task.tokenizer,
            device,
            max_positions=positions,
            adapters=adapters,
            current_weights=self._current_weights,
        )
        toolbox = make_toolbox(config.tools, run.task.passages, run.task.tools)
        self._watch = ToolWatch(toolbox.counts, toolbox.last_failures)
        self.tree_search = TreeSearch(
            self.engine,
            run.task.tokenizer,
            toolbox,
            config.rollout,
            config.tools,
            cache_tokens=config.engine.cache_tokens,
            max_positions=min(positions, self.engine.max_positions or positions),
            sessions=run.task.sessions,
        )

    def counts(self) -> dict[str, float]:
        """Return the counters of the engine under `tokens/`, of the tree search under `count/`, of each tool under
        `tool/NAME/`, of sessions under `session/`, all since the start.
        """
        tokens = {
            f"tokens/{name.removesuffix('_tokens')}": float(n) for name, n in asdict(self.engine.counters).items()
        }
        tools = {
            f"tool/{tool}/{name}": float(n)
            for tool, counts in self.tree_search.toolbox.counts.items()
            for name, n in asdict(counts).items()
        }
        sessions = self.tree_search.sessions
        acting = {} if sessions is None else {f"session/{n}": float(v) for n, v in asdict(sessions.counts).items()}
        counters = {f"count/{name}": float(n) for name, n in asdict(self.tree_search.counters).items()}
        return tokens | tools | acting | counters

    def sync(self, policy: Policy) -> None:
        """Give the engine the policy's weights; a collective under ZeRO-3."""
        self._policy = policy
        with self._run.timer.phase("sync"):
            self.engine.update_weights(self._weights(policy))

    def _current_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Stream the weights that the engine has once more; a collective under ZeRO-3. None: those of its folder."""
        return None if self._policy is None else self._weights(self._policy)

    def _weights(self, policy: Policy) -> Iterable[tuple[str, Tensor]]:
        """Stream what the engine takes of a policy; a collective under ZeRO-3."""
        stream = adapter_parameters if self.engine.holds_adapters else whole_parameters
        return stream(policy, self.engine.bucket_bytes)

    def roll_out(
        self, questions: Sequence[Question], *, seed: int, greedy: bool = False, timer: PhaseTimer | None = None
    ) -> Iterator[tuple[int, TurnTree]]:
        """Yield (index of the question, a search tree of it) as each tree is finished.

        Args:
            seed: seed of the sampling.
            greedy: one chain at temperature 0, for evaluation.
            timer: times a roll-out beside something else, which has the run's timer and progress display to itself.

        Raises:
            StopRequested: the run was asked to stop.
            ToolFailureError: a tool answered none of its calls; after the last tree.
        """
        run = self._run
        report = self._report if timer is None else self._check_stop
        timer = timer or run.timer

        def roll_out(asked: Sequence[Question]) -> Iterator[tuple[int, TurnTree]]:
            states = self._begin_sessions(asked, seed, timer)
            try:
                prompts = self._prompts(asked, states)
                return self.tree_search.roll_out(
                    asked, prompts, seed=seed, greedy=greedy, on_progress=report, timer=timer, states=states
                )
            except BaseException:
                if run.task.sessions is not None and states is not None:
                    run.task.sessions.release(states)
                raise

        self.engine.wake()
        trees = self.engine.for_all(questions, roll_out)
        while True:
            with timer.phase("rollout"):
                try:
                    finished = next(trees, None)
                except LeaderFailedError:  # if the leader was asked to stop, the ranks find out together
                    raise StopRequested from None
            if finished is None:
                break
            yield finished
        self.engine.sleep()
        self._watch.settle()

    def _begin_sessions(self, asked: Sequence[Question], seed: int, timer: PhaseTimer) -> list[StateTree] | None:
        """Open the first session of each question, where there is an environment."""
        sessions = self._run.task.sessions
        if sessions is None:
            return None
        with timer.phase("rollout/open"):
            return begin_sessions(sessions, asked, seed)

    def _prompts(self, asked: Sequence[Question], states: Sequence[StateTree] | None) -> list[list[int]]:
        """Encode the prompts of questions, with the openings of their sessions, which are cut as results are."""
        task, limit = self._run.task, self._run.config.tools.max_result_tokens
        prompts = []
        for i, question in enumerate(asked):
            opening = states[i].opening if states is not None else None
            if opening:
                kept = task.tokenizer.encode(opening, add_special_tokens=False)[:limit]
                question = with_opening(question, decode(task.tokenizer, kept))
            prompts.append(task.encode_prompt(question))
        return prompts

    def gauges(self) -> dict[str, float]:
        """Return the greatest number of sessions that lived at once since this was last asked, and the hung threads."""
        sessions = self.tree_search.sessions
        if sessions is None:
            return {}
        return {"session/live": float(sessions.take_peak()), "session/hung": float(sessions.hung)}

    def _check_stop(self, done: int, total: int, decoded_tokens: int) -> None:
        self._run.stop.check()

    def _report(self, done: int, total: int, decoded_tokens: int) -> None:
        self._run.stop.check()
        self._run.progress.advance(done, decoded_tokens=decoded_tokens)


@dataclass(slots=True)
class Batch:
    """This rank's questions of a draw, and the unscored trees of each, in the same order."""

    draw: Draw
    weights_step: int  # number of steps that the policy had learned when it sampled the trees
    questions: Sequence[Question]
    trees: list[list[TurnTree]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)  # counts of `Sampler.counts` for this batch
    seconds: float = 0.0
    waited: float = 0.0  # the part of `seconds` for which `take` has waited
    phases: dict[str, float] = field(default_factory=dict)  # seconds by phase, where the batch was rolled out ahead
    error: BaseException | None = None

    @property
    def staleness(self) -> int:
        """Steps by which the weights that sampled the trees are older than those that learn from them."""
        return self.draw.step - self.weights_step


class BatchSampler:
    """A source of batches, rolled out one at a time: when one is wanted, or a step ahead while the policy learns.

    Args:
        sampler: sampler that rolls out.
        questions: function that gives this rank's questions of a draw.
        seed: function that gives the seed of a draw.
    """

    def __init__(self, sampler: Sampler, questions: Callable[[Draw], Sequence[Question]], seed: Callable[[Draw], int]):
        self._sampler, self._questions, self._seed = sampler, questions, seed
        self._ahead: tuple[Batch, Thread] | None = None

    def begin(self, draw: Draw, weights_step: int) -> None:
        """Roll out a later step's draw in the background; call `join` before the engine is used otherwise."""
        batch = Batch(draw, weights_step, self._questions(draw))
        thread = Thread(target=self._roll_out, args=(batch, PhaseTimer()), name=f"rollout-{draw.step}", daemon=True)
        self._ahead = batch, thread
        thread.start()

    def join(self) -> None:
        """Wait for the batch that was begun, which is kept for `take`."""
        if self._ahead is not None:
            self._ahead[1].join()

    def take(self, draw: Draw) -> Batch:
        """Return the batch of a draw: the one begun ahead, or a new one. Raise what its roll-out raised.

        After StopRequested, which the ranks have to find out together, it has no trees.
        """
        begun = time.monotonic()
        self.join()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].draw == draw:
            batch = ahead[0]
        else:
            batch = Batch(draw, draw.step, self._questions(draw))
            self._roll_out(batch, None)
        if batch.error is not None:
            raise batch.error
        batch.waited = time.monotonic() - begun
        return batch

    def _roll_out(self, batch: Batch, timer: PhaseTimer | None) -> None:
        begun, before = time.monotonic(), self._sampler.counts()
        try:
            finished = self._sampler.roll_out(batch.questions, seed=self._seed(batch.draw), timer=timer)
            batch.trees = by_question(finished, len(batch.questions))
        except StopRequested:
            pass
        except BaseException as error:
            batch.error = error
        batch.seconds = time.monotonic() - begun
        batch.counts = {name: count - before[name] for name, count in self._sampler.counts().items()}
        batch.counts |= self._sampler.gauges()
        batch.phases = timer.pop() if timer is not None else {}


def by_question(finished: Iterable[tuple[int, TurnTree]], questions: int) -> list[list[TurnTree]]:
    """Collect the trees of a roll-out by their question, one list for each of `questions`."""
    trees: list[list[TurnTree]] = [[] for _ in range(questions)]
    for index, tree in finished:
        trees[index].append(tree)
    return trees
