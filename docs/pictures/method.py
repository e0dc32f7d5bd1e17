"""The method in three panels: a tree is expanded, credit flows up it, the policy learns turn by turn."""

from __future__ import annotations

from math import exp

from drawing import (
    ACTION,
    AMBER,
    BLUE,
    GREEN,
    GREEN_FILL,
    INK,
    LINE,
    MUTED,
    PROMPT,
    RED,
    RED_FILL,
    RESULT,
    VIOLET,
    VIOLET_FILL,
    Drawing,
)

PANEL, TOP, HEIGHT = 330, 16, 424
# Turns by name: (x, y, parent); x is relative to the panel.
TURNS: dict[str, tuple[float, float, str | None]] = {
    "root": (165, 84, None),
    "a": (52, 152, "root"),
    "b": (165, 152, "root"),
    "c": (278, 152, "root"),
    "a1": (52, 220, "a"),
    "b1": (118, 220, "b"),
    "b2": (212, 220, "b"),
    "c1": (278, 220, "c"),
    "b1 answer": (118, 288, "b1"),
    "b2 answer": (212, 288, "b2"),
}
ENTROPY = {"a": 0.31, "b": 0.92, "c": 0.20, "b1": 1.40, "b2": 1.10}
REWARD = {"a1": 0.0, "b1 answer": 0.0, "b2 answer": 1.0, "c1": -1.0}
CHOSEN, NEW = "b1", ("b2", "b2 answer")


def values() -> dict[str, float]:
    """Value of every turn but the root: standardised rewards, then softmax-weighted means of the children."""
    mean = sum(REWARD.values()) / len(REWARD)
    std = (sum((reward - mean) ** 2 for reward in REWARD.values()) / len(REWARD)) ** 0.5
    found = {name: (reward - mean) / (std + 1e-6) for name, reward in REWARD.items()}
    for name in reversed(TURNS):
        children = [child for child, (_, _, parent) in TURNS.items() if parent == name]
        if children and name != "root":
            weights = [exp(ENTROPY.get(child, 0.0)) for child in children]
            found[name] = sum(w * found[c] for w, c in zip(weights, children, strict=True)) / sum(weights)
    return found


def draw() -> Drawing:
    """Draw the method in three panels."""
    picture = Drawing(
        3 * PANEL + 4 * 14, TOP + HEIGHT + 16, "The method: expand the tree, assign credit, update by turn"
    )
    for number, (title, panel) in enumerate(
        [
            ("1  Expand where the policy is unsure", _expand),
            ("2  Credit flows up", _credit),
            ("3  Update turn by turn", _update),
        ]
    ):
        left = 14 + number * (PANEL + 14)
        picture.box(left, TOP, PANEL, HEIGHT, fill="white", stroke="#d9dde4", radius=8)
        picture.text(left + 16, TOP + 28, title, size=15.5, bold=True, anchor="start")
        panel(picture, left)
    return picture


def _edges(picture: Drawing, left: float, *, up: bool) -> None:
    for name, (x, y, parent) in TURNS.items():
        if parent is None:
            continue
        px, py, _ = TURNS[parent]
        length = ((px - x) ** 2 + (py - y) ** 2) ** 0.5
        dx, dy = 20 * (px - x) / length, 20 * (py - y) / length
        ends = [(left + px - dx, py - dy), (left + x + dx, y + dy)]
        if up:
            picture.arrow(ends[::-1], colour=GREEN)
        else:
            picture.arrow(ends, colour=VIOLET if name in NEW else LINE, dashed=name in NEW)


def _expand(picture: Drawing, left: float) -> None:
    _edges(picture, left, up=False)
    for name, (x, y, parent) in TURNS.items():
        new, chosen = name in NEW, name == CHOSEN
        fill = PROMPT if parent is None else (VIOLET_FILL if chosen or new else ACTION)
        stroke = VIOLET if chosen or new else LINE
        picture.circle(left + x, y, 18, fill=fill, stroke=stroke, dashed=new, thickness=2.4 if chosen else 1.5)
        if parent is None:
            picture.text(left + x, y + 4.5, "q", size=14, italic=True)
        elif name in REWARD:
            picture.text(left + x, y + 4, "ans", size=11, colour=VIOLET if new else MUTED)
        else:
            words = "new" if new else f"{ENTROPY[name]:.2f}"
            picture.text(left + x, y + 4, words, size=11.5, colour=stroke if chosen or new else INK, bold=chosen or new)
    picture.lines(
        left + 16,
        340,
        [
            "M chains are run from the question to their ends.",
            "Then L rounds: the K turns of the best score",
            "H(n) − α · (number of n's siblings)",
            "each get a new sibling, run to its end too.",
        ],
        size=12.5,
        anchor="start",
    )
    picture.text(
        left + 16, 424, "H(n): mean −log-prob of the turn's own tokens", size=12, anchor="start", colour=VIOLET
    )


def _credit(picture: Drawing, left: float) -> None:
    _edges(picture, left, up=True)
    value = values()
    for name, (x, y, parent) in TURNS.items():
        if parent is None:
            picture.circle(left + x, y, 18, fill=PROMPT)
            picture.text(left + x, y + 4.5, "q", size=14, italic=True)
            continue
        sign = round(value[name], 2)
        fill, stroke = (GREEN_FILL, GREEN) if sign > 0 else (RED_FILL, RED) if sign < 0 else ("white", LINE)
        picture.circle(left + x, y, 18, fill=fill, stroke=stroke)
        words = f"{value[name]:+.2f}".replace("-", "−") if sign else "0"
        picture.text(left + x, y + 4, words, size=10.5, colour=stroke if sign else MUTED, bold=True)
        if name in REWARD:
            reward = f"R = {REWARD[name]:.0f}".replace("-", "−")
            below = name not in NEW and "answer" not in name
            picture.text(
                left + x + (0 if below else 24),
                y + (34 if below else 4),
                reward,
                size=12,
                colour=MUTED,
                anchor="middle" if below else "start",
            )
    picture.lines(
        left + 16,
        340,
        [
            "Only answers earn a reward R. Within a tree it is",
            "standardised: (R − mean) / (std + 10⁻⁶).",
            "A turn is worth the mean of its children,",
            "weighted by the softmax of their entropies.",
        ],
        size=12.5,
        anchor="start",
    )
    picture.text(left + 16, 424, "The advantage of a turn is its own value", size=12, anchor="start", colour=GREEN)


def _update(picture: Drawing, left: float) -> None:
    x = left + 16
    for words, count, fill in (
        ("prompt", 3, PROMPT),
        ("turn 1", 4, ACTION),
        ("result", 3, RESULT),
        ("turn 2", 5, ACTION),
    ):
        for _ in range(count):
            picture.box(x, 84, 17, 24, fill=fill, radius=3)
            x += 19.5
        colour = BLUE if "turn" in words else (AMBER if words == "result" else MUTED)
        middle = x - (count * 19.5 + 2.5) / 2
        picture.text(middle, 76, words, size=11.5, colour=colour)
        if "turn" in words:
            start, end = x - count * 19.5, x - 2.5
            picture.arrow([(start, 114), (start, 121), (end, 121), (end, 114)], colour=BLUE, head=False)
            picture.arrow([(middle, 121), (middle, 140)], colour=BLUE)
            picture.text(middle, 157, "one ratio", size=12, colour=BLUE, bold=True)
    picture.text(left + 165, 190, "ρ = exp( mean of log π − log π_old over the turn )", size=12.5)
    _band(picture, left)
    picture.lines(
        left + 16,
        348,
        [
            "A turn has one ratio. It leaves the narrow range",
            "only if the turn as a whole has moved; then all",
            "of its tokens go without a gradient.",
        ],
        size=12.5,
        anchor="start",
    )
    picture.text(left + 16, 424, "Prompt and results are never trained on", size=12, anchor="start", colour=BLUE)


def _band(picture: Drawing, left: float) -> None:
    """Draw the clipped surrogate of a positive advantage."""
    x0, y0, width, height = left + 46, 206, 250, 92
    low, high = x0 + 0.36 * width, x0 + 0.68 * width
    picture.box(low, y0, high - low, height, fill="#eef4fe", stroke="none", radius=0)
    picture.arrow([(x0, y0 + height), (x0 + width + 10, y0 + height)], colour=MUTED, thickness=1.2)
    picture.arrow([(x0, y0 + height), (x0, y0 - 4)], colour=MUTED, thickness=1.2)
    picture.arrow(
        [(x0, y0 + height - 8), (high, y0 + 24), (x0 + width, y0 + 24)], colour=BLUE, thickness=2.4, head=False
    )
    for x, words in ((low, "1 − 0.003"), (high, "1 + 0.004")):
        picture.arrow([(x, y0 + height), (x, y0 + height + 5)], colour=INK, thickness=1, head=False)
        picture.text(x, y0 + height + 18, words, size=11, colour=MUTED)
    picture.text(x0 + width + 4, y0 + height - 8, "ρ", size=13, italic=True)
    picture.text(x0 + 6, y0 + 6, "gain, A > 0", size=11, colour=MUTED, anchor="start")
    picture.text((high + x0 + width) / 2, y0 + 17, "no gradient", size=11, colour=BLUE)
