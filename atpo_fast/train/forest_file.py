"""Write search trees of many questions to a file, without training: in batches, so that a killed job can continue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from atpo_fast.common.errors import ForestError, StopRequested, is_engine_error
from atpo_fast.data.questions import Question
from atpo_fast.train.run import Run
from atpo_fast.train.sampler import Sampler
from atpo_fast.train.scoring import ScoredTree, score
from atpo_fast.tree.storage import append_forest, forest_questions


@dataclass(slots=True)
class _Part:
    """A rank's trees of a batch, and how its roll-out ended."""

    trees: list[tuple[int, ScoredTree]] = field(default_factory=list)  # with the index of the question in the batch
    stopped: bool = False
    problem: str | None = None


def write_forest(run: Run, sampler: Sampler, questions: Sequence[Question], path: Path) -> int:
    """Roll out `questions` and append their trees to `path`; return how many questions the file now lacks.

    Questions that the file holds already are passed over: a tree depends on the configuration and on its own question
    only, so the file becomes the same as without an interruption. After every `train.questions_per_step` questions the
    ranks send their trees to rank 0, which writes them, also when the run is stopped or an engine fails.

    Raises:
        ForestError: the engine's servers failed, or the file cannot be written.
        ValueError: the file is damaged.
    """
    held = forest_questions(path)
    run.barrier()  # nobody writes before all have read
    trees = run.config.rollout.trees_per_question
    waiting = [question for question in questions if not _take(held, question.id, trees)]
    if run.is_main and len(waiting) < len(questions):
        run.progress.message(f"{path} holds {len(questions) - len(waiting)} of {len(questions)} questions already")
    size = run.config.train.questions_per_step
    left = len(waiting)
    for begin in range(0, len(waiting), size):
        batch = waiting[begin : begin + size]
        run.progress.start_phase("rollout", run.config.rollout.leaves * len(run.share(batch)))
        part, error = _roll_out(run, sampler, run.share(batch))
        parts = run.gather([part], run.world)
        done = _whole_questions([tree for p in parts for tree in p.trees], trees)
        if run.is_main and done:
            _append(run, path, done)
        left -= len(done) // trees
        state = f"{len(questions) - left} of {len(questions)} questions are in {path}; the same command continues"
        if error is not None and not is_engine_error(error):
            raise error
        problem = next((p.problem for p in parts if p.problem is not None), None)
        if problem is not None:
            raise ForestError(f"{problem}; {state}")
        if any(p.stopped for p in parts):
            run.progress.message(f"stopped: {state}")
            return left
        run.progress.step_done(begin // size + 1, -(-len(waiting) // size), _means(done), label="batch")
    return left


def _take(held: dict[str, int], name: str, trees: int) -> bool:
    """Tell whether the file holds so many more trees of this id, and count them as used."""
    held[name] = held.get(name, 0) - trees
    return held[name] >= 0


def _whole_questions(finished: Sequence[tuple[int, ScoredTree]], trees: int) -> list[ScoredTree]:
    """Return the trees of the questions that have all of theirs, in the order of their indices."""
    found = Counter(index for index, _ in finished)
    return [scored for index, scored in sorted(finished, key=itemgetter(0)) if found[index] == trees]


def _roll_out(run: Run, sampler: Sampler, questions: Sequence[Question]) -> tuple[_Part, Exception | None]:
    """Roll out and score this rank's part of a batch; return it with the error that ended it early."""
    part = _Part()
    try:
        for index, tree in sampler.roll_out(questions, seed=run.config.seed):
            (scored,) = score(run, [questions[index]], [tree])
            part.trees.append((run.rank + index * run.world, scored))
    except StopRequested:
        part.stopped = True
    except Exception as error:
        part.problem = str(error)
        return part, error
    return part, None


def _append(run: Run, path: Path, done: Sequence[ScoredTree]) -> None:
    try:
        append_forest(path, [scored.tree for scored in done], run.task.tokenizer)
    except OSError as error:
        raise ForestError(
            f"{path} cannot be written ({error}); what it held before is intact, and the same command continues"
        ) from error


def _means(done: Sequence[ScoredTree]) -> dict[str, float]:
    leaves = [leaf for scored in done for leaf in scored.scores]
    if not leaves:
        return {}
    return {
        "reward/mean": sum(leaf.reward for leaf in leaves) / len(leaves),
        "reward/em": sum(leaf.em for leaf in leaves) / len(leaves),
    }
