"""Where the questions of a set are: local files, or the FlashRAG collection on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atpo_fast.common.errors import DataError

Split = Literal["train", "eval"]

HUB_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
HUB_SETS: dict[str, tuple[str, str | None, str]] = {
    "hotpotqa": ("hotpotqa", "train", "dev"),
    "2wiki": ("2wikimultihopqa", "train", "dev"),
    "musique": ("musique", "train", "dev"),
    "bamboogle": ("bamboogle", None, "test"),
    "nq": ("nq", "train", "test"),
    "triviaqa": ("triviaqa", "train", "test"),
    "popqa": ("popqa", None, "test"),
}
"""Name of a set -> its folder in the repository, its training split if it has one, and its evaluation split as
published with AT²PO: test where there is one with answers, else dev."""


@dataclass(frozen=True, slots=True)
class SetSource:
    """A set of questions and its files; without files it comes from the hub."""

    name: str
    files: tuple[str, ...] = ()


def parse_source(text: str) -> SetSource:
    """Parse NAME or NAME=FILE,FILE.

    Raises:
        ValueError: there is no name, or it cannot be that of a file; or a set without files is none of the hub's.
    """
    name, equals, files = text.partition("=")
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{text!r} must be NAME=FILE,FILE or the NAME of a set on the hub, and NAME a file name")
    found = tuple(file for file in files.split(",") if file)
    if not found and (equals or name not in HUB_SETS):
        raise ValueError(f"{text!r} names no files (NAME=FILE,FILE); sets on the hub are {', '.join(HUB_SETS)}")
    return SetSource(name, found)


def locate(source: SetSource, split: Split, root: Path) -> list[Path]:
    """Return the files of a set, those on the hub after they were fetched.

    Raises:
        DataError: the set has no such split on the hub, or the hub cannot be reached.
    """
    if source.files:
        return [root / file for file in source.files]
    folder, train, evaluation = HUB_SETS[source.name]
    part = train if split == "train" else evaluation
    if part is None:
        raise DataError(f"{source.name} has no training questions: it is for evaluation only")
    return [_fetch(source.name, split, f"{folder}/{part}.jsonl")]


def _fetch(name: str, split: Split, file: str) -> Path:
    """Fetch a file of the repository into the hub's cache, and return its path there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, file, repo_type="dataset"))
    except (OSError, HfHubHTTPError) as error:  # also what it raises offline, and for what is not there
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file} of {HUB_REPOSITORY} cannot be fetched from the Hugging Face hub ({reason}); name local files: "
            f"--{split} {name}=FILE"
        ) from error
