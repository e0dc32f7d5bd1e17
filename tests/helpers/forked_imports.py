"""What a process of a run imports, imported once: the processes of tests are forked from one that has it.

Nothing here may start a thread, or what is forked hangs; PyTorch starts its own at the first parallel operation.
"""

from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # as in every run of a test; PyTorch and DeepSpeed read both when they are imported
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import atpo_fast.commands.cli
import atpo_fast.commands.launcher
import atpo_fast.engines.paged.engine
import atpo_fast.engines.server.engine
import atpo_fast.report
import atpo_fast.train.__main__
import atpo_fast.train.evaluate
import atpo_fast.train.forest_file
import atpo_fast.train.loop
import atpo_fast.train.run  # noqa: F401

assert deepspeed.ops.__compatible_ops__  # looked for when it is first read

gc.freeze()  # a collection in a forked process need not write to, and so copy, what is shared
