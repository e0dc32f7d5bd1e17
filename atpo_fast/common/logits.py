"""What a model does with its logits before they become probabilities, by its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_DIVIDED = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa", "granitemoe_swa")
_MULTIPLIED = ("cohere", "cohere2")
_CAPPED = ("gemma2", "gemma3_text", "gemma4_text", "vaultgemma")


@dataclass(frozen=True, slots=True)
class LogitRule:
    """How a model makes logits of the head's products x: softcap * tanh(x / divisor / softcap)."""

    divisor: float = 1.0
    softcap: float | None = None
    """None: x / divisor."""

    def apply(self, products: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """Make logits of products."""
        scaled = products if self.divisor == 1 else products / self.divisor
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


def logit_rule(config: Any) -> LogitRule:
    """Read how a Hugging Face model changes the head's products: Granite and Cohere scale them, Gemma caps them.

    Raises ValueError for another model type with such a setting, whose meaning is then unknown.
    """
    divisor = _setting(config, "logits_scaling", _DIVIDED) or 1.0
    factor = _setting(config, "logit_scale", _MULTIPLIED) or 1.0
    return LogitRule(divisor / factor, _setting(config, "final_logit_softcapping", _CAPPED))


def _setting(config: Any, name: str, types: tuple[str, ...]) -> float | None:
    value = getattr(config, name, None)
    if value in (None, 1) or config.model_type in types:
        return value
    raise ValueError(f"{config.model_type}: {name}={value} is supported in {', '.join(types)} only")
