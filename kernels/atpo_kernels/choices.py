"""The named choices of a policy loss: the one list of their values, for configurations, objectives and kernels.

Importing this module imports neither PyTorch nor Triton, so that a configuration can be read and checked without them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

RatioLevel = Literal["token", "turn", "sequence"]
"""Over what the log-ratio is averaged before it is exponentiated."""
ClipFamily = Literal["hard", "soft", "soft_high", "sapo", "cispo"]
"""How the ratio is bounded; see `LossConfig.clip`."""
KLEstimator = Literal["none", "k1", "k2", "k3", "low_var"]
"""Estimator of the KL divergence to the reference policy."""
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "turn-mean"]
"""How the losses of a batch's tokens are averaged; the formulas are those of `turn_policy_loss`."""
Reduction = Literal[Aggregation, "sum", "none"]
"""What an operator does with the losses of its tokens: aggregate them, add them up, or return them one by one."""
LOSS_TYPES: dict[str, Reduction] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
"""How the losses of each `loss_type` of TRL and Liger are averaged."""
MEAN_OVER_STEP = ("dapo", "cispo")
"""Loss types whose mean runs over the tokens of all ranks in a whole optimizer step."""
Denominator = Literal["global", "local"]
"""Over what the averages of an aggregation run: the mini-batch of all ranks, or each packed row by itself."""
NO_DUAL_CLIP = "the dual clip is no clip family but a cap beside any of them: give clip='hard' and dual_cap=3"
"""What to write in the place of clip="dual"."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError, naming the allowed values, unless `value` is one of the choices (`RatioLevel`, ...)."""
    if value not in get_args(choices):
        if choices is ClipFamily and value == "dual":
            raise ValueError(f"{name}='dual': {NO_DUAL_CLIP}")
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(get_args(choices))}")
