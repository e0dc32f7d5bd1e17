"""The embedded worlds, generated from a seed: facts with questions over them, and rooms with keys and locked doors."""

from atpo_fast.world.demonstrations import make_demonstrations
from atpo_fast.world.facts import World, make_world
from atpo_fast.world.levels import Levels, make_levels, make_rooms_tokenizer, play_levels
from atpo_fast.world.tokenizer import make_tokenizer

__all__ = [
    "Levels",
    "World",
    "make_demonstrations",
    "make_levels",
    "make_rooms_tokenizer",
    "make_tokenizer",
    "make_world",
    "play_levels",
]
