"""Configuration: `Config` and its sections, read from YAML files and overrides.

One module a section; `schema.py` puts them together, `load.py` reads and writes, `checks.py` holds what has to agree
between sections, `arithmetic.py` says what a configuration amounts to.
"""

from atpo_fast.common.errors import ConfigError
from atpo_fast.config.data import ColumnsConfig, DataConfig, RoomsConfig, WorldConfig
from atpo_fast.config.engines import EngineConfig, PagedConfig, ServerConfig, VLLMConfig
from atpo_fast.config.environment import EnvironmentConfig
from atpo_fast.config.load import dump_config, load_config, read_deepspeed, save_config
from atpo_fast.config.logging import LoggingConfig
from atpo_fast.config.method import CreditConfig, ObjectiveConfig, OverlongConfig, RewardConfig
from atpo_fast.config.model import LoRAConfig, ModelConfig
from atpo_fast.config.rollout import RolloutConfig
from atpo_fast.config.schema import Config
from atpo_fast.config.section import as_dict
from atpo_fast.config.task import RewardTermConfig, TaskConfig
from atpo_fast.config.tools import MCPServerConfig, ToolsConfig
from atpo_fast.config.train import ColdStartConfig, DynamicSamplingConfig, EvalConfig, OptimConfig, TrainConfig

__all__ = [
    "ColdStartConfig",
    "ColumnsConfig",
    "Config",
    "ConfigError",
    "CreditConfig",
    "DataConfig",
    "DynamicSamplingConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LoRAConfig",
    "LoggingConfig",
    "MCPServerConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "OverlongConfig",
    "PagedConfig",
    "RewardConfig",
    "RewardTermConfig",
    "RolloutConfig",
    "RoomsConfig",
    "ServerConfig",
    "TaskConfig",
    "ToolsConfig",
    "TrainConfig",
    "VLLMConfig",
    "WorldConfig",
    "as_dict",
    "dump_config",
    "load_config",
    "read_deepspeed",
    "save_config",
]
