"""The lists of named choices agree with what implements them."""

from __future__ import annotations

from typing import get_args

from atpo_fast.common.choices import Preset
from atpo_fast.common.presets import PRESETS


def test_every_preset_can_be_configured() -> None:
    # Fails if a preset is added to one of the two lists only.
    assert get_args(Preset) == tuple(PRESETS)
