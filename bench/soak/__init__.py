"""Runs of days in small: a training under faults (`python -m bench soak`), and kills at random moments (`kills`)."""
