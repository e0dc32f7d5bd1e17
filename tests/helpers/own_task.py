"""A task of a user's own in a folder: a file, a module beside it, and questions."""

from __future__ import annotations

import json
from pathlib import Path

TASK = """
from atpo_fast.task import Prompt, TaskDefinition

from beside import right

def read(text):
    return text.partition("=")[2] or None

TASK = TaskDefinition(prompt=Prompt(user="{question}"), answer=read, rewards=[right, ("format", 0.5)])
OTHER = TaskDefinition(prompt="short")
"""
BESIDE = "def right(trajectory):\n    return 1.0\n"


def write_own_task(folder: Path) -> None:
    """Write mine/task.py, the module beside it, own_module.py with both, and questions.jsonl."""
    (folder / "mine").mkdir()
    (folder / "mine/task.py").write_text(TASK)
    (folder / "mine/beside.py").write_text(BESIDE)
    (folder / "own_module.py").write_text(TASK.replace("from beside import right", BESIDE))
    questions = [{"question": f"Is it {n}?", "answer": str(n), "level": "easy"} for n in range(4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
