"""Packing: a tree becomes one row, and one integer for each token is the whole attention mask."""

from __future__ import annotations

from typing import NamedTuple

from drawing import ACTION, AMBER, BLUE, INK, LINE, MUTED, PROMPT, RESULT, VIOLET, Drawing


class Turn(NamedTuple):
    """A turn of the example."""

    name: str
    parent: int
    action: int  # tokens that the policy wrote
    observation: int  # tokens that the environment answered; of the root: the prompt


TREE = [Turn("q", -1, 0, 3), Turn("A", 0, 2, 2), Turn("B", 1, 2, 0), Turn("C", 1, 2, 0), Turn("D", 0, 3, 0)]
PLACE = [(170, 96), (100, 184), (58, 272), (146, 272), (240, 184)]  # of the turns
CELL = 24


def subtree_ends() -> list[int]:
    """(T,) of every token: the index after the last token of its turn's subtree. TREE is in pre-order."""
    start, ends = 0, []
    starts = []
    for turn in TREE:
        starts.append(start)
        start += turn.action + turn.observation
    for number, turn in enumerate(TREE):
        end = starts[number] + turn.action + turn.observation
        for later in range(number + 1, len(TREE)):
            above = TREE[later].parent
            while above > number:
                above = TREE[above].parent
            if above == number:
                end = starts[later] + TREE[later].action + TREE[later].observation
        ends += [end] * (turn.action + turn.observation)
    return ends


def flat_tokens() -> int:
    """Tokens of all trajectories, written out one by one."""
    paths: list[int] = []
    for turn in TREE:
        paths.append(turn.action + turn.observation + (paths[turn.parent] if turn.parent >= 0 else 0))
    parents = {turn.parent for turn in TREE}
    return sum(length for number, length in enumerate(paths) if number not in parents)


def draw() -> Drawing:
    """Draw a tree, its row and the attention between their tokens."""
    picture = Drawing(1046, 452, "Packing: a tree, its row of tokens, and the mask that follows from subtree_end")
    _tree(picture)
    _row(picture)
    _mask(picture)
    return picture


def _tokens() -> list[tuple[str, str]]:
    """(turn, fill) of every token of the row."""
    tokens = []
    for turn in TREE:
        tokens += [(turn.name, ACTION)] * turn.action
        tokens += [(turn.name, PROMPT if turn.parent < 0 else RESULT)] * turn.observation
    return tokens


def _tree(picture: Drawing) -> None:
    picture.text(24, 38, "A tree of turns", size=15.5, bold=True, anchor="start")
    for turn, (x, y) in zip(TREE, PLACE, strict=True):
        if turn.parent >= 0:
            px, py = PLACE[turn.parent]
            picture.arrow([(px, py + 14), (x, y - 26)], colour=LINE)
    for turn, (x, y) in zip(TREE, PLACE, strict=True):
        fills = [ACTION] * turn.action + [PROMPT if turn.parent < 0 else RESULT] * turn.observation
        left = x - len(fills) * 8.5
        for number, fill in enumerate(fills):
            picture.box(left + 17 * number, y - 10, 15, 22, fill=fill, radius=3)
        picture.text(x, y - 15, turn.name, size=12.5, bold=True, italic=turn.parent < 0)
    for number, (fill, colour, words) in enumerate(
        [(PROMPT, MUTED, "prompt"), (ACTION, BLUE, "written by the policy"), (RESULT, AMBER, "tool result")]
    ):
        picture.box(24, 342 + 22 * number, 13, 13, fill=fill, radius=3)
        picture.text(44, 353 + 22 * number, words, size=12.5, colour=colour, anchor="start")
    words = f"3 leaves: {flat_tokens()} tokens written out, {len(_tokens())} in the tree"
    picture.text(24, 428, words, size=12.5, anchor="start")


def _row(picture: Drawing) -> None:
    x, y = 318, 96
    picture.text(x, 38, "One row, depth first, every token once", size=15.5, bold=True, anchor="start")
    tokens, ends = _tokens(), subtree_ends()
    for number, ((name, fill), end) in enumerate(zip(tokens, ends, strict=True)):
        left = x + number * CELL
        picture.text(left + CELL / 2, y - 8, str(number), size=10, colour=MUTED)
        picture.box(left + 1, y, CELL - 2, 28, fill=fill, radius=3)
        picture.text(left + CELL / 2, y + 18.5, name, size=12)
        picture.text(left + CELL / 2, y + 58, str(end), size=12, colour=VIOLET, bold=True, mono=True)
    words = "subtree_end: where the subtree of the token's turn ends"
    picture.text(x, y + 78, words, size=12.5, colour=VIOLET, anchor="start")
    picture.box(x, 202, 336, 62, fill="#f3effd", stroke=VIOLET)
    picture.text(x + 168, 227, "query q sees key k   ⇔", size=14)
    picture.text(x + 168, 249, "k ≤ q < subtree_end[k]", size=15, mono=True, bold=True, colour=VIOLET)
    picture.lines(
        x,
        296,
        [
            "This one int32 per token is the whole mask:",
            "no N × N mask ever exists, and lists of blocks",
            "for the kernels come from turns, not tokens.",
        ],
        size=12.5,
        anchor="start",
    )
    picture.lines(
        x,
        364,
        [
            "predictor[t]: the token whose hidden state predicts t,",
            "the left neighbour; for the first token of C and of D",
            "the last token of their parent (6 and 2).",
        ],
        size=12.5,
        anchor="start",
        colour=BLUE,
    )


def _mask(picture: Drawing) -> None:
    size, x, y = 22, 716, 78
    tokens, ends = _tokens(), subtree_ends()
    picture.text(x, 38, "What each token sees", size=15.5, bold=True, anchor="start")
    for query, (name, fill) in enumerate(tokens):
        picture.box(x - 22, y + query * size + 1, 18, size - 2, fill=fill, radius=3)
        picture.text(x - 13, y + query * size + 15.5, name, size=11)
        picture.box(x + query * size + 1, y - 22, size - 2, 18, fill=fill, radius=3)
        picture.text(x + query * size + size / 2, y - 9, name, size=11)
        for key, end in enumerate(ends):
            seen = key <= query < end
            picture.box(
                x + key * size + 0.5,
                y + query * size + 0.5,
                size - 1,
                size - 1,
                fill="#8f6bdc" if seen else "#f1f2f5",
                stroke="none",
                radius=2,
            )
    bottom = y + len(tokens) * size
    picture.text(x, bottom + 22, "rows: queries, columns: keys.", size=12.5, colour=MUTED, anchor="start")
    picture.text(
        x, bottom + 39, "C does not see B. D sees the prompt and itself.", size=12.5, colour=INK, anchor="start"
    )
