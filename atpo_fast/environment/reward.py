"""The outcome reward of a trajectory: the published rule of the AT2PO question-answering runs.

1. Format: equal, non-zero counts of `<think>` and `</think>`; exactly one `<answer>` and one `</answer>`, in this
   order; every tool call followed in order by its closing tag, `<result>` and `</result>`; a `\\boxed{...}` in the
   answer. A failure earns `format_penalty`, whatever the answer.
2. Answer: the last balanced `\\boxed{...}` (or `\\fbox{...}`) inside the first `<answer>...</answer>`.
3. Exact match and F1 against the best of the accepted answers, both normalised.
4. F1 = 0 earns 0. Otherwise the metric (exact match or F1), or F1 + `tool_bonus` when both search and python were used.

5. `reward.overlong` subtracts from any of these up to `factor`, linearly over the last `share` of the limit
   of the response, tool results included (DAPO, arXiv:2503.14476).

In validation steps 1 and 5 cost nothing; only an answer that cannot be read earns the penalty of step 1.

One difference is deliberate. The published check runs over the whole response, so a retrieved passage that happens to
hold a tag changes its verdict. Here the text of results is left out: only what the policy wrote counts, and the
environment's own `<result>` markers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import OverlongConfig, RewardConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment.tags import TAGS, close_tag, format_result, open_tag
from atpo_fast.tree.turn_tree import TurnTree

_CALL_TAGS = ("search", "python")
_YES_NO = ("yes", "no", "noanswer")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafScore:
    """The score of one leaf.

    `em` and `f1` are those of the answer, 0 when none can be read, whether the format holds or not. `answer` is what
    stands in the box. `tool_calls` counts the turns that called a tool, `turns` all turns after the prompt. `overlong`
    is the part of `reward` that the length took, 0 or less.
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


def score_trees(
    trees: Sequence[TurnTree],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardConfig,
    *,
    validation: bool = False,
    max_response_tokens: int | None = None,
) -> list[list[LeafScore]]:
    """Score every leaf of every tree, in the order of `tree.leaves`, and set its reward on the tree.

    Sets `tree.turn_rewards` too where turns have a `turn_penalty`. Each turn is decoded once. A tree
    without leaves gives an empty list.

    Args:
        trees: unscored trees.
        questions: `questions[i]` belongs to `trees[i]`.
        tokenizer: decodes the turns.
        reward: the rule.
        validation: whether format and length cost nothing.
        max_response_tokens: longest trajectory after the prompt, which `reward.overlong` needs.

    Raises:
        ValueError: not as many questions as trees, or no `max_response_tokens` where it is needed.
    """
    if len(trees) != len(questions):
        raise ValueError(f"{len(trees)} trees were given with {len(questions)} questions")
    if reward.overlong.share and max_response_tokens is None:
        raise ValueError("reward.overlong compares lengths with the limit of a response: give max_response_tokens")
    limit = None if validation or not reward.overlong.share else max_response_tokens
    return [
        _score_tree(tree, question, tokenizer, reward, validation, limit)
        for tree, question in zip(trees, questions, strict=True)
    ]


def format_ok(text: str) -> bool:
    """Apply the published format check to a response whose results are empty (see the module docstring)."""
    thoughts = text.count(open_tag(TAGS.think))
    if thoughts == 0 or thoughts != text.count(close_tag(TAGS.think)):
        return False
    if text.count(open_tag(TAGS.answer)) != 1 or text.count(close_tag(TAGS.answer)) != 1:
        return False
    if not all(_calls_answered(text, name) for name in _CALL_TAGS):
        return False
    span = _answer_span(text)
    return span is not None and "\\boxed{" in span and "}" in span


def turn_format_ok(text: str, called: bool) -> bool:
    """Check the format of one turn: its thoughts are closed, and it either calls a tool or answers, not both.

    GTPO (arXiv:2511.14846) penalises turns with a broken format; what a turn's format is here is a choice of ours.
    """
    thoughts = text.count(open_tag(TAGS.think))
    answered = text.count(open_tag(TAGS.answer)) == text.count(close_tag(TAGS.answer)) == 1
    return 0 < thoughts == text.count(close_tag(TAGS.think)) and called != answered


def extract_answer(text: str) -> str | None:
    """Return what the last balanced `\\boxed{...}` or `\\fbox{...}` of the first answer holds, or None."""
    span = _answer_span(text)
    if span is None:
        return None
    start = max(span.rfind("\\boxed{"), span.rfind("\\fbox{"))
    while start >= 0:
        inside = _balanced(span, span.index("{", start))
        if inside is not None:
            return inside.strip()
        start = max(span.rfind("\\boxed{", 0, start), span.rfind("\\fbox{", 0, start))
    return None


def normalise_answer(text: str) -> str:
    """Return text in lower case, without ASCII punctuation and the words a, an, the, and with single spaces."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(words.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 when the prediction equals one of the answers after normalisation, else 0."""
    predicted = normalise_answer(prediction)
    return float(any(normalise_answer(answer) == predicted for answer in answers))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 of shared words over the answers; yes, no and noanswer match only themselves."""
    predicted = normalise_answer(prediction)
    return max((_f1(predicted, normalise_answer(answer)) for answer in answers), default=0.0)


def overlong_penalty(tokens: int, limit: int, overlong: OverlongConfig) -> float:
    """Compute what `tokens` of response are penalised for under a limit: 0 or less, `-factor` at the limit itself."""
    buffer = overlong.share * limit
    return min(0.0, -(tokens - (limit - buffer)) / buffer * overlong.factor)


def _score_tree(
    tree: TurnTree,
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardConfig,
    validation: bool,
    limit: int | None,
) -> list[LeafScore]:
    texts = _turn_texts(tree, tokenizer)
    if reward.turn_penalty:
        broken = [not turn_format_ok(text, turn.tool is not None) for text, turn in zip(texts, tree.turns, strict=True)]
        tree.turn_rewards = np.array([0.0, *broken[1:]]) * -reward.turn_penalty
    scores = []
    for leaf in tree.leaves:
        path = tree.path(leaf)[1:]
        calls = sum(tree.turns[n].tool is not None for n in path)
        response = "".join(texts[n] for n in path)
        score = _score_response(response, question, reward, validation, turn=leaf, tool_calls=calls, turns=len(path))
        if limit is not None:
            tokens = sum(len(tree.turns[n].action_ids) + len(tree.turns[n].observation_ids) for n in path)
            penalty = overlong_penalty(tokens, limit, reward.overlong)
            score = replace(score, reward=score.reward + penalty, overlong=penalty)
        tree.set_reward(leaf, score.reward)
        scores.append(score)
    return scores


def _score_response(
    response: str,
    question: Question,
    reward: RewardConfig,
    validation: bool,
    *,
    turn: int,
    tool_calls: int,
    turns: int,
) -> LeafScore:
    """Score one response whose results are empty."""
    answer = extract_answer(response)
    em = exact_match(answer, question.answers) if answer is not None else 0.0
    f1 = f1_score(answer, question.answers) if answer is not None else 0.0
    well_formed = format_ok(response)
    if answer is None or not (well_formed or validation):
        value = reward.format_penalty
    else:
        both_tools = all(close_tag(name) in response for name in _CALL_TAGS)
        value = _value(em, f1, both_tools, reward) - reward.turn_cost * tool_calls
    return LeafScore(
        turn=turn,
        reward=value,
        em=em,
        f1=f1,
        format_ok=well_formed,
        tool_calls=tool_calls,
        turns=turns,
        answer=answer,
    )


def _turn_texts(tree: TurnTree, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return for each turn what the policy wrote, with empty result markers where a tool has answered."""
    turns = tree.turns[1:]
    actions = tokenizer.batch_decode([turn.action_ids.tolist() for turn in turns], skip_special_tokens=True)
    observations = tokenizer.batch_decode([turn.observation_ids.tolist() for turn in turns], skip_special_tokens=True)
    opening = open_tag(TAGS.result)
    marked = [format_result("") if text.lstrip().startswith(opening) else "" for text in observations]
    return ["", *(action + mark for action, mark in zip(actions, marked, strict=True))]


def _value(em: float, f1: float, both_tools: bool, reward: RewardConfig) -> float:
    """Return the published score of a readable answer."""
    if f1 == 0:
        return 0.0
    if both_tools:
        return f1 + reward.tool_bonus
    return em if reward.metric == "em" else f1


def _calls_answered(text: str, tool: str) -> bool:
    """Return whether every opening tag of `tool` is followed in order by its closing tag and a pair of result tags."""
    position = text.find(open_tag(tool))
    while position >= 0:
        for tag in (close_tag(tool), open_tag(TAGS.result), close_tag(TAGS.result)):
            position = text.find(tag, position)
            if position < 0:
                return False
        position = text.find(open_tag(tool), position)
    return True


def _answer_span(text: str) -> str | None:
    """Return what stands between the first answer tag and the next closing one."""
    _, opened, rest = text.partition(open_tag(TAGS.answer))
    span, closed, _ = rest.partition(close_tag(TAGS.answer))
    return span if opened and closed else None


def _balanced(text: str, opening: int) -> str | None:
    """Return what stands inside the brace at `opening`, or None when it is never closed."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[opening + 1 : position]
    return None


def _f1(predicted: str, answer: str) -> float:
    if predicted != answer and (predicted in _YES_NO or answer in _YES_NO):
        return 0.0
    got, wanted = predicted.split(), answer.split()
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted)) if shared else 0.0
