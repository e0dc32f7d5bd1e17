"""Run the command line: `python -m atpo_fast` does what `atpo-fast` does."""

from __future__ import annotations

import sys

from atpo_fast.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
