"""The methods by name: what each sets, where it is published, and where this code departs from its authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SECTIONS = ("objective", "credit")
_SIZES = ("initial_chains", "expansion_rounds", "expansions_per_round", "samples_per_tree", "trees_per_question")
_SHAPE = (
    *_SIZES,
    "strategy",
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

    @property
    def essence(self) -> dict[str, Any]:
        """Return the settings without sizes, which a run may choose without leaving the method."""
        return {name: value for name, value in self.settings.items() if name.rpartition(".")[2] not in _SIZES}


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
_MINIBATCHES = "mini-batches hold whole questions, theirs trajectories shuffled by length"
_RECOMPUTE = {
    "train.old_logprobs": "recompute"
}  # a token that ends a chain over the limit has no log-prob of the engine

_METHODS = (
    Method(
        name="at2po",
        title="AT²PO",
        source=f"arXiv:2601.04767; {_ATPO_CODE}",
        rollout="entropy",
        credit="at2po",
        objective="at2po",
        departs=f"{_MINIBATCHES}; after a failed tool a chain goes on with a message, theirs ends",
    ),
    _chains(
        "atpo",
        "AT²PO's loss on chains",
        f"arXiv:2601.04767, its ablation; {_ATPO_CODE}",
        objective="atpo",
        departs=_MINIBATCHES,
    ),
    _chains(
        "grpo",
        "GRPO",
        f"arXiv:2402.03300; script GRPO_qwen3_4B.sh of {_ATPO_CODE}",
        objective="grpo",
        departs=_MINIBATCHES,
    ),
    _chains(
        "dapo",
        "DAPO",
        "arXiv:2503.14476; verl-recipe, folder dapo, at 48ea0a7",
        objective="dapo",
        more={
            "train.dynamic_sampling.enabled": True,
            "train.dynamic_sampling.metric": "em",
            "reward.overlong.share": 0.2,
        },
        departs=_MINIBATCHES,
    ),
    _chains(
        "gspo",
        "GSPO",
        f"arXiv:2507.18071; {_ATPO_CODE}",
        objective="gspo",
        departs=f"{_MINIBATCHES}; the paper's clip constants, 3e-4 and 4e-4, where the code that was read sets none",
    ),
    Method(
        name="arpo",
        title="ARPO",
        source="arXiv:2507.19849; github.com/dongguanting/ARPO at e257337",
        rollout="arpo",
        credit="grpo",
        objective="arpo",
        more={"rollout.initial_chains": 8, "rollout.samples_per_tree": 16, **_RECOMPUTE},
        departs=f"{_MINIBATCHES}; first entropies are forgotten after each batch, theirs never are (a defect)",
    ),
    Method(
        name="aepo",
        title="AEPO",
        source=f"arXiv:2510.14545; folder AEPO of {_ATPO_CODE}",
        rollout="aepo",
        credit="grpo",
        objective="aepo",
        more={"rollout.initial_chains": 8, "rollout.samples_per_tree": 16, **_RECOMPUTE},
        departs=f"{_MINIBATCHES}; the entropy-aware advantage is on, in their code it is silently off (a defect: "
        "objective.entropy_advantage=0); pre-monitoring is on as in their defaults, their script has it off "
        "(rollout.pre_monitoring=false)",
    ),
    Method(
        name="tree_grpo",
        title="Tree-GRPO",
        source="arXiv:2509.21240; github.com/AMAP-ML/Tree-GRPO at 90b1709",
        rollout="tree_grpo",
        credit="tree_grpo",
        objective="tree_grpo",
        more={
            "rollout.trees_per_question": 2,
            "rollout.initial_chains": 1,
            "rollout.expansion_rounds": 1,
            "rollout.expansions_per_round": 2,
            "rollout.samples_per_tree": 3,
        },
        departs=f"{_MINIBATCHES}; a turn without a call is an answer, theirs gets a hint and goes on",
    ),
    _chains(
        "gppo",
        "GPPO",
        f"arXiv:2508.07629; {_ATPO_CODE}",
        objective="gppo",
        departs="clip ranges are DAPO's; the code that was read sets none",
    ),
    _chains("sapo", "SAPO", f"arXiv:2511.20347; {_ATPO_CODE}, verl and TRL alike", objective="sapo"),
    _chains("cispo", "CISPO", "arXiv:2506.13585; verl at b178a3c", objective="cispo"),
    _chains("rloo", "RLOO", "arXiv:2402.14740", credit="rloo", objective="ppo"),
    _chains(
        "reinforce++",
        "REINFORCE++ with baseline",
        "arXiv:2501.03262; verl at b178a3c",
        credit="reinforce++",
        objective="ppo",
    ),
    _chains(
        "passk",
        "pass@k training",
        "arXiv:2508.10751",
        credit="passk",
        objective="ppo",
        departs="verl's grpo_passk (arXiv:2503.19595) is another method",
    ),
    _chains(
        "treepo",
        "TreePO",
        "arXiv:2508.17445; github.com/multimodal-art-projection/TreePO at f055523",
        credit="treepo",
        objective="dapo",
        more={"train.dynamic_sampling.enabled": True},
        departs="credit only: its trees are of segments of 512 tokens; here it takes those of any strategy, or chains",
    ),
    _chains(
        "gtpo",
        "GTPO",
        "arXiv:2511.14846, its abstract and ports of others",
        credit="gtpo",
        objective="grpo",
        more={"reward.turn_penalty": 0.1},
        departs="no reward by similarity of code; the normalisation is a choice of this project",
    ),
    _chains(
        "igpo",
        "IGPO",
        "arXiv:2510.14967; github.com/GuoqingWang1/IGPO at bff163b",
        credit="igpo",
        objective="igpo",
        more={"reward.metric": "f1", "reward.format_penalty": -2.0},
        departs="normalised by turn, their code subtracts the mean at the same token position",
    ),
    _chains(
        "a2tgpo",
        "A²TGPO",
        "arXiv:2605.06200, its abstract",
        credit="a2tgpo",
        objective="atpo",
        departs="loss by turn and the form of the scaled clip range are choices of this project",
    ),
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
