"""Questions about the rooms (`rooms.py`), a tokenizer for them, and scripted demonstrations for the cold start.

As in the world of questions, demonstrations teach the format and copying, and follow mostly poor strategies, so that
reinforcement learning has something to find. A thought is what is left to do and what was seen last:

    <think> red then blue</think><act> look</act>
    <think> red then blue</think><act> take red</act>
    <think> red then blue</think><act> open red</act>
    ...
    <think> gem w3</think><answer> \\boxed{ w3 }</answer>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from atpo_fast.config import RoomsConfig
from atpo_fast.data.questions import Question
from atpo_fast.data.tokenizers import TAGS
from atpo_fast.environment.tags import CALL_LIMIT_NOTICE, close_tag, format_result, open_tag
from atpo_fast.tree.turn_tree import TurnTree
from atpo_fast.world.rooms import UNKNOWN, open_session
from atpo_fast.world.tokenizer import split_words, word_level_tokenizer

_COLOURS = ("red", "blue", "green", "white", "black", "pink", "grey", "gold", "brown", "teal", "lime", "plum")
_FRAME = (  # every text of the rooms and of their environment, names left out
    "Open then.\n",
    "<think> then gem look take open</think><act> look take open</act>",
    format_result("Keys:. Treasury: gem and glass."),
    " Held No here. Dust Locked Pit Treasury Keys",
    format_result(UNKNOWN),
    format_result("Dust."),
    format_result("Held."),
    format_result("No here."),
    format_result("Locked."),
    format_result("Pit."),
    format_result("Treasury: gem and glass."),
    "<answer> \\boxed{ }</answer>",
    "\\boxed{}",
    CALL_LIMIT_NOTICE,
    "Tool(act) was not called: nothing is between its tags. has opening tag missing failed",
)
# Poor strategies and their shares among the demonstrations that are not right.
# hasty: takes the first key that it sees. glass: answers with the glass. blind: answers with a colour at once.
# wrong_order: goes for the last door first.
_POOR = {"hasty": 0.35, "glass": 0.35, "blind": 0.1, "wrong_order": 0.2}
_LOOKS = 2  # looks after which the wrong order takes what it sees


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Questions about rooms."""

    train: list[Question]
    eval: list[Question]


def make_levels(config: RoomsConfig) -> Levels:
    """Make the questions that `config` describes; the same configuration gives the same ones."""
    rng = np.random.default_rng(config.seed)
    held_out = [_level(config, f"test-{i}", 1 + i % config.max_doors, rng) for i in range(config.eval_questions)]
    train = [_level(config, f"train-{i}", 1 + i % config.max_doors, rng) for i in range(config.train_questions)]
    return Levels(train=train, eval=held_out)


def _level(config: RoomsConfig, name: str, doors: int, rng: np.random.Generator) -> Question:
    """Draw the doors on the way, the keys of each room, and the treasures."""
    colours = _COLOURS[: config.colours]
    way = [str(colour) for colour in rng.choice(colours, size=doors)]
    rooms = []
    for colour in way:
        others = [other for other in colours if other != colour]
        keys = [colour, *(str(other) for other in rng.choice(others, size=config.keys - 1, replace=False))]
        rooms.append([keys[i] for i in rng.permutation(len(keys))])
    gem, glass = (f"w{i}" for i in rng.choice(config.treasures, size=2, replace=False))
    record = {"doors": way, "rooms": rooms, "gem": gem, "glass": glass}
    record |= {"shown": config.shown, "door_reward": config.door_reward}
    text = f"Open {' then '.join(way)}."
    return Question(id=name, text=text, answers=(gem,), source="rooms", meta={"doors": doors}, record=record)


def make_rooms_tokenizer(config: RoomsConfig, action: str) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of the rooms, in which the tags around an `action` are one token each."""
    tags = (*TAGS, open_tag(action), close_tag(action))
    names = [*_COLOURS[: config.colours], *(f"w{i}" for i in range(config.treasures))]
    words = [piece for text in _FRAME for piece in split_words(text, tags)]
    return word_level_tokenizer([*words, *(text for name in names for text in (f" {name}", name))], tags)


def play_levels(
    levels: Levels,
    config: RoomsConfig,
    tokenizer: PreTrainedTokenizerBase,
    encode_prompt: Callable[[Question, str], list[int]],
    action: str,
) -> list[TurnTree]:
    """Make `config.demonstrations` chains over training questions, a share `config.good_fraction` of them right.

    Args:
        encode_prompt: function from a question and the opening of its session to the tokens of the prompt.
        action: name of the tag around an action.
    """
    rng = np.random.default_rng([config.seed, 1])
    play = _Play(tokenizer, encode_prompt, action)
    demonstrations = []
    for i in range(config.demonstrations):
        question = levels.train[i % len(levels.train)]
        poor = str(rng.choice(list(_POOR), p=list(_POOR.values())))
        strategy = "good" if rng.random() < config.good_fraction else poor
        demonstrations.append(play.chain(question, strategy, seed=int(rng.integers(2**31))))
    return demonstrations


class _Play:
    """A strategy played in real sessions, turn by turn."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encode_prompt: Callable[[Question, str], list[int]], action: str
    ) -> None:
        self._tokenizer, self._encode_prompt, self._action = tokenizer, encode_prompt, action

    def chain(self, question: Question, strategy: str, seed: int) -> TurnTree:
        """Play one demonstration."""
        session = open_session(question.record, seed)
        assert session.opening is not None
        meta = {"question": question.text, "answers": list(question.answers), "strategy": strategy}
        tree = TurnTree(self._encode_prompt(question, session.opening), question_id=question.id, meta=meta)
        left, seen, turn, looks = list(question.record["doors"]), session.opening, 0, 0
        if strategy == "wrong_order":
            left.reverse()
        held: str | None = None
        while left and strategy != "blind":
            act = f"open {held}" if held else _choose(left[0], _keys(seen), strategy, looks)
            looks = looks + 1 if act == "look" else 0
            result = session.step(act)
            turn = tree.add_turn(
                turn,
                self._encode(
                    f"<think> {' then '.join(left)}</think>{open_tag(self._action)} {act}{close_tag(self._action)}"
                ),
                observation_ids=self._encode(format_result(result.text)),
                tool=self._action,
            )
            if result.done:
                return tree
            if act.startswith("take"):
                held = act.removeprefix("take ")
            elif held:
                held, left = None, left[1:]
            seen = result.text
        known, answer = _answer(question, seen, strategy)
        ids = self._encode(f"<think> {known}</think><answer> \\boxed{{ {answer} }}</answer>")
        tree.add_turn(turn, [*ids, self._tokenizer.eos_token_id], finish_reason="eos")
        return tree

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _keys(seen: str) -> Sequence[str]:
    return seen.removeprefix("Keys: ").removesuffix(".").split()


def _choose(wanted: str, keys: Sequence[str], strategy: str, looks: int) -> str:
    """Return what a strategy does in a room where it has no key."""
    given_up = strategy == "wrong_order" and looks >= _LOOKS and wanted not in keys
    if strategy == "hasty" or given_up:
        return f"take {keys[0]}"
    return f"take {wanted}" if wanted in keys else "look"


def _answer(question: Question, seen: str, strategy: str) -> tuple[str, str]:
    """Return what a strategy knows at the end, and its answer."""
    if strategy == "blind":
        colour = question.record["doors"][0]
        return colour, colour
    kind = "glass" if strategy == "glass" else "gem"
    found = re.search(rf"{kind} (\w+)", seen)
    assert found is not None, seen
    return f"{kind} {found[1]}", found[1]
