"""What a model does with its logits before they become probabilities, by its configuration."""

from __future__ import annotations

from typing import Any

_DIVIDED = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")


def logits_divisor(config: Any) -> float:
    """Return what the logits of a Hugging Face model are divided by: `logits_scaling` of the Granite models, else 1.

    Raises ValueError for another model type with a `logits_scaling`, whose meaning is then unknown.
    """
    scaling = getattr(config, "logits_scaling", None)
    if scaling in (None, 1) or config.model_type in _DIVIDED:
        return float(scaling or 1)
    raise ValueError(f"{config.model_type}: logits_scaling={scaling} is supported in {', '.join(_DIVIDED)} only")
