"""Read the answer from what the policy wrote, and check its format: one way for each `task.answer`.

A text is what the policy wrote, after what the chat template has begun the reply with, and with empty results
(`<result>`, `</result>`) where a tool has answered. Every function here takes time linear in the text: a policy that
repeats itself writes thousands of unclosed tags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from atpo_fast.common.choices import AnswerKind
from atpo_fast.environment.tags import TAGS, close_tag, open_tag

CALL_TAGS = ("search", "python")
"""Tools whose calls the published format check looks at."""

FormatFault = Literal["no_answer", "no_thought", "open_thought", "answer_tags", "open_call", "no_box"]
"""Rules of the format by what breaks them: no answer was begun; no thought; as many thoughts do not end as begin; not
one answer with a beginning and an end; a call without its end or its result; no box in the answer."""

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\{|[{}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """A way to read the answer.

    Attributes:
        read: function from a text to the answer in it, or None.
        fault: function that names the rule of the format which a text, from which that answer was read, breaks first;
            None where it keeps them all.
        write: function from an answer to a text that it is read from, for demonstrations; None where nobody knows.
    """

    read: Callable[[str], str | None]
    fault: Callable[[str, str | None], FormatFault | None]
    write: Callable[[str], str] | None = None

    def well_formed(self, text: str, answer: str | None) -> bool:
        """Tell whether a text, from which that answer was read, keeps the format."""
        return self.fault(text, answer) is None


def extraction_by(read: Callable[[str], str | None], write: Callable[[str], str] | None = None) -> Extraction:
    """Return the extraction of a function, whose format is kept where calls are answered and an answer is read."""

    def fault(text: str, answer: str | None) -> FormatFault | None:
        if answer is None:
            return "no_answer"
        return None if calls_answered(text) else "open_call"

    return Extraction(read=read, fault=fault, write=write)


def extract_answer(text: str) -> str | None:
    """Return what the last balanced `\\boxed{...}` or `\\fbox{...}` of the first answer holds, or None."""
    span = _first_answer(text)
    return None if span is None else _last_box(span)


def answer_in_tags(text: str) -> str | None:
    """Return what stands between the tags of the last answer, or None."""
    opening, closing = open_tag(TAGS.answer), close_tag(TAGS.answer)
    found, start = None, text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break
        found = (start, end)
        start = text.find(opening, end)
    return None if found is None else text[slice(*found)].strip()


def last_line(text: str) -> str | None:
    """Return the last line with something on it behind the last result, or None."""
    _, _, rest = text.rpartition(close_tag(TAGS.result))
    return rest.rstrip().rpartition("\n")[2].strip() or None


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####` on its line (the solutions of GSM8K), or None."""
    _, hashes, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() or None if hashes else None


def format_ok(text: str) -> bool:
    """Apply the published format check to a response whose results are empty (`environment/reward.py`)."""
    return format_fault(text) is None


def format_fault(text: str) -> FormatFault | None:
    """Name the rule of the published format check that a text breaks first."""
    fault = answer_tags_fault(text)
    if fault is not None:
        return fault
    span = _first_answer(text)
    return None if span is not None and "\\boxed{" in span and "}" in span else "no_box"


def answer_tags_fault(text: str) -> FormatFault | None:
    """Name the rule of the published format check, but for the box, that a text breaks first."""
    thoughts, thought_ends = text.count(open_tag(TAGS.think)), text.count(close_tag(TAGS.think))
    answers, answer_ends = text.count(open_tag(TAGS.answer)), text.count(close_tag(TAGS.answer))
    if answers == 0:
        return "no_answer"
    if thoughts == 0:
        return "no_thought"
    if thoughts != thought_ends:
        return "open_thought"
    if not answers == answer_ends == 1 or _first_answer(text) is None:
        return "answer_tags"
    return None if calls_answered(text) else "open_call"


def turn_format_ok(text: str, called: bool) -> bool:
    """Check the format of one turn: its thoughts are closed, and it either calls a tool or answers, not both.

    GTPO (arXiv:2511.14846) penalises turns with a broken format; what a turn's format is here is a choice of ours.
    """
    thoughts = text.count(open_tag(TAGS.think))
    answered = text.count(open_tag(TAGS.answer)) == text.count(close_tag(TAGS.answer)) == 1
    return 0 < thoughts == text.count(close_tag(TAGS.think)) and called != answered


def calls_answered(text: str) -> bool:
    """Return whether every call of search and python has its closing tag and a result behind it, in this order."""
    return all(_calls_answered(text, name) for name in CALL_TAGS)


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


def _first_answer(text: str) -> str | None:
    """Return what stands between the first answer tag and the next closing one."""
    _, opened, rest = text.partition(open_tag(TAGS.answer))
    span, closed, _ = rest.partition(close_tag(TAGS.answer))
    return span if opened and closed else None


def _last_box(text: str) -> str | None:
    """Return what the balanced box that begins last holds, or None. Each brace is looked at once."""
    unclosed: list[tuple[int, int]] = []  # (where the box begins, -1 for a plain brace; where its content begins)
    last, span = -1, (0, 0)
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0] != "}":
            unclosed.append((match.start() if len(match[0]) > 1 else -1, match.end()))
        elif unclosed:
            begin, inside = unclosed.pop()
            if begin > last:
                last, span = begin, (inside, match.start())
    return None if last < 0 else text[slice(*span)].strip()


EXTRACTIONS: Mapping[AnswerKind, Extraction] = {
    "boxed": Extraction(
        read=extract_answer,
        fault=lambda text, answer: format_fault(text),
        write=lambda answer: f"{open_tag(TAGS.answer)} \\boxed{{{answer}}} {close_tag(TAGS.answer)}",
    ),
    "tag": Extraction(
        read=answer_in_tags,
        fault=lambda text, answer: answer_tags_fault(text),
        write=lambda answer: f"{open_tag(TAGS.answer)} {answer} {close_tag(TAGS.answer)}",
    ),
    "last_line": extraction_by(last_line, write="\n{}".format),
    "hashes": extraction_by(after_hashes, write="#### {}".format),
}
"""The ways to read an answer that `task.answer` knows by name."""
