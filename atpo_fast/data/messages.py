"""Messages of a chat, and their text."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


def content_of(message: Message) -> str:
    """Return the text of a message, whose content may be a list of parts.

    Parts follow each other with nothing in between, as chat templates write them; what is no text (an image) is left
    out, and so is a text that is null, as Parquet fills it in.
    """
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
