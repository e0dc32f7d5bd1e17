"""A task: questions, prompts, rewards, passages and demonstrations, from the embedded world or from files."""

from atpo_fast.data.prompts import Prompt
from atpo_fast.environment.rewards import RewardTerm, Trajectory
from atpo_fast.task.definition import TaskDefinition, load_definition
from atpo_fast.task.prompt_encoder import PromptEncoder
from atpo_fast.task.task import Task, load_task

__all__ = [
    "Prompt",
    "PromptEncoder",
    "RewardTerm",
    "Task",
    "TaskDefinition",
    "Trajectory",
    "load_definition",
    "load_task",
]
