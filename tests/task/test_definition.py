"""The definition of a task: from keys, from a Python file or a module, and what is wrong with one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.common.errors import ConfigError, DataError
from atpo_fast.config import Config, DataConfig, ModelConfig, TaskConfig, ToolsConfig
from atpo_fast.config.load import dump_config, load_config
from atpo_fast.data.prompts import PROMPTS, Prompt
from atpo_fast.environment.extraction import EXTRACTIONS
from atpo_fast.environment.rewards import RewardTerm
from atpo_fast.task import TaskDefinition, load_definition, load_task
from atpo_fast.task.prompt_encoder import PromptEncoder
from tests.helpers.own_task import write_own_task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a task, a module beside it and questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("beside", "own_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    write_own_task(tmp_path)
    return tmp_path


def files(**task: Any) -> Config:
    return Config(
        data=DataConfig(train_files=["questions.jsonl"], root="."),
        task=TaskConfig(**task),
        tools=ToolsConfig(builtin=[]),
        model=ModelConfig(vocab_size=300),
    )


@pytest.mark.parametrize("reference", ["mine/task.py", "mine/task.py:TASK", "own_module", "own_module:TASK"])
def test_a_file_and_a_module_define_a_task(folder: Path, reference: str) -> None:
    """Fails if a definition is not found from the working directory, or not what beside it lies."""
    task = load_task(files(file=reference))
    assert task.tokenizer.decode(task.encode_prompt(task.train[0])) == "Is it 0?\n"
    assert [(reward.name, reward.weight) for reward in task.rules.rewards] == [("right", 1.0), ("format", 0.5)]
    assert task.rules.extraction.read("x=4") == "4"


def test_another_name_in_a_file(folder: Path) -> None:
    """Fails if the name behind the colon is not looked at."""
    assert load_definition(TaskConfig(file="mine/task.py:OTHER")) == TaskDefinition(prompt="short")


def test_keys_define_the_same() -> None:
    """Fails if a task of keys and one of Python are not the same thing, or the default is not the published task."""
    keys = TaskConfig(
        system="Add.",
        answer="hashes",
        rewards=["format", {"function": "em", "weight": 2.0}],  # type: ignore[list-item]
    )
    defined = load_definition(keys)
    assert defined == TaskDefinition(
        prompt=Prompt(system="Add.", user="{question}"),
        answer="hashes",
        rewards=[RewardTerm(function="format"), RewardTerm(function="em", weight=2.0)],
    )
    assert defined.extraction is EXTRACTIONS["hashes"]
    published = load_definition(TaskConfig())
    assert published.templates is PROMPTS["published"] and published.terms == [RewardTerm(function="published")]
    assert load_definition(TaskConfig(prompt="short")).templates is PROMPTS["short"]
    assert TaskDefinition(rewards=[("em", 3)]).terms == [RewardTerm(function="em", weight=3.0)]


def test_a_configuration_comes_back(tmp_path: Path) -> None:
    """Fails if the configuration that a run keeps cannot be read again."""
    config = load_config(
        None, ["task.rewards=[em, {function: 'a.b:c', timeout_seconds: 3}]", "task.user='Q: {question}'"]
    )
    (tmp_path / "kept.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "kept.yaml") == config and config.task.rewards[1].timeout_seconds == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompt=short"], "data.prompt is now task.prompt"),
        (["task.user=Answer."], "task.user and task.system lack the question: write {question}"),
        (["task.user={question}"], 'in quotes: "{question}"'),
        (["task.system=Be good.", "task.prompt=short"], "task.prompt=short has no templates"),
        (["task.file=a.py", "task.answer=tag", "task.user='{question}'"], "leave out task.user, task.answer"),
        (["task.answer=box"], "task.answer='box': must be one of boxed, tag, last_line, hashes, or package.module"),
        (["task.rewards=[exact]"], "function='exact': must be one of published, arpo_f1, "),
        (["task.rewards=[]"], "task.rewards is empty"),
        (["task.rewards=[{function: em, wieght: 1}]"], "wieght"),
        (["reward.normalise=nfkc"], "reward.normalise='nfkc'"),
    ],
)
def test_keys_that_make_no_task(overrides: list[str], message: str) -> None:
    """Fails if a wrong key is found out after the configuration, or without the key and what to write."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


BROKEN = {
    "syntax.py": "TASK = (",
    "name.py": "\n\nTASK = TaskDefinition()\n",
    "missing.py": "import not_there_at_all\n",
    "other.py": "TASK = 3\n",
    "question.py": 'from atpo_fast.task import *\nTASK = TaskDefinition(prompt=Prompt(user="Answer."))\n',
    "kind.py": 'from atpo_fast.task import *\nTASK = TaskDefinition(prompt="long")\n',
    "answer.py": "from atpo_fast.task import *\nTASK = TaskDefinition(answer=3)\n",
    "arguments.py": "from atpo_fast.task import *\nTASK = TaskDefinition(answer=lambda text, other: None)\n",
    "reward.py": "from atpo_fast.task import *\nTASK = TaskDefinition(rewards=[lambda text: 0.0])\n",
}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.py", r"task.file=nowhere\.py: there is no file nowhere\.py; the path is relative to .*"),
        ("syntax.py", r"task.file=syntax\.py: cannot be imported: SyntaxError: .*syntax\.py, line 1\)"),
        ("name.py", r"cannot be imported: NameError: name 'TaskDefinition' is not defined \(.*name\.py, line 3\)"),
        ("missing.py", r"cannot be imported: ModuleNotFoundError: .*'not_there_at_all' \(.*missing\.py, line 1\)"),
        ("other.py", r"task.file=other\.py: holds int, and not a TaskDefinition"),
        ("other.py:MINE", r"task.file=other\.py:MINE: other\.py has no 'MINE'; it has TASK"),
        ("no_such_package.task", r"there is no module 'no_such_package' in the working directory"),
        ("question.py", r"ConfigError: a prompt lacks the question: write \{question\}.*question\.py, line 2\)"),
        ("kind.py", r"prompt='long': must be a Prompt, or one of published, short, messages"),
        ("answer.py", r"answer=3: must be a function of the text, or one of boxed"),
        ("arguments.py", r"answer=.*takes \(text, other\), and is given the text alone"),
        ("reward.py", r"its signature is \(text\); expected reward\(trajectory\)"),
    ],
)
def test_a_definition_that_is_broken(folder: Path, reference: str, message: str) -> None:
    """Fails if a fault in the user's file is a traceback, or does not say what is wrong on which line."""
    for name, text in BROKEN.items():
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_task(files(file=reference))


def test_faults_of_the_data_are_found_when_the_task_is_loaded(folder: Path) -> None:
    """Fails if a reward's missing column or a record without a chat is found out by the first roll-out."""
    (folder / "rewards.py").write_text("def graded(completions, grade):\n    return [0.0] * len(completions)\n")
    with pytest.raises(DataError, match=r"has no column grade, which the reward graded takes; it has question, "):
        load_task(files(user="{question}", rewards=["rewards.py:graded"]))
    with pytest.raises(DataError, match=r"task.prompt=messages needs a chat in its record"):
        load_task(files(prompt="messages"))


def test_a_template_that_writes_no_question(folder: Path) -> None:
    """Fails if every question has the same prompt, and nobody is told before the roll-out."""
    task = load_task(files(user="{question}"))
    task.tokenizer.chat_template = "<s>"
    with pytest.raises(ValueError, match=r"the chat template of .* cannot write the prompt"):
        PromptEncoder(PROMPTS["published"], task.tokenizer, max_tokens=100)
