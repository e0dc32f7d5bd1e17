"""A task: questions, passages, tokenizer, prompts and rewards, from the embedded world or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedTokenizerBase

from atpo_fast.common.errors import DataError
from atpo_fast.config import Config
from atpo_fast.data.decontamination import normalise_question
from atpo_fast.data.prompts import PROMPTS, SYSTEM_PROMPT, Prompt
from atpo_fast.data.questions import Passage, Question
from atpo_fast.data.readers import data_roots, distinct_passages, find_file, read_passages, read_question_files
from atpo_fast.data.tokenizers import load_tokenizer, train_bpe
from atpo_fast.environment import (
    BM25Search,
    Tool,
    close_tools,
    describe_in_words,
    describe_tools,
    described_schemas,
    open_further_tools,
)
from atpo_fast.environment.arguments import JsonSchema
from atpo_fast.environment.reward import ScoringRules
from atpo_fast.environment.rewards import check_questions, load_rewards
from atpo_fast.environment.sessions import Sessions, open_sessions, task_of, with_opening
from atpo_fast.task.definition import TaskDefinition, load_definition
from atpo_fast.task.demonstrations import evidence_demonstrations, read_demonstrations
from atpo_fast.task.prompt_encoder import PromptEncoder
from atpo_fast.tree.turn_tree import TurnTree
from atpo_fast.world import (
    make_demonstrations,
    make_levels,
    make_rooms_tokenizer,
    make_tokenizer,
    make_world,
    play_levels,
)

Notes = dict[str, float | str]
Describe = Callable[[Sequence[Question]], list[JsonSchema]]


@dataclass(slots=True, kw_only=True)
class Task:
    """The questions, passages, tokenizer, prompts and rewards of a run.

    `demonstrations` are chains for the cold start (`cold_start.demonstrations`, the world's own, or none).
    `encode_prompt` gives the token ids of a question's prompt. `rules` score trajectories.
    `tools` are the configured functions and MCP tools, open, which the prompts describe and `make_toolbox` takes over.
    `sessions` are the live environments of `environment.factory`, whose tools the prompts describe too.
    `notes` are facts a reader of the results needs: counts, what was dropped, guess rates.
    """

    train: list[Question]
    eval: list[Question]
    passages: list[Passage]
    tokenizer: PreTrainedTokenizerBase
    encode_prompt: PromptEncoder
    rules: ScoringRules = field(default_factory=ScoringRules)
    tools: list[Tool] = field(default_factory=list)
    sessions: Sessions | None = None
    demonstrations: list[TurnTree] = field(default_factory=list)
    notes: Notes = field(default_factory=dict)


def load_task(config: Config) -> Task:
    """Load or make the task that `config` describes. The same configuration gives the same task.

    Raises:
        ConfigError: the definition of the task, one of its rewards, or the environment cannot be used.
        FileNotFoundError: a data file, the model folder or its tokenizer is missing.
        DataError: a data file cannot be used; the message names file, record and field.
        ValueError: a prompt longer than `data.max_prompt_tokens`, an impossible world, or a function or an MCP tool
            that cannot be used.
        ConnectionError: an MCP server cannot be started or reached.
    """
    definition = load_definition(config.task)
    rewards, extraction = load_rewards(definition.terms), definition.extraction
    tools = open_further_tools(config.tools)
    opened: list[Sessions] = []

    def describe(questions: Sequence[Question]) -> list[JsonSchema]:
        """Return the tools that the prompt describes; those of a session are known when one was opened."""
        if config.environment.factory is not None and questions:
            opened.append(open_sessions(config, task_of(questions[0])))
        return described_schemas(config.tools, tools, opened[0].schemas if opened else ())

    try:
        task = _MAKE[config.data.source](config, definition, describe)
        task.tools = tools
        task.sessions = opened[0] if opened else None
        task.rules = ScoringRules(extraction=extraction, rewards=rewards, opening=task.encode_prompt.opening)
        if task.sessions is not None:
            task.sessions.scoring = task.rules.reads_score
        check_questions(rewards, task.train + task.eval)
        if config.cold_start.demonstrations is not None:
            given = config.cold_start.demonstrations
            task.demonstrations = read_demonstrations(given, task.encode_prompt)
        for question in task.train + task.eval:
            task.encode_prompt(question)
        return task
    except BaseException:
        close_tools([*tools, *opened])
        raise


def drop_overlap(train: list[Question], held_out: list[Question]) -> list[Question]:
    """Return the training questions whose text (normalised) is not among the evaluation questions."""
    texts = {normalise_question(question.text) for question in held_out}
    return [question for question in train if normalise_question(question.text) not in texts]


def _world_task(config: Config, definition: TaskDefinition, describe: Describe) -> Task:
    """Make the task of the embedded world of questions."""
    world = make_world(config.world)
    schemas = describe(world.train)
    if config.model.path:
        tokenizer = load_tokenizer(config.model.path)
    else:
        tokenizer = make_tokenizer(world, texts=[_in_words(config, schemas)])
    encode = _prompt_encoder(config, definition, tokenizer, schemas)
    search_tool = cache(BM25Search(world.passages, top_k=config.tools.top_k, passage_chars=config.tools.passage_chars))
    return Task(
        train=world.train[: config.data.max_train_questions],
        eval=world.eval[: config.data.max_eval_questions],
        passages=world.passages,
        tokenizer=tokenizer,
        encode_prompt=encode,
        demonstrations=make_demonstrations(world, config.world, tokenizer, search_tool, encode),
        notes=world.notes,
    )


def _rooms_task(config: Config, definition: TaskDefinition, describe: Describe) -> Task:
    """Make the task of the embedded world of rooms. Its prompts describe no tool: demonstrations show how to act."""
    levels, action = make_levels(config.rooms), config.environment.action
    describe(levels.train)
    if config.model.path:
        tokenizer = load_tokenizer(config.model.path)
    else:
        tokenizer = make_rooms_tokenizer(config.rooms, action)
    encode = _prompt_encoder(config, definition, tokenizer, ())
    return Task(
        train=levels.train[: config.data.max_train_questions],
        eval=levels.eval[: config.data.max_eval_questions],
        passages=[],
        tokenizer=tokenizer,
        encode_prompt=encode,
        demonstrations=play_levels(
            levels, config.rooms, tokenizer, lambda question, opening: encode(with_opening(question, opening)), action
        ),
    )


def _files_task(config: Config, definition: TaskDefinition, describe: Describe) -> Task:
    """Read questions and passages from disk; the tokenizer comes from the model folder or is trained on them."""
    data = config.data
    roots = data_roots(data)
    if not (data.train_files or data.eval_files or config.eval.sets):
        raise DataError("data.source=files needs data.train_files or data.eval_files (or eval.sets); all are empty")
    everything = read_question_files(roots, data.train_files, data.columns)
    held_out = read_question_files(roots, data.eval_files, data.columns)
    held_out = held_out[: data.max_eval_questions]
    train = drop_overlap(everything, held_out)
    found = [passage for name in data.corpus_files for passage in read_passages(find_file(roots, name))]
    passages = distinct_passages(found)
    notes: Notes = {"dropped_train_eval_overlap": float(len(everything) - len(train))}
    train = train[: data.max_train_questions]
    schemas = describe(train or held_out)
    notes |= {"train_questions": float(len(train)), "eval_questions": float(len(held_out))}
    notes |= {"passages": float(len(passages)), "dropped_duplicate_passages": float(len(found) - len(passages))}
    if config.model.path:
        tokenizer = load_tokenizer(config.model.path)
    else:
        texts = [
            *_prompt_texts(definition.templates),
            *filter(None, [_in_words(config, schemas)]),
            *(q.text for q in train + held_out),
            *(p.contents for p in passages),
        ]
        tokenizer = train_bpe(texts, config.model.vocab_size)
    encode = _prompt_encoder(config, definition, tokenizer, schemas)
    demonstrations: list[TurnTree] = []
    if config.cold_start.from_evidence:
        search_tool = BM25Search(passages, top_k=config.tools.top_k, passage_chars=config.tools.passage_chars)
        demonstrations = evidence_demonstrations(train, search_tool, encode, definition.extraction)
        if not demonstrations:
            raise DataError(
                "cold_start.from_evidence: no training question names its evidence (supporting_facts, paragraphs)"
            )
    return Task(
        train=train,
        eval=held_out,
        passages=passages,
        tokenizer=tokenizer,
        encode_prompt=encode,
        demonstrations=demonstrations,
        notes=notes,
    )


def _prompt_encoder(
    config: Config, definition: TaskDefinition, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[JsonSchema]
) -> PromptEncoder:
    """Return the function from a question to the token ids of its prompt, which describes the tools of `schemas`."""
    prompt = definition.templates
    return PromptEncoder(
        prompt,
        tokenizer,
        max_tokens=config.data.max_prompt_tokens,
        tools=describe_tools(schemas, tokenizer, prompt, with_search="search" in config.tools.builtin),
        tool_names=[*config.tools.builtin, *(schema["function"]["name"] for schema in schemas)],
    )


def _prompt_texts(prompt: Prompt) -> list[str]:
    """Return the texts of a prompt that a tokenizer made for the task learns from."""
    return [SYSTEM_PROMPT] if prompt in PROMPTS.values() else [prompt.system, prompt.user]


def _in_words(config: Config, schemas: Sequence[JsonSchema]) -> str:
    return describe_in_words(schemas, with_search="search" in config.tools.builtin)


_MAKE: dict[str, Callable[[Config, TaskDefinition, Describe], Task]] = {
    "world": _world_task,
    "rooms": _rooms_task,
    "files": _files_task,
}
