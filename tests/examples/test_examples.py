"""Every example runs as its README says, and shows what it promises."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.docs.test_commands import lines
from tests.helpers.forked_runs import ForkedProcess, start_command
from tests.helpers.pages import blocks
from tests.helpers.runs import records

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


def output(example: str, *arguments: str) -> str:
    """Return what an example prints as a script of its own, in a fork that need not import PyTorch again."""
    process = ForkedProcess(run_script, str(ROOT / "examples" / example), arguments)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    return text


def run_script(path: str, arguments: tuple[str, ...]) -> int:
    """Do what `python path arguments` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
    return 0


def test_custom_tool() -> None:
    """Fails if the tool is not described, a good call is not answered, or a bad one is not told what is wrong."""
    text = output("custom_tool.py")
    form = '<convert> {"value": number, "unit": "km" or "mi", "digits": integer (optional)} </convert>'
    assert f"{form}: Convert a length from kilometres to miles, or from miles to kilometres. JSON schema: " in text
    assert "Unit that the value is given in." in text and "\nuser\nHow many miles are 42 km?" in text
    assert '{"value": 42, "unit": "km"} </convert> <result>\n26.1 mi\n</result>' in text
    assert "Tool(convert) was not called: unit: Input should be 'km' or 'mi'." in text


def test_minimal_at2po() -> None:
    """Fails if a station of the loop no longer takes what the one before it gives, or the loop outgrows a page."""
    text = output("minimal_at2po.py", "--cold-start-steps", "10", "--steps", "2")
    em = r"EM on 60 evaluation questions: [01]\.\d{3}\n"
    assert re.search(rf"cold start, step  10: \d+\.\d{{3}} nats a token\n{em}step   1: EM [01]\.\d{{3}}, ", text), text
    assert re.search(rf"\nstep   2: .*\n{em}", text), text
    source = (ROOT / "examples/minimal_at2po.py").read_text()
    loop = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None and loop.end_lineno - loop.lineno < 100


@pytest.mark.slow(reason="imports TRL, which trains two steps")
def test_trl_tree_search() -> None:
    """Fails if the leaves of our trees are no longer what TRL takes as completions."""
    pytest.importorskip("trl")
    text = output("trl_tree_search.py", "--cold-start-steps", "3", "--steps", "2")
    assert re.search(r"mean reward by step: -?[01]\.\d{3} -?[01]\.\d{3}\n", text), text


SHELL = [block for block in blocks(ROOT / "docs/tasks.md") if block.language == "sh"]
OWN = [words for block in SHELL for words in lines(block.code) if words[0] == "atpo-fast"]


@pytest.mark.parametrize("words", OWN, ids=lambda words: str(next((w for w in words if "run_dir" in w), "own_task")))
def test_own_task(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command of docs/tasks.md does not train on its file with its reward."""
    monkeypatch.chdir(ROOT)
    output("own_task/formats.py", str(tmp_path))
    words = [word.replace("data.root=runs/formats", f"data.root={tmp_path}") for word in words[1:]]
    process = start_command(*words, "train.steps=2", f"run_dir={tmp_path / 'run'}", "device=cpu")
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text
    logged = records(tmp_path / "run", "train")[2]
    rewards = {"run_dir=runs/verl": "compute_score", "run_dir=runs/trl": "accuracy", "run_dir=runs/jsonl": "judge"}
    name = next((rewards[word] for word in words if word in rewards), "close")
    assert f"reward/{name}" in logged and logged["reward/format"] > 0.5
