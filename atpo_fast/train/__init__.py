"""The training loops: cold start, RL, evaluation."""
