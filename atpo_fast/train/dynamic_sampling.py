"""Dynamic sampling: train only on questions whose trajectories differ, and replace the others (arXiv:2503.14476).

A group without variance in its metric has no gradient under credit that compares the trajectories of a question, but
still counts in the denominators of the loss. So it is dropped before credit, and the next questions of the data take
its place until the step has its `train.questions_per_step`. Every rank holds all groups and decides alike.
docs/design.md#dynamic-sampling
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atpo_fast.common.errors import CheckpointError, DynamicSamplingError
from atpo_fast.config import DynamicSamplingConfig
from atpo_fast.train.run import Run
from atpo_fast.train.schedule import draw_questions
from atpo_fast.train.scoring import Group, score
from atpo_fast.tree.storage import append_forest, read_forest

_SURPLUS = "surplus.jsonl"


@dataclass(slots=True)
class Filled:
    """The groups of a step."""

    groups: list[Group]  # groups that are trained on
    rolled_out: list[Group] = field(default_factory=list)  # groups that were rolled out for it, dropped ones included
    kept: list[Group] = field(default_factory=list)  # surplus for the next step
    dropped: int = 0  # number of groups without variance
    discarded: int = 0  # number of groups with variance that were thrown away
    refills: int = 0  # number of roll-outs after the first


def fill(
    wanted: int,
    kept: Sequence[Group],
    roll_out: Callable[[int], list[Group]],
    settings: DynamicSamplingConfig,
) -> Filled:
    """Roll out until `wanted` groups vary; without dynamic sampling, once.

    Args:
        wanted: number of groups to train on.
        kept: surplus of the step before, which comes first.
        roll_out: function from the number of roll-outs so far to the scored groups of the next questions. It is the
            only part that ranks have to do together.
        settings: what has to vary, how often to refill, and what to do with too many groups or too few.

    Raises:
        DynamicSamplingError: too few groups vary after the last refill, and `on_exhausted` says to stop.
    """
    if not settings.enabled:
        groups = roll_out(0)
        return Filled(groups, groups)
    filled = Filled(list(kept))
    rounds = 0
    while len(filled.groups) < wanted and rounds <= settings.max_refills:
        groups = roll_out(rounds)
        varied = [group for group in groups if varies(group, settings.metric)]
        filled.rolled_out += groups
        filled.dropped += len(groups) - len(varied)
        filled.groups += varied
        rounds += 1
    filled.refills = max(rounds - 1, 0)
    if len(filled.groups) < wanted and settings.on_exhausted == "stop":
        raise DynamicSamplingError(
            f"dynamic sampling: {len(filled.rolled_out)} questions in {rounds} roll-outs gave {len(filled.groups)} of "
            f"{wanted} whose trajectories differ in {settings.metric}; raise train.dynamic_sampling.max_refills, set "
            "train.dynamic_sampling.on_exhausted=continue, or choose easier or harder questions"
        )
    surplus, filled.groups = filled.groups[wanted:], filled.groups[:wanted]
    if settings.surplus == "keep":
        filled.kept = surplus
    else:
        filled.discarded = len(surplus)
    return filled


def varies(group: Group, metric: str) -> bool:
    """Tell whether a group is trained on: its leaves differ in a field of their scores, or it has a single trajectory.

    Leaves differ exactly where the population's standard deviation is above 0. A group without leaves has nothing to
    train on.
    """
    values = {getattr(leaf, metric) for scored in group.trees for leaf in scored.scores}
    return len(values) > 1 or sum(scored.tree.num_trajectories for scored in group.trees) == 1


def describe(filled: Filled, wanted: int, metric: str) -> str:
    """Say in a line what was done to fill a step."""
    parts = [f"{filled.dropped} of {len(filled.rolled_out)} questions had no variance in {metric}"]
    parts.append(f"{filled.refills} {'refill' if filled.refills == 1 else 'refills'}")
    parts.append(f"{len(filled.groups)} of {wanted} trained on")
    if filled.kept:
        parts.append(f"{len(filled.kept)} kept for the next step")
    if filled.discarded:
        parts.append(f"{filled.discarded} thrown away")
    if len(filled.groups) < wanted:
        parts.append("no refill left, so the step is smaller")
    return f"dynamic sampling: {', '.join(parts)}"


def sampling_metrics(filled: Filled) -> dict[str, float]:
    """Count the questions of a step by what became of them."""
    return {
        "sampling/questions": float(len(filled.rolled_out)),
        "sampling/dropped": float(filled.dropped),
        "sampling/discarded": float(filled.discarded),
        "sampling/kept": float(len(filled.kept)),
        "sampling/trained": float(len(filled.groups)),
        "sampling/refills": float(filled.refills),
    }


def write_surplus(folder: Path, groups: Sequence[Group]) -> None:
    """Write the kept trees beside a checkpoint; their rewards follow from the trees. Raises OSError."""
    if groups:
        append_forest(folder / _SURPLUS, [scored.tree for group in groups for scored in group.trees])


def read_surplus(run: Run, folder: Path, kept: Sequence[Sequence[int]]) -> list[Group]:
    """Read what `write_surplus` wrote and score it; `kept` has (place, weights_step, trees) of each group.

    Raises:
        CheckpointError: the questions of the data have changed, or the file is damaged.
    """
    if not kept:
        return []
    groups = []
    try:
        trees = iter(read_forest(folder / _SURPLUS))
        for place, weights_step, count in kept:
            (question,) = draw_questions(run.task.train, run.config.seed, place, 1)
            mine = [next(trees) for _ in range(count)]
            if any(tree.question_id != question.id for tree in mine):
                raise ValueError(f"question {question.id!r} is not the one that its trees were kept for")
            groups.append(Group(place, weights_step, score(run, [question] * count, mine)))
    except (OSError, StopIteration, ValueError) as error:
        raise CheckpointError(
            f"{folder / _SURPLUS}: the questions that dynamic sampling has kept cannot be used ({error}); has the data "
            "changed since? Start a new run_dir from the weights with model.path"
        ) from error
    return groups
