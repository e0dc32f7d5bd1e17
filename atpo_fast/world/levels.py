"""Questions about the rooms (`rooms.py`), a tokenizer for them, and scripted demonstrations for the cold start.

The player of the demonstrations knows the rules and moves by them, but is often in haste: it takes the first key in
sight, or names the first treasure, whatever it is asked for. So the cold start teaches the format, the moves and
copying, and leaves the choices to reinforcement learning. The right choice is the rarer one, so greedy decoding finds
the gem as rarely as sampling does, and neither depends on how far imitation has come. A thought is what is left to do
and what was seen last:

    <think> red then blue</think><act> look</act>
    <think> red then blue</think><act> take red</act>
    <think> red then blue</think><act> open red</act>
    ...
    <think> gem green</think><answer> \\boxed{ green }</answer>
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
_WORDS = re.compile(r"\w+")
_TREASURES = re.compile(r"(gem|glass) (\w+)")


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
    gem, glass = (str(colour) for colour in rng.choice(colours, size=2, replace=False))
    record = {"doors": way, "rooms": rooms, "gem": gem, "glass": glass}
    record |= {"shown": config.shown, "door_reward": config.door_reward}
    text = f"Open {' then '.join(way)}."
    return Question(id=name, text=text, answers=(gem,), source="rooms", meta={"doors": doors}, record=record)


def make_rooms_tokenizer(config: RoomsConfig, action: str) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of the rooms, in which the tags around an `action` are one token each."""
    tags = (*TAGS, open_tag(action), close_tag(action))
    words = [piece for text in _FRAME for piece in split_words(text, tags)]
    colours = _COLOURS[: config.colours]
    return word_level_tokenizer([*words, *(text for colour in colours for text in (f" {colour}", colour))], tags)


def play_levels(
    levels: Levels,
    config: RoomsConfig,
    tokenizer: PreTrainedTokenizerBase,
    encode_prompt: Callable[[Question, str], list[int]],
    action: str,
) -> list[TurnTree]:
    """Make `config.demonstrations` chains over training questions, by a player of `config.haste`.

    Args:
        encode_prompt: function from a question and the opening of its session to the tokens of the prompt.
        action: name of the tag around an action.
    """
    rng = np.random.default_rng([config.seed, 1])
    player = _Player(tokenizer, encode_prompt, action, config.haste, rng)
    return [player.play(levels.train[i % len(levels.train)]) for i in range(config.demonstrations)]


class _Player:
    """Plays in real sessions, turn by turn, at each decision in haste or with care."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encode_prompt: Callable[[Question, str], list[int]],
        action: str,
        haste: float,
        rng: np.random.Generator,
    ) -> None:
        self._tokenizer, self._encode_prompt, self._action = tokenizer, encode_prompt, action
        self._haste, self._rng = haste, rng

    def play(self, question: Question) -> TurnTree:
        """Play one demonstration, to an answer or into a pit."""
        session = open_session(question.record, seed=int(self._rng.integers(2**31)))
        assert session.opening is not None
        meta = {"question": question.text, "answers": list(question.answers)}
        tree = TurnTree(self._encode_prompt(question, session.opening), question_id=question.id, meta=meta)
        left, seen, turn = list(question.record["doors"]), session.opening, 0
        while left:
            act = self._act(left[0], seen)
            result = session.step(act)
            thought = f"<think> {' then '.join(left)}</think>"
            turn = tree.add_turn(
                turn,
                self._encode(f"{thought}{open_tag(self._action)} {act}{close_tag(self._action)}"),
                observation_ids=self._encode(format_result(result.text)),
                tool=self._action,
            )
            if result.done:
                return tree
            seen = result.text
            left = left[act.startswith("open") :]
        kind, colour = self._treasure(seen)
        ids = self._encode(f"<think> {kind} {colour}</think><answer> \\boxed{{ {colour} }}</answer>")
        tree.add_turn(turn, [*ids, self._tokenizer.eos_token_id], finish_reason="eos")
        return tree

    def _act(self, wanted: str, seen: str) -> str:
        """Open the door of the key in hand; else take a key, or look again."""
        if seen.startswith("Held"):
            return f"open {_WORDS.findall(seen)[1]}"
        keys = _WORDS.findall(seen)[1:]
        if self._in_haste():
            return f"take {keys[0]}"
        return f"take {wanted}" if wanted in keys else "look"

    def _treasure(self, seen: str) -> tuple[str, str]:
        """Return what the player takes for the gem, and its colour."""
        treasures: list[tuple[str, str]] = _TREASURES.findall(seen)
        return treasures[0] if self._in_haste() else next(one for one in treasures if one[0] == "gem")

    def _in_haste(self) -> bool:
        return bool(self._rng.random() < self._haste)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
