"""Life of a tree: the stations of a training step, what each hands on, and the folder that does it."""

from __future__ import annotations

from drawing import AMBER, BLUE, GREEN, MUTED, VIOLET, Drawing

WIDTH, HEIGHT, GAP, LEFT = 176, 132, 93, 32
ROWS = (70, 270)  # top edges
# (name, colour, what happens, folder, what it hands on)
STATIONS = [
    (
        "1  Roll out",
        AMBER,
        ["the engine writes turns,", "tools answer, turns of high", "entropy are re-sampled"],
        "rollout/  engines/",
        "TurnTree",
    ),
    (
        "2  Score",
        AMBER,
        ["every leaf is decoded", "once and compared with", "the accepted answers"],
        "train/  environment/",
        "rewards",
    ),
    ("3  Credit", GREEN, ["rewards become values", "and advantages of turns", ""], "credit/", "advantages"),
    (
        "4  Pack",
        VIOLET,
        ["trees become rows with", "one copy of each token", "and weights W⁺ W⁻ W⁰"],
        "packing/",
        "PackedTrees",
    ),
    ("5  Spread", VIOLET, ["rows go to the ranks,", "balanced by their cost", ""], "packing/  policy/", "rows"),
    (
        "6  Forward and loss",
        BLUE,
        ["tree attention, then head", "and loss in one operator,", "on action tokens only"],
        "policy/  kernels/",
        "gradients",
    ),
    (
        "7  Optimizer step",
        BLUE,
        ["ZeRO gathers, reduces", "and steps, unless a", "gradient is not finite"],
        "train/",
        "new weights",
    ),
    (
        "8  Sync",
        AMBER,
        ["weights are streamed into", "the engine, a bucket of", "parameters at a time"],
        "train/  engines/",
        "weights",
    ),
]


def draw() -> Drawing:
    """Draw the life of a tree, station by station."""
    picture = Drawing(1046, 468, "Life of a tree: the eight stations of a training step")
    picture.text(LEFT, 40, "One training step", size=15.5, bold=True, anchor="start")
    words = "questions enter at 1; the next step begins with the weights of 8"
    picture.text(LEFT + 150, 40, words, size=12.5, colour=MUTED, anchor="start")
    for number, (name, colour, lines, folder, handed_on) in enumerate(STATIONS):
        x, y = _corner(number)
        picture.box(x, y, WIDTH, HEIGHT, stroke=colour, thickness=1.6, radius=8)
        picture.text(x + 14, y + 26, name, size=14.5, bold=True, colour=colour, anchor="start")
        picture.lines(x + 14, y + 50, lines, size=12.5, anchor="start")
        picture.text(x + 14, y + HEIGHT - 14, folder, size=12, mono=True, colour=MUTED, anchor="start")
        _hand_on(picture, number, handed_on)
    words = "Every token is generated and prefilled once; an update forwards and back-propagates it once. "
    words += "The head sees only what the policy wrote."
    picture.text(LEFT, 442, words, size=12.5, anchor="start")
    return picture


def _corner(number: int) -> tuple[float, float]:
    """Top left corner of a station; the second row runs back."""
    row, column = divmod(number, 4)
    return LEFT + (column if row == 0 else 3 - column) * (WIDTH + GAP), ROWS[row]


def _hand_on(picture: Drawing, number: int, words: str) -> None:
    """Draw the arrow from a station to the next, and what passes."""
    (x, y), (to_x, to_y) = _corner(number), _corner((number + 1) % len(STATIONS))
    if y == to_y:
        start, end = (x + WIDTH + 4, to_x - 4) if to_x > x else (x - 4, to_x + WIDTH + 4)
        picture.arrow([(start, y + 66), (end, y + 66)])
        picture.text((start + end) / 2, y + 56, words, size=11, mono=True)
    else:
        middle = x + WIDTH / 2
        picture.arrow(
            [(middle, y + HEIGHT + 4), (middle, to_y - 4)]
            if to_y > y
            else [(middle, y - 4), (middle, to_y + HEIGHT + 4)]
        )
        picture.text(
            middle + 10, (max(y, to_y) + min(y, to_y) + HEIGHT) / 2 + 4, words, size=11, mono=True, anchor="start"
        )
