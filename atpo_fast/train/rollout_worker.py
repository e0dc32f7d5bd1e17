"""A rank's inference side: engine, tools and turn loop, fed with the policy's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from atpo_fast.data.questions import Question
from atpo_fast.environment import make_toolbox
from atpo_fast.environment.reward import LeafScore, score_trees
from atpo_fast.policy import Policy, load_model
from atpo_fast.rollout import TransformersEngine, TurnLoop
from atpo_fast.train.run import Run
from atpo_fast.train.weights import whole_parameters
from atpo_fast.tree import TurnTree


@dataclass(slots=True)
class ScoredTree:
    """A tree with its question and the score of each leaf."""

    question: Question
    tree: TurnTree
    scores: list[LeafScore]


class RolloutWorker:
    """Rolls out this rank's questions.

    The engine holds its own copy of the model at `folder`, because ZeRO-3 shards the trainer's; `sync` brings it up
    to date, one tensor at a time.
    """

    def __init__(self, run: Run, folder: Path | str, device: torch.device):
        config = run.config
        dtype = torch.float32 if config.rollout.cache_dtype == "float32" else getattr(torch, config.model.dtype)
        self._run = run
        model = load_model(folder, dtype)
        self.engine = TransformersEngine(
            model, run.task.tokenizer, cache_tokens=config.rollout.cache_tokens, device=device
        )
        self._loop = TurnLoop(
            self.engine,
            run.task.tokenizer,
            make_toolbox(config.tools, run.task.passages),
            config.rollout,
            config.tools,
            max_positions=model.config.max_position_embeddings,
        )

    def sync(self, policy: Policy) -> None:
        """Take the policy's weights; a collective under ZeRO-3."""
        with self._run.timer.phase("sync"):
            self.engine.update_weights(whole_parameters(policy))

    def roll_out(self, questions: Sequence[Question], *, seed: int, greedy: bool = False) -> list[ScoredTree]:
        """Search trees of `questions`, scored. Raises StopRequested when the run was asked to stop."""
        run = self._run
        prompts = [run.task.encode_prompt(question) for question in questions]
        self.engine.wake()
        with run.timer.phase("rollout"):
            trees = self._loop.roll_out(
                list(questions), prompts, seed=seed, greedy=greedy, on_progress=self._report, timer=run.timer
            )
            scores = score_trees(trees, list(questions), run.task.tokenizer, run.config.reward, validation=greedy)
        self.engine.sleep()
        return [ScoredTree(q, t, s) for q, t, s in zip(questions, trees, scores, strict=True)]

    def _report(self, done: int, total: int, decoded_tokens: int) -> None:
        self._run.stop.check()
        self._run.progress.advance(done, decoded_tokens=decoded_tokens)
