"""Text that is data, written so that a tokenizer reads nothing in it but plain text.

Results, passages and questions come from outside. Where such a text holds a tag of the protocol or a token that was
added to the tokenizer (`<|im_end|>`, `<tool_call>`), its encoding would end the turn or forge a call. `Escaper` writes
the first character of each of them as an HTML entity (`&lt;tool_call>`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from atpo_fast.environment.tags import Reserved, as_entity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Escaper:
    """A function from text to text in which a tokenizer finds neither a tag nor one of its added tokens.

    Escaped are the tags of think, answer, result, search, python and `tools`, and the tokens of `reserved_tokens`; also
    in what the tokenizer's normaliser makes of the text, where full-width brackets may become plain ones. Halves of a
    surrogate pair, which no tokenizer takes, are joined or become U+FFFD. Any other text comes back as it is.
    `unescape_tags` reverses what was escaped without the normaliser's help.

    Args:
        tokenizer: the tokenizer that will encode the text.
        tools: names of tools.
        allowed: tags and tokens that stay as they are, as in a prompt that explains the tags.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[str] = (), allowed: Collection[str] = ()
    ) -> None:
        tokens = reserved_tokens(tokenizer)
        self._reserved = Reserved(tools, tokens, allowed)
        self._normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        if self._normalizer is not None:  # it is applied to added tokens as well
            self._normalised = Reserved(tools, [*tokens, *map(self._normalizer.normalize_str, tokens)], allowed)

    def __call__(self, text: str) -> str:
        """Return `text` with its tags and added tokens escaped. Linear in the text."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = self._reserved.escape(text)
        if self._normalizer is None:
            return text
        escaped = self._rewrite(text, delete=False)
        while escaped != text:  # what an entity does not change is left out
            text, escaped = escaped, self._rewrite(escaped, delete=True)
        return text

    def _rewrite(self, text: str, delete: bool) -> str:
        """Write the characters with which something reserved begins after normalisation as entities, or not at all."""
        from tokenizers import NormalizedString, Regex

        normalised = NormalizedString(text)
        self._normalizer.normalize(normalised)
        if self._normalised.pattern.search(normalised.normalized) is None:
            return text
        pieces = [piece.original for piece in normalised.split(Regex(self._normalised.start), "merged_with_next")]
        kept = "" if self._normalised.pattern.match(normalised.normalized) else pieces.pop(0)
        return kept + "".join(f"{'' if delete else as_entity(piece[:1])}{piece[1:]}" for piece in pieces)


def reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a tokenizer's special and added tokens that no text from outside may hold.

    Left out are those that are ordinary text: white space, single characters, and added words that are not special.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]
    others = [token.content for token in added if not token.special]
    texts = [text for text in special if len(text) > 1] + [text for text in others if len(text) > 2 and _has_sign(text)]
    return tuple(dict.fromkeys(text for text in texts if not text.isspace()))


def _has_sign(text: str) -> bool:
    return any(not character.isalnum() and not character.isspace() for character in text)
