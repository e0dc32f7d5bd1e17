"""verl: policy loss and advantage estimators. Tested with verl 0.9.1.

The entry point `verl.plugins` registers them when verl is imported. In verl's configuration:

    actor_rollout_ref.actor.policy_loss.loss_mode=at2po
    actor_rollout_ref.actor.clip_ratio_low=0.003 actor_rollout_ref.actor.clip_ratio_high=0.004
    algorithm.adv_estimator=at2po_turn  # or at2po_tree, grpo, ...
"""

from __future__ import annotations

LOSS = "at2po"
TURN = "at2po_turn"
TREE = "at2po_tree"


def register() -> None:
    """Register the loss and the estimators with verl."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    from atpo_kernels.hosts.verl.estimators import tree_estimator, turn_estimator
    from atpo_kernels.hosts.verl.loss import policy_loss

    register_policy_loss(LOSS)(policy_loss)
    register_adv_est(TURN)(turn_estimator)
    register_adv_est(TREE)(tree_estimator)


def check() -> None:
    """Raise ValueError unless a process that imports verl finds the names."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    get_policy_loss_fn(LOSS)
    for name in (TURN, TREE):
        get_adv_estimator_fn(name)
