"""Demonstrations from files: what the cold start imitates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from atpo_fast.common.errors import ConfigError, DataError
from atpo_fast.data.matching import normalise_answer
from atpo_fast.data.questions import Question
from atpo_fast.data.records import Record, read_records
from atpo_fast.environment.escaping import Escaper
from atpo_fast.environment.extraction import Extraction
from atpo_fast.environment.tags import TAGS, close_tag, format_result, open_tag
from atpo_fast.task.prompt_encoder import PromptEncoder
from atpo_fast.tree.turn_tree import TurnTree

_MAX_SEARCHES = 4  # published limit is 6 calls


def read_demonstrations(path: str | Path, encode_prompt: PromptEncoder) -> list[TurnTree]:
    """Read chains from records `{"question": str, "turns": [{"action": str, "observation": str}, ...]}`.

    An action is what the policy should write, an observation is inserted after it as it stands (with its result tags);
    the last turn has none and is closed with the end-of-sequence token. Where the chat template has opened the first
    thought already, the first action's own `<think>` is left out.

    Raises FileNotFoundError for a missing file and DataError naming file, record and field for anything else.
    """
    return [_chain(record, encode_prompt) for record in read_records(path)]


def evidence_demonstrations(
    questions: Sequence[Question],
    search_tool: Callable[[str], str],
    encode_prompt: PromptEncoder,
    extraction: Extraction,
) -> list[TurnTree]:
    """Make chains that search each title of the gold evidence and then answer, where the evidence is known.

    They teach the format and when to search, not how to find titles. Observations are what `search_tool` really finds.
    A chain whose observations do not hold the answer is left out, because it would teach to make answers up; the
    answers yes and no need not be there.

    Raises:
        ConfigError: nobody knows how to write an answer that the task's own function reads.
    """
    if extraction.write is None:
        raise ConfigError(
            "cold_start.from_evidence: cannot write an answer that a function of your own (task.answer) reads: give "
            "chains in cold_start.demonstrations"
        )
    tokenizer = encode_prompt.tokenizer
    escape = Escaper(tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    chains = []
    for question in questions:
        titles = question.meta.get("evidence_titles", [])[:_MAX_SEARCHES]
        found = [search_tool(title) for title in titles]
        if not (titles and question.answers and _holds_answer(found, question.answers)):
            continue
        tree, turn = TurnTree(encode_prompt(question), question_id=question.id), 0
        for title, text in zip(map(escape, titles), found, strict=True):
            action = f"<think> I look for {title}. </think> <search> {title} </search>"
            action = action if turn else continued(action, encode_prompt.opening)
            result = format_result(text, escape)
            turn = tree.add_turn(turn, encode(action), observation_ids=encode(result))
        answer = f"<think> I know it. </think> {extraction.write(escape(question.answers[0]))}"
        tree.add_turn(turn, [*encode(answer), tokenizer.eos_token_id], finish_reason="eos")
        chains.append(tree)
    return chains


def _holds_answer(texts: Sequence[str], answers: Sequence[str]) -> bool:
    """Tell whether one of the texts holds one of the answers as whole words, or none needs to."""
    read = [f" {normalise_answer(text)} " for text in texts]
    wanted = [normalise_answer(answer) for answer in answers]
    return any(answer in ("yes", "no") or any(f" {answer} " in text for text in read) for answer in wanted)


def continued(action: str, opening: str) -> str:
    """Return a reply as it continues what the chat template has begun: without a tag that is open already."""
    tag = open_tag(TAGS.think)
    is_open = opening.count(tag) > opening.count(close_tag(TAGS.think))
    return action.lstrip().removeprefix(tag).lstrip() if is_open and action.lstrip().startswith(tag) else action


def _chain(record: Record, encode_prompt: PromptEncoder) -> TurnTree:
    tokenizer = encode_prompt.tokenizer
    text, turns = record.value.get("question"), record.value.get("turns")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{record.where}: field question must be a non-empty text")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{record.where}: field turns must be a non-empty list")
    tree = TurnTree(encode_prompt(Question(id=record.where, text=text, answers=())), question_id=record.where)
    parent = 0
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        action, observation = _texts(record, number, turn)
        action = action if number else continued(action, encode_prompt.opening)
        if bool(observation) == last:
            raise DataError(f"{record.where}: turns[{number}] must {'not ' if last else ''}have an observation")
        ids = tokenizer.encode(action, add_special_tokens=False) + ([tokenizer.eos_token_id] if last else [])
        seen = tokenizer.encode(observation, add_special_tokens=False) if observation else None
        parent = tree.add_turn(parent, ids, observation_ids=seen, finish_reason="eos" if last else "stop")
    return tree


def _texts(record: Record, number: int, turn: object) -> tuple[str, str]:
    """Return (action, observation or an empty text) of a turn."""
    if not isinstance(turn, dict):
        raise DataError(f"{record.where}: turns[{number}] must be an object with action and observation")
    action, observation = turn.get("action"), turn.get("observation") or ""
    if not isinstance(action, str) or not action or not isinstance(observation, str):
        raise DataError(f"{record.where}: turns[{number}] needs a non-empty text action, and observation as text")
    return action, observation
