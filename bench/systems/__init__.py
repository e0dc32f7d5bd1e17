"""Bench of whole systems: the quickstart, schedules of rollouts, retrieval."""
