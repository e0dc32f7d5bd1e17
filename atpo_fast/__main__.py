"""`python -m atpo_fast` is `atpo-fast`."""

from __future__ import annotations

import sys

from atpo_fast.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
