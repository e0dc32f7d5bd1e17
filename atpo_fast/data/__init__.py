"""Questions, passages, prompts and tokenizers; `task.load_task` puts them together."""

from atpo_fast.data.questions import Passage, Question

__all__ = ["Passage", "Question"]
