"""Questions, passages, prompts and tokenizers: what comes from files."""

from atpo_fast.data.questions import Passage, Question

__all__ = ["Passage", "Question"]
