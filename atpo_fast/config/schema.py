"""The whole configuration: its sections, and the few keys that belong to none."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.choices import MethodName
from atpo_fast.config.checks import (
    check_adapters,
    check_engine,
    check_fork,
    check_old_logprobs,
    check_rooms,
    check_row,
    check_turn_clips,
    check_unsampled_tokens,
)
from atpo_fast.config.data import DataConfig, RoomsConfig, WorldConfig
from atpo_fast.config.engines import EngineConfig, PagedConfig
from atpo_fast.config.environment import EnvironmentConfig
from atpo_fast.config.logging import LoggingConfig
from atpo_fast.config.method import CreditConfig, ObjectiveConfig, RewardConfig
from atpo_fast.config.model import ModelConfig
from atpo_fast.config.rollout import RolloutConfig
from atpo_fast.config.section import STRICT
from atpo_fast.config.task import TaskConfig
from atpo_fast.config.tools import ToolsConfig
from atpo_fast.config.train import ColdStartConfig, EvalConfig, OptimConfig, TrainConfig


@dataclass(config=STRICT, kw_only=True)
class Config:
    """Everything that a run depends on."""

    run_dir: str = "runs/default"
    """Folder of everything the run writes."""
    method: MethodName = "at2po"
    """Method to train by: fills in strategy, credit, objective and what else it needs (`atpo-fast methods`)."""
    seed: int = 0
    """Seed of sampling, data order and initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run. auto: GPUs where PyTorch sees some."""
    ranks: int = Field(default=1, ge=0)
    """Number of processes to launch; 0: one per GPU."""
    deepspeed: str = "configs/deepspeed/zero3.json"
    """DeepSpeed's JSON file, for stage, offload and buckets. Batch sizes, precision, clipping and the optimizer come
    from this configuration; a file that sets them is refused."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Questions and passages."""
    task: TaskConfig = Field(default_factory=TaskConfig)
    """Prompt, answer and rewards."""
    world: WorldConfig = Field(default_factory=WorldConfig)
    """The embedded world of questions."""
    rooms: RoomsConfig = Field(default_factory=RoomsConfig)
    """The embedded world of rooms."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The policy."""
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    """The environment's tools."""
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    """An environment with a state."""
    engine: EngineConfig = Field(default_factory=PagedConfig)
    """The inference engine."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Tree search."""
    reward: RewardConfig = Field(default_factory=RewardConfig)
    """Outcome reward."""
    credit: CreditConfig = Field(default_factory=CreditConfig)
    """Advantages."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """Loss."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer of RL."""
    cold_start: ColdStartConfig = Field(default_factory=ColdStartConfig)
    """Cold start."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """RL loop."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Metrics."""

    def __post_init__(self) -> None:
        check_turn_clips(self.credit, self.objective)
        check_row(self.data, self.rollout, self.train)
        check_fork(self.environment, self.rollout)
        check_old_logprobs(self.train, self.objective)
        check_adapters(self.model, self.engine)
        check_rooms(self.data, self.environment)
        check_engine(self.engine, self.rollout, self.train)
        check_unsampled_tokens(self.rollout, self.train, self.objective)
