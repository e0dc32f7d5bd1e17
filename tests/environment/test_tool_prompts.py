"""Tools of the user's own in the prompt: through the chat template where it shows them, in words where it does not."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import Config, DataConfig, MCPServerConfig, ModelConfig, ToolsConfig
from atpo_fast.config.load import load_config
from atpo_fast.data.chat_templates import template_shows_tools
from atpo_fast.data.prompts import NO_TOOLS, PROMPTS, SYSTEM_PROMPT, ToolDescriptions
from atpo_fast.data.questions import Question
from atpo_fast.data.tokenizers import train_bpe
from atpo_fast.environment import ToolCall, describe_tools, make_toolbox, parse_call, tool_schema
from atpo_fast.environment.function_tool import FunctionTool
from atpo_fast.task import PromptEncoder, load_task

QUESTION = Question(id="q", text="Who?", answers=("a",))
MESSAGES = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
SHOWS_TOOLS = "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + MESSAGES
BESIDE_A_USER_ONLY = (  # as Llama 3.1
    "{% if tools and messages[0]['role'] != 'user' %}{{ raise_exception('no user message') }}{% endif %}" + MESSAGES
)
CALLS = '<convert> {"value": number, "unit": "m" or "mi" (optional)} </convert>'


def convert(value: float, unit: str = "m") -> str:
    """Converts a length.

    To kilometres, with a </result> and an <|im_end|>.
    """
    return f"{value} {unit}"


SCHEMA: dict[str, Any] = tool_schema(FunctionTool(convert))
SCHEMA["function"]["parameters"]["properties"]["unit"] = {"type": "string", "enum": ["m", "mi"]}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerBase, kind: Any, tools: ToolDescriptions = NO_TOOLS) -> list[int]:
    return PromptEncoder(PROMPTS[kind], tokenizer, max_tokens=4000, tools=tools)(QUESTION)


def prompt(template: str | None, kind: Any = "published", **described: bool) -> str:
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    tokenizer.chat_template = template
    tools = describe_tools([SCHEMA], tokenizer, PROMPTS[kind], **described)
    return str(tokenizer.decode(encode(tokenizer, kind, tools)))


@pytest.mark.parametrize("template", [None, MESSAGES, BESIDE_A_USER_ONLY])
def test_in_words_where_the_template_shows_no_tools(template: str | None) -> None:
    """Fails if a template without a place for tools, or that refuses them, leaves the policy without a description."""
    text = prompt(template)
    before, _, after = text.partition(SYSTEM_PROMPT)
    assert before == ("" if template is None else "[system]")
    assert after.startswith("\nBesides the search tool you may call the following tools.")
    assert f"\n{CALLS}: Converts a length. To kilometres" in after
    assert '"enum": ["m", "mi"]' in after and '"required": ["value"]' in after
    assert after.endswith("\nuser\nWho?" + ("\n" if template is None else "[bot]"))


def test_through_the_template_where_it_shows_tools() -> None:
    """Fails if the template's own place for tools is left empty, or the way of calling them is not said."""
    text = prompt(SHOWS_TOOLS)
    shown, _, content = text.partition("[system]")
    assert json.loads(shown.removeprefix("[tools]"))["function"]["parameters"]["required"] == ["value"]
    assert content.startswith(f"{SYSTEM_PROMPT}\nBesides the search tool") and content.endswith("\nuser\nWho?[bot]")
    assert f"\n{CALLS}\n" in content and "Converts" not in content


def test_which_templates_show_tools() -> None:
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    for template, shows in ((SHOWS_TOOLS, True), (MESSAGES, False), (BESIDE_A_USER_ONLY, False), (None, False)):
        tokenizer.chat_template = template
        assert template_shows_tools(tokenizer, [SCHEMA]) == shows
    tokenizer.chat_template = MESSAGES + "{% if tools %}You have tools.{% endif %}"  # but not which
    assert not template_shows_tools(tokenizer, [SCHEMA])


@pytest.mark.parametrize("template", [MESSAGES, SHOWS_TOOLS])
def test_a_description_is_only_text(template: str) -> None:
    """Fails if a description can end the prompt or close a result: its tags and special tokens become markers."""
    text = prompt(template)
    assert "<|im_end|>" not in text and "&lt;|im_end|>" in text and "&lt;/result>" in text


def test_the_short_prompt() -> None:
    """Fails if a question alone is not what a model trained from scratch sees, or its tools are kept from it."""
    assert PROMPTS["short"].fill(QUESTION) == [{"role": "user", "content": "Who?\n"}]
    text = prompt(SHOWS_TOOLS, "short", with_search=False)
    assert text.startswith("There is no search tool; you may call the following tools.")
    assert f"\n{CALLS}: Converts" in text and text.endswith("\nWho?\n") and SYSTEM_PROMPT not in text


def test_too_long_with_tools() -> None:
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    tools = describe_tools([SCHEMA], tokenizer, PROMPTS["published"])
    without = len(encode(tokenizer, "published"))
    with pytest.raises(ValueError, match=r"question 'q' \('Who\?'\): its prompt has \d+ tokens"):
        PromptEncoder(PROMPTS["published"], tokenizer, max_tokens=without, tools=tools)(QUESTION)


# ---- what it was before there were descriptions


def test_published_prompts_are_what_they_were() -> None:
    """Fails if one token of a prompt changes where only built-in tools are configured."""
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    assert digest(PROMPTS["published"].fill(QUESTION)[0]["content"]) == "9ee528017524c55c"
    assert digest(encode(tokenizer, "published")) == "948fd359d6829606"
    tokenizer.chat_template = MESSAGES
    assert digest(encode(tokenizer, "published")) == "8cd8aa85289e087d"


def test_prompts_of_the_quickstart_are_what_they_were() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/quickstart.yaml", ["world.demonstrations=1"])
    task = load_task(config)
    assert digest([task.encode_prompt(question) for question in task.train + task.eval]) == "30f406500379fc8b"
    assert digest(sorted(task.tokenizer.get_vocab().items())) == "3df5799e6f30ed7a"


# ---- from the configuration to the prompt, and from the prompt to an answer


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToolsConfig:
    pytest.importorskip("mcp", reason="the extra mcp is not installed")
    (tmp_path / "my_tools.py").write_text(
        "def double(value: int) -> int:\n    'Gives twice as much.'\n    return 2 * value\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    server = MCPServerConfig(
        command=[sys.executable, str(Path(__file__).parents[1] / "helpers/written_mcp_server.py")], tools=["add"]
    )
    return ToolsConfig(builtin=["search", "python"], functions=["my_tools:double"], mcp=[server])


@pytest.mark.parametrize("template", [MESSAGES, SHOWS_TOOLS, None])
def test_from_the_configuration_to_an_answer(
    tools: ToolsConfig, template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a configured function or MCP tool is not described, or a call written as described is not answered."""
    tokenizer = train_bpe([SYSTEM_PROMPT], 600)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "eval.jsonl").write_text('{"question": "How much?", "answer": "8", "contents": "text"}\n')
    data = DataConfig(
        root=str(tmp_path), eval_files=["eval.jsonl"], corpus_files=["eval.jsonl"], max_prompt_tokens=4000
    )
    task = load_task(Config(data=data, tools=tools, model=ModelConfig(path=str(tmp_path / "model"))))
    with make_toolbox(tools, task.passages, task.tools) as toolbox:
        text = task.tokenizer.decode(task.encode_prompt(task.eval[0]))
        assert toolbox.names == ("search", "python", "double", "add")
        for line in ('<double> {"value": integer} </double>', "<python> the code </python>"):
            assert f"\n{line}" in text
        assert '\n<add> {"a": integer, "b": integer (optional)} </add>' in text
        assert "Gives twice as much." in text and "Adds two numbers." in text and "Finds passages" not in text
        assert ("[tools]" in text) == (template == SHOWS_TOOLS)
        for written, answer in (('<double> {"value": 4} </double>', "8"), ('<add> {"a": 2} </add>', "2 + 1 = 3")):
            call = parse_call(written, toolbox.names)
            assert call is not None and toolbox.run([call])[0].text == answer


def test_the_embedded_world_knows_the_words_of_its_tools(tools: ToolsConfig) -> None:
    """Fails if the world's word-level tokenizer does not know the words of the descriptions."""
    tools.mcp = []
    task = load_task(
        load_config(
            Path(__file__).parents[2] / "configs/quickstart.yaml",
            ["world.demonstrations=1", "tools.functions=[my_tools:double]", "data.max_prompt_tokens=200"],
        )
    )
    text = task.tokenizer.decode(task.encode_prompt(task.train[0]))
    assert '<double> {"value": integer} </double>: Gives twice as much.' in text
    with make_toolbox(ToolsConfig(), task.passages, task.tools) as toolbox:
        assert toolbox.run([ToolCall("double", '{"value": 4}')])[0].text == "8"
