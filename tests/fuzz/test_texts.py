"""What a policy may write: any mixture of tags, boxes and text is parsed, scored and escaped without an error."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_fast.config import RewardConfig
from atpo_fast.data.questions import Question
from atpo_fast.environment import Escaper, escape_tags, parse_call, unescape_tags
from atpo_fast.environment.arguments import ArgumentError, SchemaArguments
from atpo_fast.environment.extraction import EXTRACTIONS, answer_tags_fault, calls_answered, format_ok, turn_format_ok
from atpo_fast.environment.python_tool import bare_code
from atpo_fast.environment.reward import ScoringRules, score_trees
from atpo_fast.environment.rewards.named import NAMED
from atpo_fast.environment.rewards.terms import load_rewards
from atpo_fast.environment.search import clean_query, format_hits
from atpo_fast.environment.tags import protocol_tags
from atpo_fast.task.definition import TaskDefinition
from atpo_fast.tree.turn_tree import TurnTree
from tests.helpers.fuzzing import FUZZ, ODD_TEXTS, values
from tests.helpers.small_tokenizers import byte_level

TOOLS = ("search", "python", "calc")
PIECES = [
    *protocol_tags(TOOLS),
    *(
        "\\boxed{",
        "\\fbox{",
        "\\boxed",
        "}",
        "{",
        "####",
        "\n",
        " ",
        "<",
        ">",
        "</",
        "&lt;",
        "&amp;",
        "```",
        "python\n",
    ),
    *("a", "42", "-1", "1/2", "\\frac{1}{2}", "東京", "é", "\u0301", "\u200b", "$", "%", "The", '"', "\\", *ODD_TEXTS),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=16).map("".join)
TOKENIZER = byte_level()
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}, "c": {}},
    "required": ["a"],
}


@FUZZ
@given(TEXTS, TEXTS)
def test_parsing(text: str, gold: str) -> None:
    """Fails if a text raises, or if a call is read whose argument is empty or holds its own opening tag."""
    call = parse_call(text, TOOLS)
    if call is not None and not call.problem:
        assert call.argument.strip() == call.argument != "" and f"<{call.tool}>" not in call.argument
    for extraction in EXTRACTIONS.values():
        answer = extraction.read(text)
        assert answer is None or answer == answer.strip()
        extraction.well_formed(text, answer)
    assert not format_ok(text) or (answer_tags_fault(text) is None and calls_answered(text))
    turn_format_ok(text, called=True)
    bare_code(text)
    assert len(format_hits([text, gold], 10).splitlines()) or text
    assert '"' not in clean_query(text)


@FUZZ
@given(TEXTS)
def test_escaping(text: str) -> None:
    """Fails if escaping loses text or leaves a tag."""
    escaped = escape_tags(text, TOOLS)
    assert unescape_tags(escaped, TOOLS) == text
    assert not any(tag in escaped for tag in protocol_tags(TOOLS))
    Escaper(TOKENIZER, TOOLS)(text.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("reward", sorted(set(NAMED) - {"math"}))
@FUZZ
@given(TEXTS, TEXTS, st.lists(TEXTS.filter(str.strip), min_size=1, max_size=2))
def test_rewards(reward: str, first: str, second: str, answers: list[str]) -> None:
    """Fails if a reward raises for a text, or is not a number."""
    tree = TurnTree(TOKENIZER.encode("Who?"), question_id="q")
    ids = [TOKENIZER.encode(text.encode("utf-8", "replace").decode()) for text in (first, second)]
    tree.add_turn(tree.add_turn(0, ids[0], observation_ids=TOKENIZER.encode("x"), tool="search"), ids[1])
    question = Question(id="q", text="Who?", answers=tuple(answers))
    rules = ScoringRules(rewards=load_rewards(TaskDefinition(rewards=[reward]).terms))
    ((leaf,),) = score_trees([tree], [question], TOKENIZER, RewardConfig(), rules=rules)
    assert math.isfinite(leaf.reward)


@FUZZ
@given(st.one_of(TEXTS, values(["a", "b", "c"]).map(repr), st.just("[" * 100_000)))
def test_arguments_of_tools(text: str) -> None:
    """Fails if what stands between the tags of a call ends in another error than the one that the policy reads."""
    try:
        assert isinstance(SchemaArguments(SCHEMA).parse(text), dict)
    except ArgumentError as error:
        assert str(error)
