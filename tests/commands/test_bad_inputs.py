"""Bad input of every kind: one line that says what, where and what to do; exit code 2; nothing written over."""

from __future__ import annotations

import re
import signal
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.commands import cli, launched, launcher
from tests.helpers.bad_inputs import CASES, GOOD, ROOT, RUN, Case, listed

README = ROOT / "tests/README.md"


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed does not join twice."""
    import torch.distributed as dist

    from tests.helpers.lone_rank import lone_rank

    with lone_rank() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: None)
        yield


@pytest.fixture
def here(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; the only rank of a command is this process."""

    def launch(verb: str, config: str, overrides: list[str], *others: Any) -> int:
        (found,) = (one for one in cli.LAUNCHED if one.name == verb)
        parser = launched.argparse.ArgumentParser()
        found.add_options(parser)
        options = parser.parse_args(list(others[1]) if len(others) > 1 else [])
        return launched.run_process(found, Namespace(config=config, overrides=overrides, **vars(options)))

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.delenv("ATPO_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write(folder: Path, files: Mapping[str, str | bytes | None]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content.replace("ROOT", str(ROOT)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Fails when a fault ends in a traceback or another code, its line does not name file or key, there is more than one
# line, or the command has changed what was there.
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.given}: {case.fault}".replace(" ", "_"))
def test_bad_input(case: Case, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(here, {name: content for name, content in GOOD.items() if name not in case.files} | dict(case.files))
    before = contents(here)
    try:
        code = cli.main(case.words)
    except SystemExit as end:  # of argparse
        code = int(end.code or 0)
    said = [line for line in capfd.readouterr().err.splitlines() if re.match("(atpo-fast.*: )?error: ", line)]
    assert len(said) == 1 and code == 2
    for piece in case.says:
        assert piece in said[0]
    assert {name: content for name, content in contents(here).items() if name in before} == before


# Fails when the list that people read is another one than the list that is tried.
def test_the_list_in_the_readme() -> None:
    assert listed() in README.read_text()


# Fails when the good input is bad itself: each of the cases would be refused for another reason than its fault.
def test_good_input(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(here, GOOD)
    assert cli.main([*RUN, "train.resume=must"]) == 2
    assert "train.resume=must, but run/checkpoints has no checkpoint" in capfd.readouterr().err
