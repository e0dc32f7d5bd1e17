"""Training of two ranks with servers on this machine; on others: test_several_machines.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import records, run
from tests.helpers.served_model import ServedModel


@pytest.mark.slow(reason="two ranks and two servers")
@pytest.mark.distributed
def test_two_ranks_train_with_servers(tmp_path: Path) -> None:
    # Fails if the ranks do not agree on who writes the weights, a server keeps old ones, or its log-probs are another
    # distribution's: the trainer's own, under the same weights, are the same.
    served, short = ServedModel(tmp_path), ["rollout.max_response_tokens=64", "train.save_every=0"]
    with served.start() as one, served.start() as two:
        overrides = served.overrides("run", one, two)
        run(served.config, *overrides, "ranks=2", "train.steps=2", "rollout.initial_chains=4", *short)
        assert one.bodies and two.bodies
    steps = records(tmp_path / "run", "train")
    assert sorted(steps) == [1, 2]
    for step in steps.values():
        assert step["rollout/mismatch_kl"] < 1e-6
