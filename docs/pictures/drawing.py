"""A few shapes in SVG: enough for the pictures of the documentation, and the same bytes every time.

Every picture brings its own light background, so that it is readable on a dark page too.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, MUTED, LINE, PAPER = "#1f2937", "#5b6472", "#9aa3b0", "#fbfbfd"
PROMPT, ACTION, RESULT = "#e3e6ec", "#cfe1fd", "#fde9b8"  # who wrote the tokens: the task, the policy, the environment
BLUE, AMBER, GREEN, RED, VIOLET = "#1d5fd1", "#a85b06", "#15803d", "#b91c1c", "#6d3fc4"
GREEN_FILL, RED_FILL, VIOLET_FILL = "#d6f2df", "#fbd9d9", "#e7defa"
SANS = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'Liberation Mono', 'DejaVu Sans Mono', monospace"


class Drawing:
    """One picture; shapes lie over those that were drawn before.

    Args:
        width, height: size in pixels.
        title: what a screen reader says.
    """

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family="{SANS}">',
            f"<title>{escape(title)}</title>",
            "<defs>",
            *(_arrow_head(name, colour) for name, colour in _HEADS.items()),
            "</defs>",
        ]
        self.box(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke="#d9dde4", radius=10)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "white",
        stroke: str = LINE,
        radius: float = 6,
        thickness: float = 1,
        dashed: bool = False,
    ) -> None:
        """Draw a rectangle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(radius)}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{_n(thickness)}"{dash}/>'
        )

    def circle(
        self,
        x: float,
        y: float,
        radius: float,
        *,
        fill: str = "white",
        stroke: str = LINE,
        thickness: float = 1.5,
        dashed: bool = False,
    ) -> None:
        """Draw a circle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{_n(thickness)}"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        colour: str = INK,
        anchor: str = "middle",
        bold: bool = False,
        mono: bool = False,
        italic: bool = False,
    ) -> None:
        """Write one line; `y` is its base line."""
        style = (' font-weight="600"' if bold else "") + (' font-style="italic"' if italic else "")
        family = f' font-family="{MONO}"' if mono else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{colour}" text-anchor="{anchor}"'
            f"{style}{family}>{escape(words)}</text>"
        )

    def lines(self, x: float, y: float, rows: Sequence[str], *, leading: float = 17, **style: object) -> None:
        """Write several lines, one below another."""
        for number, row in enumerate(rows):
            self.text(x, y + number * leading, row, **style)  # type: ignore[arg-type]

    def arrow(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = MUTED,
        thickness: float = 1.6,
        dashed: bool = False,
        head: bool = True,
    ) -> None:
        """Draw a line through `points`, with a head at its end."""
        path = "M" + " L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        names = {colour: name for name, colour in _HEADS.items()}
        end = f' marker-end="url(#{names[colour]})"' if head else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{_n(thickness)}"{dash}{end}/>'
        )

    def svg(self) -> str:
        """Return the picture as SVG text."""
        return "\n".join([*self._parts, "</svg>", ""])


_HEADS = {"muted": MUTED, "blue": BLUE, "green": GREEN, "red": RED, "violet": VIOLET, "line": LINE, "amber": AMBER}


def _arrow_head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0.8 L9.5 5 L0 9.2 z" fill="{colour}"/></marker>'
    )


def _n(value: float) -> str:
    """Format a number without trailing zeros."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
