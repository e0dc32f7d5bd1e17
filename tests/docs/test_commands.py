"""Every command and snippet of the documentation works.

A block of commands without a title is run. A block whose title says what it needs ("needs a GPU", "takes minutes",
"installs packages") is checked as far as this machine can: the program, the verb and its options, the configuration's
keys, the target of make, the extra of pip.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from atpo_fast.commands import cli
from atpo_fast.config.load import load_config
from tests.helpers.examples import output
from tests.helpers.pages import ROOT, Block, blocks, pages, spans

COMMANDS = [block for page in pages() for block in blocks(page) if block.language in ("sh", "bash", "console")]
REASONS = ("needs ", "takes ", "installs ")
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
OTHER_PROGRAMS = ("vllm",)
RUN_ELSEWHERE = "Drop the loss into another trainer"  # tests/kernels/test_fused_module.py runs that section


def lines(code: str) -> list[list[str]]:
    """The commands of a block as words, without variables in front, comments and continuations."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


@pytest.mark.parametrize("block", [b for b in COMMANDS if not b.title], ids=str)
def test_commands_run(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails for a command that a reader would see fail."""
    monkeypatch.chdir(ROOT)
    for words in lines(block.code):
        check(words)
        if words[0] == "atpo-fast":
            allowed = (0, 1) if words[1] == "env" else (0,)  # 1: something on this machine does not fit together
            assert cli.main(words[1:]) in allowed, words
        elif words[0] == "python" and words[1].endswith(".py"):
            output(*words[1:])
        elif words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            raise AssertionError(f"{words[0]} is run by nobody: give the block a title that says what it needs")


@pytest.mark.parametrize("block", [b for b in COMMANDS if b.title], ids=str)
def test_commands_are_right(block: Block) -> None:
    """Fails for a verb, option, key, target, file or extra that does not exist."""
    assert block.title.startswith(REASONS), f"the title {block.title!r} must begin with one of {REASONS}"
    for words in lines(block.code):
        check(words)


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_sentences_are_right(page: Path) -> None:
    """The same for commands in the middle of a sentence, which may leave out arguments."""
    if page.name == "CHANGELOG.md":
        return
    for span in spans(page):
        words = span.split() or [""]
        if words[0] == "make" and len(words) > 1:
            check(words)
        elif words[0] == "atpo-fast" and len(words) > 1 and words[1].isalpha() and words[1].islower():
            assert cli.join_verb(words[1:])[0] in verbs(), f"`{span}`: no such verb"


def check(words: list[str]) -> None:
    """Whether a command can be right, without running it."""
    program, rest = words[0], words[1:]
    if program == "atpo-fast":
        check_verb(rest)
    elif program == "deepspeed":
        assert importlib.util.find_spec(rest[rest.index("--module") + 1])
        load_config(ROOT / rest[rest.index("--config") + 1], [word for word in rest if "=" in word])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in rest:
            assert word in targets or re.match(r"[A-Z_]+=", word), f"make {word}: no such target"
    elif program == "pip":
        check_pip(rest)
    elif program in ("python", ".venv/bin/python"):
        check_python(rest)
    elif program == ".":  # activation of an environment
        assert rest == [".venv/bin/activate"]
    else:
        assert program in OTHER_PROGRAMS, f"{program}: a program that the tests do not know"


def verbs() -> set[str]:
    """The verbs of the command line."""
    actions = cli._parser()._actions
    return {verb for action in actions if isinstance(action.choices, dict) for verb in action.choices}


def check_verb(words: list[str]) -> None:
    """A verb, its options, and the configuration that it would be given."""
    arguments, rest = cli._parser().parse_known_args(cli.join_verb(words))
    overrides = [*(getattr(arguments, "overrides", None) or []), *rest]
    assert not any(word.startswith("-") for word in overrides), f"unknown options {rest}"
    if hasattr(arguments, "config"):
        given = ROOT / arguments.config
        load_config(given if given.is_file() else QUICKSTART, overrides)  # one of a finished run is not here


def check_pip(words: list[str]) -> None:
    """The project's extras and folders exist; other packages are taken as they are."""
    assert words[0] in ("install", "uninstall")
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", declared, re.MULTILINE)
    for word in words[1:]:
        if word.startswith("."):
            assert (ROOT / word.split("[")[0] / "pyproject.toml").is_file(), f"{word}: nothing to install"
        for extra in re.findall(r"(?:atpo-fast|\.)\[(\w+)\]", word):
            assert extra in extras, f"{word}: no such extra"


def check_python(words: list[str]) -> None:
    """The script or module exists."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"python -m {words[1]}: no such module"
    else:
        assert (ROOT / words[0]).is_file(), f"python {words[0]}: no such file"


@pytest.mark.parametrize(
    "page",
    [p for p in pages() if any(b.language == "python" for b in blocks(p))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_snippets_run(page: Path) -> None:
    """Fails for a snippet that does not run after those above it on its page."""
    names: dict[str, Any] = {}
    skipping = False
    for block in blocks(page):
        skipping = skipping or RUN_ELSEWHERE in page.read_text().split(block.code)[0]
        if block.language == "python" and not skipping:
            exec(compile(textwrap.dedent(block.code), str(block), "exec"), names)


@pytest.mark.parametrize("block", [b for p in pages() for b in blocks(p) if b.language == "yaml"], ids=str)
def test_yaml_snippets_are_configurations(block: Block, tmp_path: Path) -> None:
    """Fails for a snippet with a key or value that the configuration does not have."""
    if not isinstance(yaml.safe_load(block.code), dict):
        return
    path = tmp_path / "snippet.yaml"
    path.write_text(block.code)
    load_config(path)
