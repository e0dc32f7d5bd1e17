"""The outcome reward of a trajectory: score the leaves of search trees by the rewards of a task.

The default is the published rule of the AT2PO question-answering runs:

1. Format: equal, non-zero counts of `<think>` and `</think>`; exactly one `<answer>` and one `</answer>`, in this
   order; every tool call followed in order by its closing tag, `<result>` and `</result>`; a `\\boxed{...}` in the
   answer. A failure earns `format_penalty`, whatever the answer.
2. Answer: the last balanced `\\boxed{...}` (or `\\fbox{...}`) inside the first `<answer>...</answer>`.
3. Exact match and F1 against the best of the accepted answers, both normalised.
4. F1 = 0 earns 0. Otherwise the metric (exact match or F1), or F1 + `tool_bonus` when both search and python were used.

5. `reward.overlong` subtracts from any of these up to `factor`, linearly over the last `share` of the limit
   of the response, tool results included (DAPO, arXiv:2503.14476).

In validation steps 1 and 5 cost nothing; only an answer that cannot be read earns the penalty of step 1. Another task
reads the answer in another way (step 2, `environment/extraction.py`, with the format that goes with it) or has other
rewards (`environment/rewards/`); step 5 is the same for all.

Two differences are deliberate. The published check runs over the whole response, so a retrieved passage that happens to
hold a tag changes its verdict. Here the text of results is left out: only what the policy wrote counts, and the
environment's own `<result>` markers. And where the chat template has already begun the reply (`<think>`, at the end of
the prompt), that is part of what is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.common.errors import RewardError
from atpo_fast.common.event_loop import LazyEventLoop
from atpo_fast.config import OverlongConfig, RewardConfig
from atpo_fast.data.matching import exact_match, f1_score
from atpo_fast.data.questions import Question
from atpo_fast.environment.decoding import decode, decode_actions, decode_observations
from atpo_fast.environment.extraction import EXTRACTIONS, Extraction, FormatFault, turn_format_ok
from atpo_fast.environment.own_code import place_of
from atpo_fast.environment.rewards import PUBLISHED, Earned, Reward, Trajectory, earn
from atpo_fast.environment.rewards.named import NAMED
from atpo_fast.environment.tags import TAGS, format_result, open_tag
from atpo_fast.tree.turn_tree import Floats, TurnTree


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRules:
    """What a task scores by; without arguments, the published rule.

    Attributes:
        extraction: how the answer is read, and what format is asked for.
        rewards: rewards that are added up.
        opening: beginning of every reply that the chat template has written.
        loop: event loop on which async rewards run.
    """

    extraction: Extraction = EXTRACTIONS["boxed"]
    rewards: tuple[Reward, ...] = (PUBLISHED,)
    opening: str = ""
    loop: LazyEventLoop = field(default_factory=lambda: LazyEventLoop("rewards"))

    @property
    def reads_score(self) -> bool:
        """Whether a reward looks at the environment's score of a trajectory, or may do so."""
        return any(r.signature is not None or r.function is NAMED["session"] for r in self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafScore:
    """The score of one leaf.

    `em` and `f1` are those of the answer, 0 when none can be read, whether the format holds or not. `answer` is what
    was read as such. `tool_calls` counts the turns that called a tool, `turns` all turns after the prompt. `overlong`
    is the part of `reward` that the length took, 0 or less. `turn_rewards` is the sum of what the environment gave for
    its turns, beside `reward`. `rewards` holds the task's rewards by name, unweighted.
    `outcome` says why the reward is what it is, one of OUTCOMES. `response` is all text after the prompt.
    """

    turn: int
    reward: float
    em: float
    f1: float
    format_ok: bool
    tool_calls: int
    turns: int
    answer: str | None
    overlong: float = 0.0
    turn_rewards: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict, compare=False)
    outcome: str = field(default="", compare=False)
    response: str = field(default="", compare=False, repr=False)


RIGHT, WRONG, UNREAD = "right", "wrong", "unread"
TOKEN_LIMIT, CALL_LIMIT = "token_limit", "call_limit"
OUTCOMES = (RIGHT, WRONG, UNREAD, TOKEN_LIMIT, CALL_LIMIT, *get_args(FormatFault))
"""Why a trajectory earned what it did: a right or a wrong answer in the asked format; one in the format that cannot be
read; cut at a limit of tokens; ended after a call that could not be answered (no room, a tool too late, or a strategy
that ends where no call is left); or the rule of the format that is broken."""


def outcome(trajectory: Trajectory, finish_reason: str) -> str:
    """Say why a trajectory earned what it did, given how its last turn ended: one of OUTCOMES.

    Where the environment has scored it, a score above 0 is right, and there is no format to keep.
    """
    if trajectory.score is not None and trajectory.score > 0:
        return RIGHT
    fault = WRONG if trajectory.score is not None else trajectory.fault
    if fault is None:
        return UNREAD if trajectory.answer is None else RIGHT if trajectory.em else WRONG
    return {"length": TOKEN_LIMIT, "stop": CALL_LIMIT}.get(finish_reason, fault)


def score_trees(
    trees: Sequence[TurnTree],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardConfig,
    *,
    rules: ScoringRules | None = None,
    validation: bool = False,
    max_response_tokens: int | None = None,
) -> list[list[LeafScore]]:
    """Score every leaf of every tree, in the order of `tree.leaves`, and set its reward on the tree.

    Sets `tree.turn_rewards` too where turns have a `turn_penalty`, or the environment rewarded them. Each turn is
    decoded once. A tree without leaves gives an empty list.

    Args:
        trees: unscored trees.
        questions: `questions[i]` belongs to `trees[i]`.
        tokenizer: decodes the turns.
        reward: options of the rewards that come with the package, and what is taken off any.
        rules: how the answer is read, and the rewards; none: the published rule.
        validation: whether format (of published and arpo_f1) and length cost nothing.
        max_response_tokens: longest trajectory after the prompt, which `reward.overlong` needs.

    Raises:
        ValueError: not as many questions as trees, or no `max_response_tokens` where it is needed.
        RewardError: a reward failed on a trajectory, and its failures end the run.
    """
    if len(trees) != len(questions):
        raise ValueError(f"{len(trees)} trees were given with {len(questions)} questions")
    if reward.overlong.share and max_response_tokens is None:
        raise ValueError("reward.overlong compares lengths with the limit of a response: give max_response_tokens")
    rules = rules or ScoringRules()
    limit = None if validation or not reward.overlong.share else max_response_tokens
    groups = [
        _trajectories(tree, question, tokenizer, reward, rules, validation)
        for tree, question in zip(trees, questions, strict=True)
    ]
    earned = earn(rules.rewards, groups, reward, rules.loop)
    return [
        _scores(tree, group, mine, reward.overlong, limit)
        for tree, group, mine in zip(trees, groups, earned, strict=True)
    ]


def overlong_penalty(tokens: int, limit: int, overlong: OverlongConfig) -> float:
    """Compute what `tokens` of response are penalised for under a limit: 0 or less, `-factor` at the limit itself."""
    buffer = overlong.share * limit
    return min(0.0, -(tokens - (limit - buffer)) / buffer * overlong.factor)


def _trajectories(
    tree: TurnTree,
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardConfig,
    rules: ScoringRules,
    validation: bool,
) -> list[Trajectory]:
    """Read the trajectories of a tree's leaves, and set the rewards of its turns where they have any."""
    written, responses = _turn_texts(tree, tokenizer, rules.opening)
    tree.turn_rewards = _turn_rewards(tree, written, reward)
    prompt = decode(tokenizer, tree.turns[0].observation_ids.tolist())
    found = []
    for leaf in tree.leaves:
        path = tree.path(leaf)[1:]
        text = "".join(written[n] for n in path)
        answer = _answer(text, question, leaf, rules.extraction)
        fault = rules.extraction.fault(text, answer)
        found.append(
            Trajectory(
                question=question,
                prompt=prompt,
                response="".join(responses[n] for n in path),
                written=text,
                answer=answer,
                em=exact_match(answer, question.answers, reward.normalise) if answer is not None else 0.0,
                f1=f1_score(answer, question.answers, reward.normalise) if answer is not None else 0.0,
                format_ok=fault is None,
                fault=fault,
                turns=len(path),
                tool_calls=sum(tree.turns[n].tool is not None for n in path),
                token_ids=tree.path_ids(leaf)[len(tree.turns[0].observation_ids) :],
                validation=validation,
                leaf=leaf,
                score=tree.turns[leaf].score,
                turn_rewards=sum(tree.turns[n].step_reward or 0.0 for n in path),
            )
        )
    return found


def _turn_rewards(tree: TurnTree, written: Sequence[str], reward: RewardConfig) -> Floats | None:
    """Add up what each turn earns itself, (N,): what the environment gave, and the penalty of a broken format."""
    steps = np.array([turn.step_reward or 0.0 for turn in tree.turns])
    if not reward.turn_penalty:
        return steps if steps.any() else None
    turns = zip(written, tree.turns, strict=True)
    broken = [not turn_format_ok(text, turn.tool is not None) for text, turn in turns]
    return steps + np.array([0.0, *broken[1:]]) * -reward.turn_penalty


def _scores(
    tree: TurnTree, trajectories: list[Trajectory], earned: list[Earned], overlong: OverlongConfig, limit: int | None
) -> list[LeafScore]:
    """Set the rewards of a tree's leaves, less the penalty of their lengths; returns their scores."""
    scores = []
    for trajectory, mine in zip(trajectories, earned, strict=True):
        penalty = overlong_penalty(trajectory.tokens, limit, overlong) if limit is not None else 0.0
        score = LeafScore(
            turn=trajectory.leaf,
            reward=mine.total + penalty,
            em=trajectory.em,
            f1=trajectory.f1,
            format_ok=trajectory.format_ok,
            tool_calls=trajectory.tool_calls,
            turns=trajectory.turns,
            answer=trajectory.answer,
            overlong=penalty,
            turn_rewards=trajectory.turn_rewards,
            rewards=mine.by_name,
            outcome=outcome(trajectory, tree.turns[trajectory.leaf].finish_reason),
            response=trajectory.response,
        )
        tree.set_reward(trajectory.leaf, score.reward)
        scores.append(score)
    return scores


def _turn_texts(tree: TurnTree, tokenizer: PreTrainedTokenizerBase, opening: str) -> tuple[list[str], list[str]]:
    """Return for each turn what the policy wrote, with empty result markers where a tool has answered, and all text.

    What the policy wrote continues the `opening` of the chat template, with which its first turns begin.
    """
    turns = tree.turns[1:]
    actions, observations = decode_actions(tokenizer, turns), decode_observations(tokenizer, turns)
    result = open_tag(TAGS.result)
    written, responses = [""], [""]
    for turn, action, observation in zip(turns, actions, observations, strict=True):
        marked = format_result("") if observation.lstrip().startswith(result) else ""
        written.append(f"{'' if turn.parent else opening}{action}{marked}")
        responses.append(f"{action}{observation}")
    return written, responses


def _answer(text: str, question: Question, leaf: int, extraction: Extraction) -> str | None:
    """Read the answer of a trajectory. Raises RewardError for a function of the user's own that fails."""
    try:
        answer = extraction.read(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"returned {answer!r}, and not text or None")
    except Exception as error:
        raise RewardError(
            f"task.answer failed: {type(error).__name__}: {error}{place_of(error)}; question {question.id!r} "
            f"({question.text[:80]!r}), leaf {leaf}, whose text begins {text[:160]!r}"
        ) from error
    return answer
