"""A task: questions, passages, tokenizer, prompts and demonstrations, from the embedded world or from files."""

from atpo_fast.task.task import Task, load_task

__all__ = ["Task", "load_task"]
