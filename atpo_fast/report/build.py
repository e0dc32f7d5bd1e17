"""From a run folder or a forest to a page: `collect.py` gathers the data, the files beside this one draw it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from atpo_fast.common.files import replacing
from atpo_fast.common.jsonl import plain
from atpo_fast.report.collect import collect_forest, collect_run, has_records
from atpo_fast.tree.storage import is_parquet

REPORT_FILE = "report.html"
_PARTS = {"{{style}}": "report.css", "{{charts}}": "charts.js", "{{trees}}": "trees.js"}


def build_report(source: Path | str) -> Path:
    """Write `report.html` into a run folder, or `NAME.html` beside a forest `NAME.jsonl` or `NAME.parquet`; its path.

    The file is self-contained: it loads nothing from elsewhere and opens from disk. What the run folder lacks is named
    in it.

    Raises:
        FileNotFoundError: no such folder or file, or no records in the folder.
        ValueError: a record file of the run is malformed (names file and line).
    """
    source = Path(source)
    if source.is_file() or (source.is_dir() and is_parquet(source)):
        return _write(source.with_suffix(".html"), collect_forest(source))
    if not source.is_dir():
        raise FileNotFoundError(f"no run folder {source}: give the run_dir of a run that was started, or a forest")
    if not has_records(source):
        raise FileNotFoundError(f"{source} has no metrics.jsonl and no rollouts: not a run folder, or it never began")
    return _write(source / REPORT_FILE, collect_run(source))


def _write(page: Path, data: dict[str, Any]) -> Path:
    with replacing(page) as partial:
        partial.write_text(render(data), encoding="utf-8", errors="replace")
    return page


def render(run: dict[str, Any]) -> str:
    """Draw the page of the data that `collect_run` or `collect_forest` gives."""
    folder = files("atpo_fast.report")
    page = (folder / "template.html").read_text(encoding="utf-8")
    for mark, name in _PARTS.items():
        page = page.replace(mark, (folder / name).read_text(encoding="utf-8"))
    # the data last: text of a rollout may hold anything, marks of the template too
    return page.replace("{{title}}", html.escape(run["name"])).replace("{{data}}", embeddable_json(run))


def embeddable_json(data: Any) -> str:
    """Encode as JSON that may be put inside a <script> element: without a character that HTML would react to."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
