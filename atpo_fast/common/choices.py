"""The named choices of model, roll-out, credit and objective: the one list of their values, for configuration and code.

Those of the loss are in `atpo_kernels.choices`.
"""

from __future__ import annotations

from typing import Literal

GradientCheckpointing = Literal["none", "layer", "mlp"]
"""What a backward computes again instead of keeping it: nothing, whole decoder layers, or the MLP of each."""
Liger = Literal["auto", "off"]
"""Whether Liger's kernels run the layers that they fit, or never."""
Strategy = Literal["entropy", "random", "chain", "arpo", "aepo", "tree_grpo"]
"""How the tree of a question grows; `atpo_fast.rollout.strategies` has one module for each."""
CreditMethod = Literal["at2po", "grpo", "tree_grpo", "rloo", "reinforce++", "passk", "treepo", "gtpo", "igpo", "a2tgpo"]
"""How rewards become advantages: `at2po`, `gtpo`, `igpo` and `a2tgpo` per turn, the others per trajectory."""
Preset = Literal["at2po", "atpo", "grpo", "dapo", "gspo", "aepo", "arpo", "tree_grpo", "gppo", "sapo", "cispo"]
"""Published objective; what each of them sets is in `atpo_fast.objective.objective.PRESETS`."""
TurnValue = Literal["child_softmax", "child_mean", "leaf_mean"]
"""How the value of an inner turn follows from those of its children or leaves."""
TurnAdvantage = Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"]
"""How the advantage of a turn follows from the values."""
AncestorWeight = Literal["leaves", "equal"]
"""Weight of the comparison with the leaves below an ancestor (treepo)."""
SharedTurns = Literal["each", "once"]
"""Whether a turn that lies on several trajectories counts in each of them, or once."""
