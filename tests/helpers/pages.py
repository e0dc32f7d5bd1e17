"""The documentation as its tests read it: pages, anchors, fenced blocks and code spans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(\w*)[ \t]*(.*?)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_GENERATED = ("RESULTS.md", "RESOURCES.md", "RESOURCES-3.6.md")  # written by the benches


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `title` is what the page says of it, such as "needs a GPU"."""

    page: Path
    heading: str  # above it
    language: str
    title: str
    code: str

    def __str__(self) -> str:
        first = next((line for line in self.code.splitlines() if line.strip()), "")
        return f"{self.page.relative_to(ROOT)}: {first[:60]}"


def pages() -> list[Path]:
    """Every page that a person writes."""
    folders = ("docs", "kernels", "examples", "tests", "bench", "configs")
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return sorted(path for path in found if path.name not in _GENERATED)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    return {slug(heading) for heading in re.findall(r"^#+ +(.+)$", without_blocks(page.read_text()), re.MULTILINE)}


def slug(heading: str) -> str:
    """The anchor of a heading: lower case, letters, digits and hyphens."""
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[\s-]+", "-", words.encode("ascii", "ignore").decode())


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        above = re.findall(r"^#+ +(.+)$", without_blocks(text[: match.start()]), re.MULTILINE)
        title = re.search(r'title="([^"]*)"', match[2])
        yield Block(page, above[-1] if above else "", match[1], title[1] if title else "", match[3])


def spans(page: Path) -> list[str]:
    """The code spans of a page."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page.read_text()))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text()))
