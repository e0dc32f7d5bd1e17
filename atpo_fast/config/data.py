"""Sections `data`, `world` and `rooms`: where questions and passages come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class ColumnsConfig:
    """Columns of question files. A name with dots reaches inside, such as `extra_info.index`. A column that is not
    named is recognised by the names that FlashRAG, HotpotQA, MuSiQue, TriviaQA, GSM8K, verl and TRL use."""

    question: str | None = None
    """Column of the question's text, or of its chat; none: question, problem, prompt or messages."""
    answers: str | None = None
    """Column of the accepted answers, one or a list; none: golden_answers, answers, answer, reward_model.ground_truth,
    possible_answers, ground_truth or solution."""
    id: str | None = None
    """Column that tells questions apart; none: id, _id, qid, idx, question_id or extra_info.index, else the record's
    number."""
    source: str | None = None
    """Column of the data set that a question comes from; none: data_source, else the file's name."""


@dataclass(config=STRICT, kw_only=True)
class DataConfig:
    """Sources of questions, passages and tokenizer."""

    source: Literal["world", "rooms", "files"] = "files"
    """Source of the task. world: the embedded world of questions, generated from a seed. rooms: the embedded world of
    rooms, whose actions change it. files: data files on disk."""
    train_files: list[str] = Field(default_factory=list)
    """Question files (.json, .jsonl, .csv, .tsv, .parquet, each also .gz; or folders that `datasets` saved), relative
    to `root`."""
    eval_files: list[str] = Field(default_factory=list)
    """Question files for evaluation."""
    corpus_files: list[str] = Field(default_factory=list)
    """Passage files, or question files whose paragraphs become the passages."""
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    """Columns of the question files, where they are not recognised."""
    root: str = "."
    """Folder that the files are relative to. The folder that the environment variable ATPO_DATA names comes first: what
    it does not have is taken from here."""
    max_train_questions: int | None = Field(default=None, ge=1)
    """Number of training questions used, the first ones; none: all."""
    max_eval_questions: int | None = Field(default=None, ge=1)
    """Number of evaluation questions used, the first ones, of each of `eval.sets` so many; none: all."""
    max_prompt_tokens: int = Field(default=2000, ge=1)
    """Longest prompt; a longer one is an error that names the question."""


@dataclass(config=STRICT, kw_only=True)
class WorldConfig:
    """The embedded world of questions (used when data.source is `world`)."""

    entities: int = Field(default=60, ge=10)
    """Number of entities."""
    relations: int = Field(default=5, ge=2)
    """Number of relations; every entity has every relation."""
    max_hops: int = Field(default=3, ge=1, le=4)
    """Largest number of look-ups that a question needs; the smallest is 1."""
    train_questions: int = Field(default=2000, ge=1)
    """Number of training questions."""
    eval_questions: int = Field(default=200, ge=1)
    """Number of evaluation questions; none of their compositions is in training."""
    demonstrations: int = Field(default=4000, ge=1)
    """Number of scripted demonstrations for the cold start."""
    good_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of demonstrations that follow the right strategy; the rest follow poor ones."""
    seed: int = 0
    """Seed of the world itself; the run's seed is separate."""


@dataclass(config=STRICT, kw_only=True)
class RoomsConfig:
    """The embedded world of rooms, keys and locked doors (used when data.source is `rooms`)."""

    colours: int = Field(default=8, ge=3, le=12)
    """Number of colours of keys, doors and treasures."""
    keys: int = Field(default=3, ge=2)
    """Number of keys in a room, and of doors; one of them leads on."""
    shown: int = Field(default=2, ge=1)
    """Number of the keys that a look shows."""
    max_doors: int = Field(default=3, ge=1)
    """Largest number of doors on the way to the treasury; the smallest is 1."""
    train_questions: int = Field(default=2000, ge=1)
    """Number of training questions."""
    eval_questions: int = Field(default=200, ge=1)
    """Number of evaluation questions."""
    demonstrations: int = Field(default=4000, ge=1)
    """Number of scripted demonstrations for the cold start."""
    haste: float = Field(default=0.75, ge=0, le=1)
    """Probability with which the player of the demonstrations takes the first key in sight, or names the first
    treasure, without regard to what it is asked for; otherwise it does what is right."""
    door_reward: float = 0.0
    """Reward of the turn that opens a right door, beside the outcome."""
    seed: int = 0
    """Seed of the world itself; the run's seed is separate."""

    def __post_init__(self) -> None:
        if not self.shown <= self.keys <= self.colours:
            raise ValueError(
                f"rooms.shown={self.shown}, rooms.keys={self.keys} and rooms.colours={self.colours} must ascend: a "
                "look shows some of the keys of a room, whose colours differ"
            )
