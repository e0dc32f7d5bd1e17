"""A task of one's own: sums in words, whose answer is the last line, with a reward for being close."""

from atpo_fast.task import Prompt, TaskDefinition, Trajectory


def close(trajectory: Trajectory) -> float:
    """Return 1 for the right number, less for one that is further away, and 0 for what is no number."""
    answer, right = trajectory.answer or "", int(trajectory.question.answers[0])
    return 1 / (1 + abs(int(answer) - right)) if answer.isdecimal() else 0.0


def digits(completions: list[str], **columns: object) -> list[float]:
    """Return the share of digits in what was written; as TRL calls rewards."""
    return [sum(map(str.isdecimal, text)) / max(len(text), 1) for text in completions]


TASK = TaskDefinition(prompt=Prompt(user="{question}"), answer="last_line", rewards=[close, (digits, 0.1)])
