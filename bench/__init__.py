"""Measurements: operators, layers and updates beside their peers, whole systems, and the compiled kernels.

One folder a subject; each has its cases, what they measure, what they must show and a `bench_<subject>.py` for pytest:

    core/        a case, timing and memory, records, tables
    head/        log-prob, entropy and turn loss from hidden states, and the turn loss from log-probs
    attention/   attention over one row that holds a tree
    update/      a decoder layer and the whole update, trees against flat rows
    packing/     random forests, their rows, and what the host does before a forward
    systems/     the quickstart by seed, schedules of rollouts, retrieval
    kernels/     what every Triton kernel takes of a GPU, compiled without one
    results/     the records (cpu/, gpu/), and RESULTS.md and plots drawn from them

`python -m bench --help` says how they are run.
"""

import os

from atpo_fast.common.threads import bound_spinning

bound_spinning(os.environ)  # before PyTorch is imported
