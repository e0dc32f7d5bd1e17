"""The first quarter of an hour on a GPU as one command: what to run, for how long at most, and what comes of it.

    plan.py       the stages, their order and their limits
    runner.py     runs stages as processes of their own, and keeps what they found whatever happens
    archive.py    the records of all stages in one place, and one file to send
    probes.py     what is measured beside the cases of `python -m bench`
    summary.py    verdicts and numbers as a page that a person can paste

`python -m bench.gpu_day --help`; docs/gpu_day.md says how to run it and where to send what it writes.
"""
