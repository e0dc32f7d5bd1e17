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
from tests.helpers.bad_inputs import CASES, GOOD, ROOT, Case

README = ROOT / "tests/README.md"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; the ranks of a command, one at most, are this process."""

    def launch(verb: str, config: str, overrides: list[str], *others: Any) -> int:
        (found,) = (one for one in cli.LAUNCHED if one.name == verb)
        parser = launched.argparse.ArgumentParser()
        found.add_options(parser)
        options = parser.parse_args(list(others[1]) if len(others) > 1 else [])
        return launched.run_process(found, Namespace(config=config, overrides=overrides, **vars(options)))

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(launcher.free_port()), "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
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
