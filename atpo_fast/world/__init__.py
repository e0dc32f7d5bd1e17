"""The embedded world: facts, questions over them, a tokenizer and scripted demonstrations, generated from a seed."""

from atpo_fast.world.demonstrations import make_demonstrations
from atpo_fast.world.facts import World, make_world
from atpo_fast.world.tokenizer import make_tokenizer

__all__ = ["World", "make_demonstrations", "make_tokenizer", "make_world"]
