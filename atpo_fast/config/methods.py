"""The methods by name: what each sets, where it is published, and where this code departs from its authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SECTIONS = ("objective", "credit")
_SHAPE = (
    "strategy",
    "initial_chains",
    "expansion_rounds",
    "expansions_per_round",
    "samples_per_tree",
    "trees_per_question",
    "branch_penalty",
    "branch_attempts",
    "branch_threshold",
    "entropy_weight",
    "streak_discount",
    "pre_monitoring",
)


def belongs_to_method(name: str) -> bool:
    """Tell whether a key says what method is run: those of objective and credit, and the shape of the rollout."""
    section, _, key = name.partition(".")
    return section in _SECTIONS or (section == "rollout" and key in _SHAPE)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: what the configuration's key `method` fills in."""

    name: str
    title: str
    source: str
    """Paper, and the code that was read."""
    rollout: str
    """Strategy of the rollout (`rollout.strategy`)."""
    credit: str
    """Credit method (`credit.method`)."""
    objective: str
    """Preset of the objective (`objective.preset`)."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further settings by dotted name."""
    departs: str = ""
    """What differs from the authors' code, and why."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return all settings by dotted name."""
        parts = {"rollout.strategy": self.rollout, "credit.method": self.credit, "objective.preset": self.objective}
        return {**parts, **self.more}


def _chains(
    name: str,
    title: str,
    source: str,
    *,
    credit: str = "grpo",
    objective: str,
    chains: int = 16,
    more: Mapping[str, Any] | None = None,
    departs: str = "",
) -> Method:
    """Make a method that samples chains, without a tree; 16 of them, as all published scripts do."""
    return Method(
        name=name,
        title=title,
        source=source,
        rollout="chain",
        credit=credit,
        objective=objective,
        more={"rollout.initial_chains": chains, **(more or {})},
        departs=departs,
    )


_ATPO_CODE = "github.com/zzfoutofspace/ATPO at 98e60f6"
_TREE_MINIBATCHES = "mini-batches hold whole questions; the authors' hold trajectories shuffled by length"

_METHODS = (
    Method(
        name="at2po",
        title="AT²PO",
        source=f"arXiv:2601.04767; {_ATPO_CODE}",
        rollout="entropy",
        credit="at2po",
        objective="at2po",
        departs=f"{_TREE_MINIBATCHES}; after a failed tool a chain goes on with a message, in theirs it ends",
    ),
    _chains(
        "atpo",
        "AT²PO's loss on chains",
        f"arXiv:2601.04767, ablation; {_ATPO_CODE}",
        objective="atpo",
        departs=_TREE_MINIBATCHES,
    ),
    _chains(
        "grpo",
        "GRPO",
        f"arXiv:2402.03300; script GRPO_qwen3_4B.sh of {_ATPO_CODE}",
        objective="grpo",
        departs=_TREE_MINIBATCHES,
    ),
    _chains("dapo", "DAPO", "arXiv:2503.14476; verl-recipe dapo at 48ea0a7", objective="dapo"),
    _chains(
        "gspo",
        "GSPO",
        f"arXiv:2507.18071; {_ATPO_CODE}",
        objective="gspo",
        departs="the paper's clip constants, 3e-4 and 4e-4; the code that was read sets none",
    ),
    _chains("arpo", "ARPO", "arXiv:2507.19849; github.com/dongguanting/ARPO at e257337", objective="arpo"),
    _chains("aepo", "AEPO", f"arXiv:2510.14545; folder AEPO of {_ATPO_CODE}", objective="aepo"),
    Method(
        name="tree_grpo",
        title="Tree-GRPO",
        source="arXiv:2509.21240; github.com/AMAP-ML/Tree-GRPO at 90b1709",
        rollout="random",
        credit="tree_grpo",
        objective="tree_grpo",
    ),
    _chains("gppo", "GPPO", f"arXiv:2508.07629; {_ATPO_CODE}", objective="gppo"),
    _chains("sapo", "SAPO", f"arXiv:2511.20347; {_ATPO_CODE}", objective="sapo"),
    _chains("cispo", "CISPO", "arXiv:2506.13585; verl at b178a3c", objective="cispo"),
    _chains("rloo", "RLOO", "arXiv:2402.14740", credit="rloo", objective="ppo"),
    _chains(
        "reinforce++", "REINFORCE++ with baseline", "arXiv:2501.03262; verl", credit="reinforce++", objective="ppo"
    ),
    _chains("passk", "pass@k training", "arXiv:2508.10751", credit="passk", objective="ppo"),
    _chains(
        "react",
        "ReAct",
        "arXiv:2210.03629",
        objective="ppo",
        chains=1,
        departs="trains nothing: for `atpo-fast eval` with model.path",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def setting(config: object, name: str) -> Any:
    """Return the value of a configuration's key by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config
