"""Evaluation, a station of a run: roll out, score, gather. Statistics and tables of it: `atpo_fast/evaluation/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from atpo_fast.common.errors import StopRequested
from atpo_fast.common.files import free_name, replacing
from atpo_fast.config import Config, RolloutConfig, as_dict
from atpo_fast.data.questions import Question
from atpo_fast.evaluation.answers import (
    FAILED,
    AnsweredQuestion,
    Sample,
    append_answers,
    read_answers,
    write_header,
)
from atpo_fast.evaluation.sets import Sets
from atpo_fast.train.digests import model_digest
from atpo_fast.train.run import Run
from atpo_fast.train.sampler import Sampler
from atpo_fast.train.scoring import ScoredTree, score
from atpo_fast.tree import TurnTree

Key = tuple[str, str]  # set and id of a question
KEYS = ("em", "f1", "reward", "format", "turns", "tool_calls")
NOTHING_EVALUATED = "there are no evaluation questions (data.eval_files): nothing will be evaluated"

_NOT_PART_OF_ANSWERS = (
    "run_dir", "device", "ranks", "deepspeed", "method", "optim", "cold_start", "train", "credit", "objective",
    "logging", "engine",
)  # fmt: skip
_QUESTION_KEYS = ("train_files", "eval_files", "max_train_questions", "max_eval_questions", "columns", "root")


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """A file that an evaluation writes, and what its answers are of."""

    path: Path
    header: dict[str, Any]


# --- during training -----------------------------------------------------------------------------------------------


def evaluate_step(run: Run, sampler: Sampler, step: int) -> dict[str, float | None]:
    """Answer the evaluation questions greedily as part of training, and log the means as a record of the metrics.

    The answers go to `eval/step_NNNNNN.jsonl`. Without questions the means are None: nothing was evaluated.

    Raises:
        StopRequested: the run was asked to stop.
    """
    questions = run.task.eval
    answered: list[AnsweredQuestion] = []
    with run.timer.phase("eval"):
        size = run.config.eval.batch_size * run.world
        run.progress.start_phase("eval", len(run.share(questions)))
        for begin in range(0, len(questions), size):
            answered += _answer(run, sampler, "eval", questions[begin : begin + size], greedy=True)
            run.stop_together()
    means: dict[str, float | None] = {
        f"eval/{key}": sum(question.mean(key) for question in answered) / len(answered) if answered else None
        for key in KEYS
    }
    means["eval/questions"] = float(len(answered))
    if run.is_main and answered:
        with replacing(run.folder / "eval" / f"step_{step:06d}.jsonl") as partial:
            append_answers(partial, answered)
    run.logger.log("eval", step, means)
    return means


# --- atpo-fast eval ------------------------------------------------------------------------------------------------


def answering_config(config: Config) -> Config:
    """Return the configuration under which `atpo-fast eval` answers: chains alone, as many as `eval.samples`."""
    given, asked = config.rollout, config.eval
    rollout = RolloutConfig(
        strategy="chain",
        initial_chains=asked.samples,
        temperature=asked.temperature or given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        max_turn_tokens=given.max_turn_tokens,
        max_response_tokens=given.max_response_tokens,
        schedule=given.schedule,
        straggler_seconds=given.straggler_seconds,
    )
    return replace(config, rollout=rollout)


def answer_header(config: Config, model: Path) -> dict[str, Any]:
    """Describe what the answers of a model under a configuration (`answering_config`) are of.

    Two headers are equal if and only if their answers may stand in one file. The digest of the configuration is over
    all that the answers and their scores depend on, and not over which questions are asked.
    """
    settings = {name: value for name, value in as_dict(config).items() if name not in _NOT_PART_OF_ANSWERS}
    for section, keys in (("data", _QUESTION_KEYS), ("model", ("path",)), ("eval", ("sets", "batch_size"))):
        settings[section] = {name: value for name, value in settings[section].items() if name not in keys}
    settings["engine"] = config.engine.name
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "model": str(model),
        "model_digest": model_digest(model),
        "config_digest": hashlib.sha256(text.encode()).hexdigest()[:16],
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
    }


def answered_before(run: Run, file: AnswerFile, asked: Mapping[Key, Question]) -> list[AnsweredQuestion]:
    """Return what a file holds of an evaluation; a file of another one is renamed, and a new one begun.

    It is of another one if its header differs, or if a question that is asked had another text or other answers. Every
    rank reads the file before rank 0 changes it.
    """
    header, answered = read_answers(file.path) if file.path.is_file() else (None, [])
    run.barrier()
    changed = [key for key, value in file.header.items() if (header or {}).get(key) != value]
    changed += ["questions"] if any(_differs(found, asked.get(found.key)) for found in answered) else []
    if not changed:
        return answered
    if run.is_main:
        if file.path.is_file():
            aside = free_name(file.path, file.path.suffix)
            file.path.rename(aside)
            run.progress.message(
                f"{file.path} held answers of another evaluation ({', '.join(changed)} changed): it is now "
                f"{aside.name}, and this one begins from nothing"
            )
        write_header(file.path, file.header)
    run.barrier()
    return []


def _differs(answered: AnsweredQuestion, asked: Question | None) -> bool:
    return asked is not None and (answered.question, answered.answers) != (asked.text, asked.answers)


def answer_sets(run: Run, sampler: Sampler, sets: Sets, file: AnswerFile) -> list[AnsweredQuestion]:
    """Answer the questions of all sets that `file` does not hold yet, and return the answers to all of them.

    After every `eval.batch_size` questions of a rank their answers are appended to the file, also when the run is asked
    to stop.

    Raises:
        StopRequested: the run was asked to stop; the same command continues.
    """
    asked: dict[Key, Question] = {(name, q.id): q for name, questions in sets.items() for q in questions}
    kept = {found.key: found for found in answered_before(run, file, asked) if found.key in asked}
    if run.is_main and kept:
        run.progress.message(f"{file.path} holds answers to {len(kept)} of {len(asked)} questions already")
    with run.timer.phase("eval"):
        for name, questions in sets.items():
            for answered in _batches(run, sampler, name, [q for q in questions if (name, q.id) not in kept]):
                kept |= {question.key: question for question in answered}
                if run.is_main and answered:
                    append_answers(file.path, answered)
                run.stop_together()
    return [kept[key] for key in asked]


def _batches(run: Run, sampler: Sampler, name: str, questions: Sequence[Question]) -> Iterator[list[AnsweredQuestion]]:
    """Yield the answered questions of each batch of a set, and show how far it is."""
    size, samples = run.config.eval.batch_size * run.world, run.config.eval.samples
    greedy = not run.config.eval.temperature
    done: list[AnsweredQuestion] = []
    for number, begin in enumerate(range(0, len(questions), size), start=1):
        batch = questions[begin : begin + size]
        run.progress.start_phase(f"eval {name}", len(run.share(batch)) * samples)
        answered = _answer(run, sampler, name, batch, greedy=greedy)
        done += answered
        means = {f"eval/{key}": sum(q.mean(key) for q in done) / len(done) for key in ("em", "f1", "format") if done}
        run.progress.step_done(number, -(-len(questions) // size), means, label=f"eval {name}: batch")
        yield answered


# --- both ----------------------------------------------------------------------------------------------------------


def _answer(
    run: Run, sampler: Sampler, name: str, questions: Sequence[Question], *, greedy: bool
) -> list[AnsweredQuestion]:
    """Answer a batch of a set, each rank its share; returns, on every rank, those that were finished, in order.

    When the run is asked to stop, the batch ends early; the ranks find out together by `run.stop_together`.
    """
    mine = run.share(questions)
    trees: list[tuple[int, TurnTree]] = []
    with suppress(StopRequested):
        for found in sampler.roll_out(mine, seed=run.config.seed, greedy=greedy):
            trees.append(found)
    scored = score(run, [mine[index] for index, _ in trees], [tree for _, tree in trees], validation=True)
    samples = 1 if greedy else run.config.eval.samples
    places = [run.rank + index * run.world for index, _ in trees]
    finished = [(place, _answered(name, one, samples)) for place, one in zip(places, scored, strict=True)]
    parts = run.gather([finished], run.world)
    return [answered for _, answered in sorted((one for part in parts for one in part), key=itemgetter(0))]


def _answered(name: str, scored: ScoredTree, samples: int) -> AnsweredQuestion:
    """Return a question with the samples of its tree; chains that failed and left no leaf count as wrong."""
    found = [_sample(scored, number) for number in range(len(scored.scores))][:samples]
    return AnsweredQuestion(
        set=name,
        id=scored.question.id,
        question=scored.question.text,
        answers=scored.question.answers,
        samples=(*found, *[FAILED] * (samples - len(found))),
    )


def _sample(scored: ScoredTree, number: int) -> Sample:
    leaf, tree = scored.scores[number], scored.tree
    turns = [tree.turns[n] for n in tree.path(leaf.turn)[1:]]
    written = sum(len(turn.action_ids) for turn in turns)
    return Sample(
        answer=leaf.answer,
        em=leaf.em,
        f1=leaf.f1,
        reward=leaf.reward,
        rewards=leaf.rewards,
        format=leaf.format_ok,
        turns=leaf.turns,
        tool_calls=leaf.tool_calls,
        tokens=written,
        response_tokens=written + sum(len(turn.observation_ids) for turn in turns),
        response=leaf.response,
    )
