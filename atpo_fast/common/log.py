"""The one set-up of logging: what any module of the package warns of is a line on standard error."""

from __future__ import annotations

import logging
import sys

from atpo_fast.common.secrets import redacted


def set_up_logging() -> None:
    """Show the package's warnings as `warning: ...`; further calls change nothing."""
    logger = logging.getLogger("atpo_fast")
    if not logger.handlers:
        logger.addHandler(_StandardError())


class _StandardError(logging.Handler):
    """A handler that writes to the current `sys.stderr`, which a display that redraws replaces by its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to stderr as one line, its level first, without secrets."""
        print(redacted(f"{record.levelname.lower()}: {self.format(record)}"), file=sys.stderr, flush=True)
