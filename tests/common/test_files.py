"""Files that are whole or absent, and the errors of the package with their exit codes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from atpo_fast.common import errors
from atpo_fast.common.files import partial_path, replacing


def put(path: Path, kind: str, text: str) -> None:
    """Write `text` into a file, or into the only file of a folder."""
    if kind == "folder":
        path.mkdir()
    (path / "inside" if kind == "folder" else path).write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path, kind: str) -> None:
    # Fails if a folder is moved into the old one, or something of the old one or of a killed writer stays.
    path = tmp_path / "new" / "it"
    with replacing(path) as partial:
        put(partial, kind, "first")
    put(partial_path(path), kind, "of a killed writer")
    with replacing(path) as partial:
        put(partial, kind, "second")
    assert (path / "inside" if kind == "folder" else path).read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    # Fails if half of a file or folder is put in place, or left beside it.
    path = tmp_path / "it"
    put(path, kind, "old")
    with pytest.raises(OSError, match=f"full: '{path}'"), replacing(path) as partial:  # or it does not say which
        put(partial, kind, "ha")
        raise OSError(errno.ENOSPC, "full")
    assert (path / "inside" if kind == "folder" else path).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_removes_nothing(tmp_path: Path) -> None:
    # Fails if a writer that has written nothing deletes what was there.
    (tmp_path / "it").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "it"):
        pass
    assert (tmp_path / "it").read_text() == "old"


def family() -> list[type[errors.AtpoError]]:
    """Every error class of the package."""
    found, left = [], [errors.AtpoError]
    while left:
        found.append(cls := left.pop())
        left += cls.__subclasses__()
    return found


def test_exit_codes_of_errors() -> None:
    # Fails if a fault of the code is told without its traceback, or a fault of the input as a traceback.
    assert {errors.exit_code(cls("x")) for cls in family()} == {1, 2, 143}
    for wrong in (ValueError("x"), FileNotFoundError("x"), errors.ConfigError("x"), errors.CheckpointError("x")):
        assert errors.exit_code(wrong) == errors.BAD_INPUT
    for fault in (RuntimeError("x"), KeyError("x"), OSError("x"), AssertionError("x")):
        assert errors.exit_code(fault) is None
    try:
        raise RuntimeError("the engine failed") from errors.EngineError("HTTP 500")
    except RuntimeError as error:
        assert errors.exit_code(error) == errors.FAILURE
    assert errors.exit_code(errors.StopRequested()) == 143


def test_old_bases_of_errors_stay() -> None:
    # Fails if code that catches the built-in kind no longer catches ours.
    assert issubclass(errors.ConfigError, ValueError) and issubclass(errors.DataError, ValueError)
    assert issubclass(errors.IndexMismatchError, FileExistsError) and issubclass(errors.EngineError, RuntimeError)


# Fails when a full disk ends in a traceback, advises nothing or does not name the file, when a missing file or a fault
# of the code is taken for one, or when a rank that has lost another blames the disk.
def test_errors_of_the_disk_and_of_other_ranks() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "run/config.yaml")
    words = errors.in_words(full)
    assert "run/config.yaml" in words and "Free space" in words and errors.exit_code(full) == errors.BAD_INPUT
    assert not errors.is_disk_error(OSError(errno.EPIPE, "Broken pipe"))
    assert errors.exit_code(OSError(errno.EPIPE, "Broken pipe")) is None
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    wrapped = errors.CheckpointError("no")
    assert not errors.is_lost_rank(wrapped) and errors.is_lost_rank(lost)
    assert "another rank has ended" in errors.in_words(lost) and errors.exit_code(lost) == errors.FAILURE
