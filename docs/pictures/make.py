"""Draw the pictures of the documentation: `python docs/pictures/make.py`.

The pictures are committed, so that they show where the repository is read; a test draws them again and compares.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("method", "life_of_a_tree", "packing", "memory_and_time")


def pictures() -> dict[str, str]:
    """Draw every picture; return the SVG text by file name."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return {f"{name}.svg": importlib.import_module(name).draw().svg() for name in NAMES}


if __name__ == "__main__":
    for file, text in pictures().items():
        (HERE / file).write_text(text, encoding="utf-8")
        print(HERE / file)
