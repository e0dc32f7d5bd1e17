"""Evaluation: what is made of answers. Statistics, sets, tables and comparisons; all of it pure, from records.

Answering itself is a station of a run: `atpo_fast/train/evaluate.py`.
"""

from atpo_fast.evaluation.answers import AnsweredQuestion, Sample

__all__ = ["AnsweredQuestion", "Sample"]
