"""Counters of sessions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SessionCounts:
    """Numbers since the start, the one definition of each of them.

    `opened`, `closed`: sessions, however they came to be. `forks_native`, `forks_copy`, `forks_replay`: sessions in the
    state of an earlier turn, by the way in which they got there; a chain from the root needs none. `failed_forks`:
    native forks and copies that failed, so that a replay took their place. `actions`: calls and steps that branches
    made. `replayed`: actions that were repeated on the way to a state. `mismatches`: repeated actions that were
    answered otherwise than at first, and openings that differ. `lost`: branches and openings that failed because a
    session hung, was gone, could not be opened, or could not be brought into its state. `evicted`: parked sessions
    closed to make room. `failed_scores`: trajectories without a score because their session failed. `fork_seconds`:
    time of forks and replays. `action_seconds`: time of actions.
    """

    opened: int = 0
    closed: int = 0
    forks_native: int = 0
    forks_copy: int = 0
    forks_replay: int = 0
    failed_forks: int = 0
    actions: int = 0
    replayed: int = 0
    mismatches: int = 0
    lost: int = 0
    evicted: int = 0
    failed_scores: int = 0
    fork_seconds: float = 0.0
    action_seconds: float = 0.0
