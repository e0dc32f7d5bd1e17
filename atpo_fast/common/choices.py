"""The named choices of model, task, roll-out, credit and objective: the one list of their values.

Configuration and code read them here. Those of the loss are in `atpo_kernels.choices`.
"""

from __future__ import annotations

from typing import Literal

GradientCheckpointing = Literal["none", "layer", "mlp"]
"""What a backward computes again instead of keeping it: nothing, whole decoder layers, or the MLP of each."""
Liger = Literal["auto", "off"]
"""Whether Liger's kernels run the layers that they fit, or never."""
MethodName = Literal[
    "at2po",
    "atpo",
    "grpo",
    "dapo",
    "gspo",
    "arpo",
    "aepo",
    "tree_grpo",
    "gppo",
    "sapo",
    "cispo",
    "rloo",
    "reinforce++",
    "passk",
    "treepo",
    "gtpo",
    "igpo",
    "a2tgpo",
    "react",
]
"""Methods by name; what each of them sets is in `atpo_fast.config.methods.METHODS`."""
Strategy = Literal["entropy", "random", "chain", "arpo", "aepo", "tree_grpo"]
"""How the tree of a question grows; `atpo_fast.rollout.strategies` has one module for each."""
CreditMethod = Literal["at2po", "grpo", "tree_grpo", "rloo", "reinforce++", "passk", "treepo", "gtpo", "igpo", "a2tgpo"]
"""How rewards become advantages: `at2po`, `gtpo`, `igpo` and `a2tgpo` per turn, the others per trajectory."""
Preset = Literal[
    "at2po", "atpo", "ppo", "grpo", "dapo", "gspo", "aepo", "arpo", "tree_grpo", "igpo", "gppo", "sapo", "cispo"
]
"""Published objective; what each of them sets is in `atpo_fast.common.presets.PRESETS`."""
TurnValue = Literal["child_softmax", "child_mean", "leaf_mean"]
"""How the value of an inner turn follows from those of its children or leaves."""
TurnAdvantage = Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"]
"""How the advantage of a turn follows from the values."""
AncestorWeight = Literal["leaves", "equal"]
"""Weight of the comparison with the leaves below an ancestor (treepo)."""
PromptKind = Literal["published", "short", "messages"]
"""Prompt of a question: AT2PO's, the bare question, or the chat of the data's record."""
AnswerKind = Literal["boxed", "tag", "last_line", "hashes"]
"""How the answer is read from a trajectory; `atpo_fast.environment.extraction` has a function for each."""
RewardName = Literal["published", "arpo_f1", "search_r1_em", "em", "f1", "math", "format", "session"]
"""Rewards by name; `atpo_fast.environment.rewards.named` has a function for each."""
Fork = Literal["auto", "native", "copy", "replay", "none"]
"""How the state of an environment branches; `atpo_fast.environment.sessions` does each."""
Normalisation = Literal["published", "unicode"]
"""How answers are normalised before they are compared; `atpo_fast.data.matching` says what each does."""
SharedTurns = Literal["each", "once"]
"""Whether a turn that lies on several trajectories counts in each of them, or once."""
