"""What a trajectory earns: rewards by name and functions of the user's own, recognised, called and added up."""

from atpo_fast.environment.rewards.earnings import Earned, earn
from atpo_fast.environment.rewards.terms import PUBLISHED, Reward, RewardTerm, check_questions, load_rewards
from atpo_fast.environment.rewards.trajectory import Trajectory

__all__ = [
    "PUBLISHED",
    "Earned",
    "Reward",
    "RewardTerm",
    "Trajectory",
    "check_questions",
    "earn",
    "load_rewards",
]
