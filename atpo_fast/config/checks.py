"""Check what has to hold between sections; each check raises ValueError that names the keys and says what to change."""

from __future__ import annotations

from atpo_fast.config.data import DataConfig
from atpo_fast.config.engines import EngineConfig, ServerConfig, VLLMConfig
from atpo_fast.config.environment import EnvironmentConfig
from atpo_fast.config.method import CreditConfig, ObjectiveConfig
from atpo_fast.config.model import ModelConfig
from atpo_fast.config.rollout import RolloutConfig
from atpo_fast.config.train import TrainConfig


def check_row(data: DataConfig, rollout: RolloutConfig, train: TrainConfig) -> None:
    """Check that a row holds the longest trajectory where no prefix may be kept for it."""
    longest = data.max_prompt_tokens + rollout.max_response_tokens
    if train.row_tokens < longest and not train.prefix_memory_gb:
        raise ValueError(
            f"train.row_tokens={train.row_tokens} cannot hold the longest trajectory: data.max_prompt_tokens="
            f"{data.max_prompt_tokens} + rollout.max_response_tokens={rollout.max_response_tokens} = "
            f"{longest}; raise the first or lower the others, or set train.prefix_memory_gb"
        )


def check_turn_clips(credit: CreditConfig, objective: ObjectiveConfig) -> None:
    """Check that the loss has a clip range for a turn where the credit scales it."""
    level, clip = objective.resolved["level"], objective.resolved["clip"]
    if credit.method == "a2tgpo" and credit.clip_spread and (level == "sequence" or clip == "sapo"):
        what = "objective.level=sequence, whose ratio is one for all turns of a trajectory"
        if clip == "sapo":
            what = "objective.clip=sapo, which has no clip range"
        raise ValueError(
            f"credit.method=a2tgpo scales the clip range of each turn, which does not go with {what}: set another, or "
            "credit.clip_spread=0"
        )


def check_fork(environment: EnvironmentConfig, rollout: RolloutConfig) -> None:
    """Check that a search that branches has a way to fork sessions."""
    if environment.fork == "none" and rollout.strategy != "chain":
        raise ValueError(
            f"environment.fork=none, but rollout.strategy={rollout.strategy} continues earlier turns: set "
            "rollout.strategy=chain, or another fork"
        )


def check_rooms(data: DataConfig, environment: EnvironmentConfig) -> None:
    """Check that somebody opens the rooms."""
    if data.source == "rooms" and environment.factory is None:
        raise ValueError("data.source=rooms needs environment.factory=atpo_fast.world.rooms:open_session, its sessions")


def check_old_logprobs(train: TrainConfig, objective: ObjectiveConfig) -> None:
    """Check that importance weights have two different log-probs to compare, and that older samples are weighed."""
    from_rollout, cap = train.old_logprobs == "rollout", objective.importance_cap
    if from_rollout and cap is not None:
        raise ValueError(
            f"objective.importance_cap={cap:g} weighs recomputed old log-probs against the engine's: set "
            "train.old_logprobs=recompute, or leave it out"
        )
    if train.max_staleness and not from_rollout and cap is None:
        raise ValueError(
            "train.max_staleness=1 learns from older weights' samples: set objective.importance_cap, or "
            "train.old_logprobs=rollout"
        )
    sampling = train.dynamic_sampling
    if sampling.enabled and sampling.surplus == "keep" and not from_rollout and cap is None:
        raise ValueError(
            "train.dynamic_sampling.surplus=keep learns from older weights' samples: set objective.importance_cap, or "
            "train.old_logprobs=rollout, or surplus=discard"
        )


def check_unsampled_tokens(rollout: RolloutConfig, train: TrainConfig, objective: ObjectiveConfig) -> None:
    """Check that nothing needs the engine's log-prob of a token that was appended, not sampled."""
    if rollout.strategy not in ("arpo", "aepo"):
        return
    why = (
        f"rollout.strategy={rollout.strategy} ends a chain over the call limit with a token that no engine has sampled"
    )
    if train.old_logprobs == "rollout":
        raise ValueError(f"{why}, so train.old_logprobs=rollout has no log-prob of it: use recompute")
    if objective.importance_cap is not None:
        raise ValueError(
            f"{why}, so objective.importance_cap={objective.importance_cap:g} has no log-prob to weigh it by: leave "
            "it out (and train.max_staleness at 0)"
        )


def check_adapters(model: ModelConfig, engine: EngineConfig) -> None:
    """Check that the engine can hold adapters where it is asked to."""
    if not model.lora.rank or model.lora.in_engine != "adapters":
        return
    if isinstance(engine, ServerConfig):
        raise ValueError("model.lora.in_engine=adapters: engine.name=server takes merged weights; leave it at auto")


def check_engine(engine: EngineConfig, rollout: RolloutConfig, train: TrainConfig) -> None:
    """Check that the engine can sample what is asked for, and when it is asked for it."""
    if isinstance(engine, ServerConfig) and (rollout.top_p < 1 or rollout.top_k):
        raise ValueError(
            "engine.name=server needs rollout.top_p=1 and rollout.top_k=0: servers do not tell the log-probs that the "
            "trainer needs of a truncated distribution"
        )
    if not isinstance(engine, VLLMConfig) or not train.max_staleness:
        return
    if engine.placement == "colocated" and (engine.sleep != "off" or engine.tensor_parallel > 1):
        raise ValueError(
            "train.max_staleness=1 rolls out during the update: a colocated vllm engine then needs "
            "engine.sleep=off and engine.tensor_parallel=1, or use engine.placement=own_gpus"
        )
