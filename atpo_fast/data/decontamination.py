"""Keep questions out of training that are asked in an evaluation, word for word or nearly so."""

from __future__ import annotations

import re


def normalise_question(text: str) -> str:
    """Return the key of the overlap check: lower case, one space for each run of what is no letter or digit."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()
