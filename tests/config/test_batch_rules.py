"""What the sections reward, credit and train refuse together."""

from __future__ import annotations

import re

import pytest

from atpo_fast.common.errors import ConfigError
from atpo_fast.config import load_config
from atpo_fast.config.arithmetic import batch_arithmetic

KEEP = ["train.dynamic_sampling.enabled=true", "train.dynamic_sampling.surplus=keep", "train.old_logprobs=rollout"]


# Fails if a bound that never holds is accepted: refills without end, questions kept for several steps, a penalty on
# every trajectory, or rewards that no credit reads.
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.dynamic_sampling.max_refills=-1"], "train.dynamic_sampling.max_refills"),
        ([*KEEP, "train.dynamic_sampling.questions_per_rollout=65"], "at most train.questions_per_step=64"),
        (["reward.overlong.share=1"], "reward.overlong.share"),
        (["credit.clip_spread=1"], "credit.clip_spread"),
    ],
)
def test_rules_that_cannot_hold(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(None, overrides)


def test_rules_that_hold() -> None:
    """Fails if a legal combination is refused."""
    config = load_config(None, [*KEEP, "reward.overlong.share=0.2", "reward.turn_penalty=0.1", "credit.method=gtpo"])
    assert config.train.dynamic_sampling.surplus == "keep" and config.reward.overlong.factor == 1.0
    line = "64 questions at a time, in at most 10 roll-outs, until 64 vary in reward; then stop"
    assert line in batch_arithmetic(config) and "dynamic" not in batch_arithmetic(load_config(None))
