"""AT²PO in one visible loop: search → score → credit → pack → gradient → sync, in the embedded world.

    python examples/minimal_at2po.py [--cold-start-steps 350] [--steps 24] [--device cuda]

A small model made from scratch imitates scripted demonstrations, most of which are bad, and then learns by tree search
to answer questions of one or two look-ups with a search tool. One process, no DeepSpeed, no run folder, minutes on two
CPU cores; `atpo-fast train` is the same loop with all that a long run needs (docs/life_of_a_tree.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.config import Config, DataConfig, ModelConfig, RolloutConfig, TaskConfig, ToolsConfig, WorldConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines.paged import PagedEngine
from atpo_fast.environment import make_toolbox
from atpo_fast.environment.reward import score_trees
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.rollout import TreeSearch, in_order
from atpo_fast.task import Task, load_task
from atpo_fast.train.from_config import build_model

CONFIG = Config(
    data=DataConfig(source="world", max_prompt_tokens=32),
    task=TaskConfig(prompt="short"),
    world=WorldConfig(
        entities=30, relations=4, max_hops=2, train_questions=300, eval_questions=60, demonstrations=1000
    ),
    model=ModelConfig(dtype="float32", intermediate_size=256, max_positions=512),
    tools=ToolsConfig(builtin=["search"], max_result_tokens=96),
    rollout=RolloutConfig(
        schedule="synchronous",
        initial_chains=6,
        expansion_rounds=2,
        expansions_per_round=3,
        max_turn_tokens=24,
        max_response_tokens=320,
    ),
)
ROW_TOKENS = 8192
QUESTIONS_PER_STEP, QUESTIONS_PER_MINIBATCH = 16, 8


def train(cold_start_steps: int, steps: int, device: str = "cpu") -> list[float]:
    """Learn; returns the share of right answers (EM) of the training rollouts of each step."""
    torch.manual_seed(CONFIG.seed)
    draw = np.random.default_rng(CONFIG.seed)
    task = load_task(CONFIG)
    policy = Policy(build_model(CONFIG.model, task.tokenizer, CONFIG.seed).to(device))
    cold_start(policy, task, cold_start_steps, draw)

    objective = Objective.preset("at2po")  # a ratio per turn, clipped at 3e-3 and 4e-3, no KL
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4, weight_decay=0.0)
    model = build_model(CONFIG.model, task.tokenizer, CONFIG.seed)
    engine = PagedEngine(model, task.tokenizer, cache_tokens=65536, device=device)
    engine.update_weights(policy.model.named_parameters())
    toolbox = make_toolbox(CONFIG.tools, task.passages)
    search = TreeSearch(engine, task.tokenizer, toolbox, CONFIG.rollout, CONFIG.tools, cache_tokens=65536)

    print(f"EM on {len(task.eval)} evaluation questions: {evaluate(search, task):.3f}", flush=True)
    right = []
    for step in range(steps):
        questions = [task.train[i] for i in draw.choice(len(task.train), QUESTIONS_PER_STEP, replace=False)]

        # 1. Search: chains first, then siblings of the turns that the policy was least sure of.
        prompts = [task.encode_prompt(question) for question in questions]
        trees = in_order(search.roll_out(questions, prompts, seed=step))

        # 2. Score: one reward for each leaf.
        scores = score_trees(trees, questions, task.tokenizer, CONFIG.reward)

        # 3. Credit: rewards flow from the leaves to every turn.
        assign_credit(trees, method="at2po")

        for first in range(0, len(trees), QUESTIONS_PER_MINIBATCH):
            # 4. Pack: one copy of every token; branches do not see each other.
            rows = pack_trees(trees[first : first + QUESTIONS_PER_MINIBATCH], objective, ROW_TOKENS)

            # 5. Gradient: every token is forwarded, scored and back-propagated once.
            accumulate_gradients(policy.train(), rows, objective)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # 6. Sync: the engine samples the next trees with the new weights.
        engine.update_weights(policy.model.named_parameters())

        right.append(float(np.mean([leaf.em for tree in scores for leaf in tree])))
        unique, flat = sum(tree.unique_tokens for tree in trees), sum(tree.flat_tokens for tree in trees)
        print(f"step {step + 1:3}: EM {right[-1]:.3f}, {unique:,} unique tokens of {flat:,}", flush=True)

    print(f"EM on {len(task.eval)} evaluation questions: {evaluate(search, task):.3f}")
    toolbox.close()
    return right


def cold_start(policy: Policy, task: Task, steps: int, draw: np.random.Generator) -> None:
    """Imitate demonstrations: chains whose action tokens all have the weight of a mean."""
    likelihood = Objective(aggregation="token-mean")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        batch: list[TurnTree] = [task.demonstrations[i] for i in draw.integers(len(task.demonstrations), size=32)]
        for tree in batch:
            tree.advantages = np.ones(len(tree))
        rows = [row.to(policy.device) for row in pack_trees(batch, likelihood, ROW_TOKENS)]
        loss = sum(-(row.weight_pos * policy(row)[0]).sum() for row in rows)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 0.1 + (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"cold start, step {step + 1:3}: {loss.item():.3f} nats a token", flush=True)


def evaluate(search: TreeSearch, task: Task) -> float:
    """Answer the evaluation questions greedily; returns the share of right answers."""
    questions: Sequence[Question] = task.eval
    trees = in_order(search.roll_out(questions, [task.encode_prompt(q) for q in questions], seed=0, greedy=True))
    scores = score_trees(trees, questions, task.tokenizer, CONFIG.reward, validation=True)
    return float(np.mean([leaf.em for tree in scores for leaf in tree]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold-start-steps", type=int, default=350, help="optimizer steps of imitation")
    parser.add_argument("--steps", type=int, default=24, help="steps of reinforcement learning")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    train(arguments.cold_start_steps, arguments.steps, arguments.device)
