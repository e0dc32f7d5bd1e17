"""Take the picture of a report: `python docs/pictures/screenshot.py runs/quickstart/report.html`.

It needs Chromium and Pillow. Two parts of the page are put one above the other: the head with the first plots, and a
search tree.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1280, 2900
TOP = 735  # what is kept of the head and the first plots
TREE = 560  # and of the search tree
GREY = (247, 247, 245)


def take(report: Path, target: Path) -> None:
    """Write the picture of `report` to `target`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("screenshot: Chromium is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "page.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=4000"]
        size, shot = f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={whole}"
        command = [browser, *options, size, shot, report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        page = Image.open(whole).convert("RGB")
    start = _tree_start(page)
    picture = Image.new("RGB", (WIDTH, TOP + TREE), GREY)
    picture.paste(page.crop((0, 0, WIDTH, TOP)), (0, 0))
    picture.paste(page.crop((0, start, WIDTH, start + TREE)), (0, TOP))
    picture.quantize(256).save(target, optimize=True)


def _tree_start(page: Image.Image) -> int:
    """Where the search trees begin: after the last wide gap between the plots and what follows them."""
    grey = [page.crop((24, y, WIDTH - 24, y + 1)).getcolors(4) is not None for y in range(page.height)]
    runs, y = [], TOP
    while y < page.height - TREE:
        if grey[y]:
            begin = y
            while y < page.height and grey[y]:
                y += 1
            if y - begin >= 24:
                runs.append((begin + y) // 2)
        y += 1
    after = [middle for middle in runs if middle > 1700]
    return after[0] if after else page.height - TREE


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(__file__).parent / "report.png")
