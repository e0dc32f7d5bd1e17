"""The documentation holds together: links, anchors, names of files, options and metrics, pictures, the strict build."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from tests.helpers.pages import ROOT, anchors, links, pages, spans

SOURCES = ("atpo_fast", "kernels", "tests", "bench", "configs", "examples", ".ci", "Makefile", "pyproject.toml")
README_LINES = 150
FOLDERS = "atpo_fast|kernels|docs|bench|configs|tests|examples"
# What a recipe of docs/extending.md names although it does not exist yet.
NOT_YET = re.compile(r"[<*]|mine[/.]|my_tool")


def by_page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> ModuleType:
    """A script outside the packages."""
    spec = importlib.util.spec_from_file_location(f"documentation_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def source_files() -> dict[Path, str]:
    """Text of every source file."""
    found = [
        path for name in SOURCES for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))
    ]
    kinds = (".py", ".yaml", ".toml", ".md", "")
    return {
        path: path.read_text(errors="replace")
        for path in found
        if path.is_file() and path.suffix in kinds and "results" not in path.parts and "__pycache__" not in path.parts
    }


@cache
def option_names() -> frozenset[str]:
    """Dotted names of every option and section, as the page on configuration lists them."""
    tables = load(ROOT / "docs" / "hooks.py").configuration_tables()
    keys = set(re.findall(r"^\| `([\w.]+)` \|", tables, re.MULTILINE))
    return frozenset(keys | {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)})


def test_readme_is_short() -> None:
    """Fails if the front page grows into a manual again."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


# Fails for a file that was moved or removed, and for a heading that was renamed, while a page still points there.
@pytest.mark.parametrize("page", pages(), ids=by_page)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not re.match(r"\w+:", link) and not (target.exists() and (not anchor or anchor in anchors(target))):
            wrong.append(link)
    assert not wrong, f"no such file or heading: {wrong}"


def test_references_in_code_lead_somewhere() -> None:
    """Fails for a reference to a heading that does not exist, and for one to a numbered section of the design."""
    for path, text in source_files().items():
        if path.parent == Path(__file__).parent:
            continue
        for name, anchor in re.findall(r"(docs/\w+\.md)(?:#([\w-]+))?", text):
            assert (ROOT / name).is_file(), f"{path}: {name} does not exist"
            assert not anchor or anchor in anchors(ROOT / name), f"{path}: {name} has no heading #{anchor}"
        assert not re.search(r"\(design,|of the design|design, section", text), f"{path}: name an anchor instead"


# Fails for a page that names a file, an option or a metric that is called otherwise now.
@pytest.mark.parametrize("page", pages(), ids=by_page)
def test_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # names of the past
        return
    wrong = [span for span in spans(page) if not (file_exists(span) and option_exists(span) and metric_exists(span))]
    assert not wrong, f"no such file, option or metric: {wrong}"


# Fails for a function that the README says is in a file, and that has another name by now, or lives elsewhere.
def test_readme_says_where_things_are() -> None:
    table = re.findall(
        r"^\| .+ \| (\[.*) \|$", (ROOT / "README.md").read_text().partition("| where is |")[2], re.MULTILINE
    )
    pointers = [found for cell in table for found in re.findall(r"\]\(([^)]+)\)([^\[]*)", cell)]
    assert len(pointers) > 6
    for file, text in pointers:
        for name in re.findall(r"`([\w.]+)`", text):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", (ROOT / file).read_text()), f"{file} has no {name}"


def file_exists(span: str) -> bool:
    """False for a path of this repository that is not there."""
    if not re.fullmatch(rf"(?:{FOLDERS})/[\w./<>*-]*", span) or NOT_YET.search(span):
        return True
    return (ROOT / span).exists()


def option_exists(span: str) -> bool:
    """False for `section.key`, or `section.key=value`, whose section exists and whose key does not."""
    option = re.match(r"([a-z_]+)\.[a-z_.]*[a-z](?=$|=)", span)
    if option is None or re.search(r"\.(py|md|json|jsonl|yaml|html|toml|db|txt)$", option[0]):
        return True
    names = option_names()
    return option[1] not in {name.split(".")[0] for name in names if "." in name} or option[0] in names


def metric_exists(span: str) -> bool:
    """False for `group/name` that no source file writes, whole or by its name."""
    metric = re.fullmatch(r"(reward|policy|rollout|tokens|rate|eval|cold_start)/(\w+)", span)
    if metric is None or (ROOT / "atpo_fast" / span).exists():
        return True
    return any(f'"{span}"' in text or f'"{metric[2]}"' in text for text in source_files().values())


def test_pictures_are_as_drawn() -> None:
    """Fails if a picture was edited by hand, or its record or script was changed and it was not drawn again."""
    folder = ROOT / "docs" / "pictures"
    for name, text in load(folder / "make.py").pictures().items():
        assert (folder / name).read_text() == text, f"{name}: run python docs/pictures/make.py"


def test_picture_of_packing_shows_the_real_mask() -> None:
    """Fails if the picture's subtree_end, or its number of flat tokens, is not what packing gives for its tree."""
    load(ROOT / "docs" / "pictures" / "make.py").pictures()
    picture = sys.modules["packing"]
    root, *turns = picture.TREE
    tree = TurnTree(prompt_ids=range(root.observation))
    for turn in turns:
        tree.add_turn(turn.parent, range(turn.action), None, range(turn.observation))
    for number, leaf in enumerate(tree.leaves):
        tree.set_reward(leaf, float(number))
    assign_credit([tree])
    (row,) = pack_trees([tree], Objective.preset("at2po"), 64, prune=False)
    assert row.subtree_end.tolist() == picture.subtree_ends()
    assert tree.flat_tokens == picture.flat_tokens()


def test_strict_build(tmp_path: Path) -> None:
    """Fails for anything MkDocs warns of, and for a site that loads something from elsewhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="(\w+:)?//', page.read_text())
        assert not loaded, f"{page.name} loads something from another host"
        assert 'class="arithmatex"' not in page.read_text(), f"{page.name}: a formula was left as it is written"
