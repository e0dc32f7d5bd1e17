"""What every section of the configuration has in common: no unknown keys, and a docstring for each field."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Settings of a section's dataclass.

A section checks what its own fields have to fulfil: each field by its type and bounds, several together in
`__post_init__`. What has to hold between sections is in `checks.py`.
"""


def as_dict(section: Any) -> dict[str, Any]:
    """Return a section, or the whole configuration, as plain data.

    Of the sections that are one of several kinds, such as the engine, only the chosen kind's options are in it.
    """
    return asdict(section)
