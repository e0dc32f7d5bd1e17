"""The section `objective`: what it reaches of the loss, and which combinations it refuses."""

from __future__ import annotations

import pytest

from atpo_fast.common.errors import ConfigError
from atpo_fast.config import load_config
from atpo_fast.objective import Objective
from atpo_fast.train.from_config import make_objective


def test_overrides_reach_the_loss() -> None:
    # Fails if an option is accepted and then lost on the way to the objective.
    given = ["objective.preset=sapo", "objective.sapo_tau_pos=0.5", "objective.sapo_tau_neg=2", "objective.dual_cap=4"]
    objective = make_objective(load_config(None, [*given, "objective.entropy_advantage=0.3"]))
    loss = objective.loss_config
    assert (loss.clip, loss.sapo_tau_pos, loss.sapo_tau_neg, loss.dual_cap) == ("sapo", 0.5, 2.0, 4.0)
    assert objective.entropy_advantage == 0.3


def test_a_cap_of_zero_is_none() -> None:
    # Fails if the cap or the advantage of a preset cannot be switched off.
    overrides = ["objective.preset=aepo", "objective.dual_cap=0", "objective.entropy_advantage=0"]
    objective = make_objective(load_config(None, overrides))
    assert objective.loss_config.dual_cap is None and objective.entropy_advantage == 0
    assert make_objective(load_config(None, overrides[:1])).loss_config == Objective.preset("aepo").loss_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective.clip=dual"],
            r"override objective.clip=dual: .*dual is now hard, together with objective.dual_cap=3",
        ),
        (["objective.dual_cap=0.5"], r"objective.dual_cap=0.5: must be greater than 1, or 0 for no cap"),
        (["objective.dual_cap=-1"], r"objective.dual_cap=-1: input should be greater than or equal to 0"),
        (["objective.sapo_tau_pos=2"], r"objective.sapo_tau_pos is read by objective.clip=sapo only"),
        (["objective.preset=sapo", "objective.clip=hard", "objective.sapo_tau_neg=2"], r"sapo_tau_neg is read by"),
        (["objective.level=sequence", "objective.entropy_advantage=0.2"], r"objective.level=token or turn"),
        (["method=gspo", "objective.entropy_advantage=0.2"], r"objective.level=token or turn"),
        (["method=a2tgpo", "objective.preset=gspo"], r"credit.clip_spread=0"),
        (["method=a2tgpo", "objective.clip=sapo"], r"credit.clip_spread=0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_means_nothing_is_refused(overrides: list[str], message: str) -> None:
    # Fails if a value that no loss reads is taken, or the old name of the dual clip gets no hint of the new one.
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)
