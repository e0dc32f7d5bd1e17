"""Errors that the package expects, one family, and the exit code that each gives to a command.

Where the fault lies in what the user gave, the message says what is wrong, where, and what to do. Anything outside this
family (and outside `INPUT_ERRORS`) is a fault of the code, and its traceback is shown.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import ClassVar

from atpo_fast.common.secrets import redacted

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT
STOPPED = 143  # 128 + SIGTERM; a run that was asked to stop and saved its state


class AtpoError(Exception):
    """Base of the errors that a user may meet."""

    exit_code: ClassVar[int] = FAILURE
    on_every_rank: ClassVar[bool] = False
    """Whether all ranks raise it together, so that one of them tells it."""


class InputError(AtpoError, ValueError):
    """Something that the user gave cannot be used."""

    exit_code = BAD_INPUT


class ConfigError(InputError):
    """A configuration that cannot be used; the message has one line per fault."""


class DataError(InputError):
    """A data file that cannot be used; the message names the file, the line or record, and the field."""


class IndexMismatchError(AtpoError, FileExistsError):
    """The index folder holds an index of something else, or is in use; the message says what to do."""

    exit_code = BAD_INPUT


class CheckpointError(AtpoError, RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""

    exit_code = BAD_INPUT
    on_every_rank = True


class MismatchError(AtpoError, RuntimeError):
    """The inference engine and the trainer do not compute the same log-probs; the message says what to check."""

    exit_code = BAD_INPUT
    on_every_rank = True


class DynamicSamplingError(AtpoError, RuntimeError):
    """Too few questions have trajectories that differ; the message says how many, and what to change."""

    exit_code = BAD_INPUT
    on_every_rank = True


class AlarmError(AtpoError, RuntimeError):
    """An alarm has ended the run, as `logging.alarms.action` asks; the message says which, and what to do."""

    exit_code = BAD_INPUT
    on_every_rank = True


class EngineError(AtpoError, RuntimeError):
    """An inference engine cannot do what a rollout needs, for a reason outside of this program; the message says why,
    and what to do."""


class RewardError(AtpoError, RuntimeError):
    """A reward failed on a trajectory; the message names both, and says what to do."""

    exit_code = BAD_INPUT


class ToolFailureError(AtpoError, RuntimeError):
    """A tool answers no call, so that rolling out goes on for nothing; the message says which, why, and what to do."""


class ForestError(AtpoError, RuntimeError):
    """A job of search trees cannot continue; the message says why, and what its file holds."""


class StopRequested(AtpoError):
    """The run was asked to stop; raised out of the current phase."""

    exit_code = STOPPED


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
INPUT_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError)
"""Built-in errors that many modules raise for wrong input."""


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an expected error, None for a fault of the code."""
    if isinstance(error, AtpoError):
        return error.exit_code
    if isinstance(error, INPUT_ERRORS) or is_disk_error(error):
        return BAD_INPUT
    return FAILURE if is_engine_error(error) or is_lost_rank(error) else None


def in_words(error: BaseException) -> str:
    """Say in one line what an expected error is about, and what to do where its own text does not; without secrets."""
    return redacted(_in_words(error))


def _in_words(error: BaseException) -> str:
    if isinstance(error, AtpoError):
        return str(error)
    if is_disk_error(error):
        return (
            f"a file cannot be written: {first_line(error)}. Free space, or choose a run_dir where there is some; the "
            "same command then continues from what is complete"
        )
    if is_lost_rank(error):
        return (
            f"another rank has ended, and so does this one ({first_line(error)[:120]}). That rank's own message, or "
            "the last line here, says why; the same command continues from the newest checkpoint"
        )
    return str(error)


def is_disk_error(error: BaseException) -> bool:
    """Tell whether writing a file failed for want of space or permission."""
    if isinstance(error, OSError):
        return error.errno in _DISK
    return type(error).__name__ == "SafetensorError" and "os error" in str(error)


def is_lost_rank(error: BaseException) -> bool:
    """Tell whether the error, or one behind it, is that of a collective whose other end has gone."""
    return any(
        "gloo/transport" in str(one) or any(kind.__name__ == "DistError" for kind in type(one).__mro__)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """Name an error of another library: its type, and the first line of its text with something on it, cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def is_engine_error(error: BaseException | None) -> bool:
    """Tell whether an engine's surroundings are at fault, and not the code: the error or a cause is an EngineError."""
    while error is not None and not isinstance(error, EngineError):
        error = error.__cause__
    return error is not None
