"""From a run folder to report.html: `collect.py` gathers the data, the files beside this one draw it in a browser."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from atpo_fast.jsonl import plain
from atpo_fast.report.collect import collect_run

REPORT_FILE = "report.html"
_PARTS = {"{{style}}": "report.css", "{{charts}}": "charts.js", "{{trees}}": "trees.js"}


def build_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder and return its path.

    The file is self-contained: it loads nothing from elsewhere and opens from disk. What the run folder lacks is named
    in it.

    Raises:
        FileNotFoundError: no such folder, or no metrics.jsonl in it.
        ValueError: a record file of the run is malformed (names file and line).
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}: give the run_dir of a run that was started")
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} has no metrics.jsonl: not a run folder, or the run never began")
    page = folder / REPORT_FILE
    draft = page.with_name(REPORT_FILE + ".tmp")
    draft.write_text(render(collect_run(folder)), encoding="utf-8", errors="replace")
    draft.replace(page)
    return page


def render(run: dict[str, Any]) -> str:
    """The page of the data that `collect_run` gives."""
    folder = files("atpo_fast.report")
    page = (folder / "template.html").read_text(encoding="utf-8")
    for mark, name in _PARTS.items():
        page = page.replace(mark, (folder / name).read_text(encoding="utf-8"))
    # the data last: text of a rollout may hold anything, marks of the template too
    return page.replace("{{title}}", html.escape(run["name"])).replace("{{data}}", embeddable_json(run))


def embeddable_json(data: Any) -> str:
    """JSON that may stand inside a <script> element: no character that HTML would react to."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
