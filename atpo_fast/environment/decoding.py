"""The one way in which tokens of a trajectory become text: nothing is skipped but what ends and what pads.

A tag may be a special token of the tokenizer, so special tokens are text like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atpo_fast.tree.turn_tree import Turn

if TYPE_CHECKING:  # takes seconds to import, which the tools need not wait for
    from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids as it stands, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def decode_actions(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[str]:
    """Return what the policy wrote in each turn, without the tokens that end and pad.

    A turn that the model has ended has ended with its last token, whichever of the model's end tokens that is.
    """
    left_out = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    written = []
    for turn in turns:
        ids = turn.action_ids.tolist()
        ids = ids[:-1] if turn.finish_reason == "eos" else ids
        written.append([token for token in ids if token not in left_out])
    return [decode(tokenizer, ids) for ids in written]


def decode_observations(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[str]:
    """Return what the environment answered after each turn."""
    return [decode(tokenizer, turn.observation_ids.tolist()) for turn in turns]
