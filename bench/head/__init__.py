"""Bench of the head's operators: log-prob, entropy and turn loss."""
