"""What has to be shown, on a GPU and on a CPU: a line of RESULTS.md each."""

from __future__ import annotations

import head_goals
import tree_goals
from verdicts import Goals

GPU_GOALS: Goals = head_goals.GPU | tree_goals.GPU
CPU_GOALS: Goals = head_goals.CPU | tree_goals.CPU
