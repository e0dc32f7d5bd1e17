"""AT²PO inside TRL: its trainer, with this project's tree search as rollout and its credit, in the embedded world.

    python examples/trl_tree_search.py [--cold-start-steps 150] [--steps 20]

TRL (1.16) owns the optimizer, the batches and the loss's normalisation. A `rollout_func` searches trees and hands over
their leaves, one row each; turns get the advantages of the tree; `TurnGRPOTrainer` has a ratio for each turn. TRL does
not know that rows share turns, so it forwards those once for each row: this project's own loop does not.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from minimal_at2po import CONFIG, cold_start

from atpo_fast import TurnTree
from atpo_fast.engines.paged import PagedEngine
from atpo_fast.environment import make_toolbox
from atpo_fast.environment.reward import score_trees
from atpo_fast.policy import Policy
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.task import load_task
from atpo_fast.train.from_config import build_model
from atpo_kernels.hosts.credit import tree_advantages
from atpo_kernels.hosts.trl import TurnGRPOConfig, TurnGRPOTrainer

LEAVES, QUESTIONS_PER_STEP = 12, 4  # six chains, and two rounds of three branches


class TreeTrainer(TurnGRPOTrainer):
    """TRL's trainer with AT²PO's advantages of turns; a group of rows is the leaves of a tree."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        out = super()._generate_and_score_completions(inputs)
        rows = out["completion_ids"], out["completion_mask"] * out["tool_mask"], out["advantages"]
        groups = [i // self.num_generations for i in range(len(out["completion_ids"]))]
        out["advantages"] = tree_advantages(*rows, groups, standardize=False)  # TRL has standardised the rewards
        return out


class TreeRollout:
    """What TRL calls for completions: searches a tree for each question."""

    def __init__(self) -> None:
        self.task = load_task(CONFIG)
        model = build_model(CONFIG.model, self.task.tokenizer, CONFIG.seed)
        self.engine = PagedEngine(model, self.task.tokenizer, cache_tokens=65536)
        self.toolbox = make_toolbox(CONFIG.tools, self.task.passages)
        self.search = TreeSearch(
            self.engine, self.task.tokenizer, self.toolbox, CONFIG.rollout, CONFIG.tools, cache_tokens=65536
        )
        self.by_text = {question.text: question for question in self.task.train}

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """Search a tree for each question, and write its leaves out as rows."""
        self.engine.update_weights(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        questions = [self.by_text[text] for text in prompts[::LEAVES]]
        encoded = [self.task.encode_prompt(question) for question in questions]
        trees = in_order(self.search.roll_out(questions, encoded, seed=trainer.state.global_step))
        scores = score_trees(trees, questions, self.task.tokenizer, CONFIG.reward)
        rows: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "score")
        }
        for tree, leaves in zip(trees, scores, strict=True):
            found = [score for score in leaves for _ in range(tree.turns[score.turn].multiplicity)]
            for score in (found * LEAVES)[:LEAVES]:  # a tree that could not be grown whole repeats its leaves
                for name, values in written_out(tree, score.turn).items():
                    rows[name].append(values)
                rows["score"].append(score.reward)
        return rows


def written_out(tree: TurnTree, leaf: int) -> dict[str, list[Any]]:
    """Write the trajectory of a leaf out as TRL wants it: tokens of results have the mask 0."""
    row: dict[str, list[Any]] = {"prompt_ids": tree.turns[0].observation_ids.tolist()}
    row |= {name: [] for name in ("completion_ids", "logprobs", "env_mask")}
    for turn in (tree.turns[n] for n in tree.path(leaf)[1:]):
        results = len(turn.observation_ids)
        row["completion_ids"] += [*turn.action_ids.tolist(), *turn.observation_ids.tolist()]
        row["logprobs"] += [*map(float, turn.logprobs), *[0.0] * results]
        row["env_mask"] += [1] * len(turn.action_ids) + [0] * results
    return row


def train(cold_start_steps: int, steps: int) -> list[float]:
    """Learn; returns the mean reward of each step."""
    torch.manual_seed(CONFIG.seed)
    rollout = TreeRollout()
    policy = Policy(build_model(CONFIG.model, rollout.task.tokenizer, CONFIG.seed))
    cold_start(policy, rollout.task, cold_start_steps, np.random.default_rng(CONFIG.seed))
    model = build_model(CONFIG.model, rollout.task.tokenizer, CONFIG.seed)
    model.load_state_dict(policy.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        args = TurnGRPOConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=LEAVES,
            gradient_accumulation_steps=QUESTIONS_PER_STEP,
            num_generations=LEAVES,
            max_completion_length=CONFIG.rollout.max_response_tokens,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        )
        trainer = TreeTrainer(
            model=model,
            reward_funcs=lambda score, **_: score,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [question.text for question in rollout.task.train]}),
            processing_class=rollout.task.tokenizer,
            rollout_func=rollout,
        )
        trainer.train()
    rollout.toolbox.close()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold-start-steps", type=int, default=150, help="optimizer steps of imitation")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of TRL")
    arguments = parser.parse_args()
    rewards = train(arguments.cold_start_steps, arguments.steps)
    print("mean reward by step:", " ".join(f"{reward:.3f}" for reward in rewards))
