"""One optimizer step under DeepSpeed: learning, discarding bad gradients, exact buffers, and the mismatch check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.config import Config, ModelConfig, OptimConfig
from atpo_fast.engines import PathNode, Request, SamplingParams
from atpo_fast.engines.paged import PagedEngine
from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy, load_model
from atpo_fast.policy.opened_rows.plan import Pass, plan_passes
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.packing_check import check_packing
from atpo_fast.train.step import optimizer_step
from atpo_fast.train.update_metrics import MetricMean, Mismatch, MismatchError
from atpo_fast.train.weights import whole_parameters
from atpo_fast.train.zero import initialize
from tests.helpers.lone_rank import lone_rank

DEEPSPEED = Path(__file__).resolve().parents[2] / "configs/deepspeed"
VOCAB, WANTED = 12, 7
ONE, TWO = [Pass("whole", 0)], [Pass("whole", 0), Pass("whole", 1)]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A group of one rank."""
    with lone_rank():
        yield


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))


def setup(lr: float, stage: int = 3):  # type: ignore[no-untyped-def]
    """(policy, engine, watch)."""
    policy = Policy(model())
    config = Config(deepspeed=str(DEEPSPEED / f"zero{stage}.json"), model=ModelConfig(dtype="float32"))
    engine, watch = initialize(policy, config, OptimConfig(lr=lr, weight_decay=0.0))
    return policy, engine, watch


def test_the_check_at_the_start_runs_under_zero() -> None:
    """Fails if partitioned weights are not gathered for transformers' own pass, or the next step is another one."""
    policy, engine, watch = setup(lr=1e-2)
    before = weights(policy)
    assert [found.passed for found in check_packing(policy, torch.device("cpu"))] == [True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())
    row = one_row(policy)
    optimizer_step(engine, watch, [row], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer())
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in whole_parameters(policy)}


def one_row(policy: Policy) -> PackedTrees:
    """A row with gradient whose rollout log-probs are the policy's own."""
    tree = TurnTree([1, 2, 3])
    for reward in (1.0, 0.0):
        tree.set_reward(tree.add_turn(0, [4, 5]), reward)
    assign_credit([tree])
    (row,) = pack_trees([tree], Objective.preset("at2po"), 64)
    with torch.no_grad():
        logprob, _ = policy(row)
    return replace(row, old_logprob=logprob, rollout_logprob=logprob)


# Fails for a wrong sign anywhere between reward and step, or an engine that keeps its first weights.
# At this rate 13 steps are enough: the reward is near 1 from the tenth on.
def test_it_learns() -> None:
    policy, engine, watch = setup(lr=3e-2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)})))
    sampler = PagedEngine(model(), tokenizer, cache_tokens=4096)
    objective, rewards = Objective.preset("at2po"), []
    for step in range(13):
        trees = [_sample_tree(sampler, step, question) for question in range(4)]
        rewards.append(np.mean([tree.turns[leaf].reward for tree in trees for leaf in tree.leaves]))
        assign_credit(trees)
        if rows := pack_trees(trees, objective, 256):
            optimizer_step(
                engine, watch, rows, plan_passes([rows])[0], objective, MetricMean(), PhaseTimer(), Mismatch(1e-3)
            )
        sampler.update_weights(whole_parameters(policy))
    assert np.mean(rewards[:3]) < 0.25
    assert np.mean(rewards[-3:]) > 0.8


def _sample_tree(sampler: PagedEngine, step: int, question: int) -> TurnTree:
    """Eight answers of two tokens, each rewarded by its share of one wanted token."""
    prompt, key = [1, 2 + question], (f"{step}.{question}", 0)
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=SamplingParams(max_new_tokens=2),
            seed=1000 * step + 10 * question + i,
            path=(PathNode(key=key, end=2),),
            turn_key=(key[0], 1 + i),
        )
        for i in range(8)
    ]
    tree = TurnTree(prompt, question_id=str(question))
    for completion in sampler.generate(requests):
        leaf = tree.add_turn(0, completion.token_ids, completion.policy_logprobs)
        tree.set_reward(leaf, float(np.mean(np.equal(completion.token_ids, WANTED))))
    return tree


# Fails when a NaN reaches weights or moments, or when one bad step also discards the next good one. Stages 1 to 3 have
# a check of DeepSpeed's own; 0 has none.
@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_with_non_finite_gradients_changes_nothing(stage: int) -> None:
    policy, engine, watch = setup(lr=1e-2, stage=stage)
    row, before = one_row(policy), weights(policy)
    bad = replace(row, weight_pos=row.weight_pos * float("nan"))
    optimizer_step(engine, watch, [bad, row], TWO, Objective.preset("at2po"), MetricMean(), PhaseTimer())
    assert watch.skipped_steps == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(policy).items())
    optimizer_step(engine, watch, [row], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer())
    assert watch.skipped_steps == 1
    after = weights(policy)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


# Fails when bf16 training rounds the rotary frequencies, so that positions differ from the inference engine's.
@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_keeps_the_rotary_frequencies_exact(stage: int, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    policy = Policy(load_model(tmp_path, torch.bfloat16))
    config = Config(deepspeed=str(DEEPSPEED / f"zero{stage}.json"), model=ModelConfig(dtype="bfloat16"))
    initialize(policy, config, OptimConfig())
    assert torch.equal(policy.model.model.rotary_emb.inv_freq, model().model.rotary_emb.inv_freq)


# Fails when weights that were never synced go unnoticed, or repeated or appended tokens (without a rollout log-prob)
# count.
def test_mismatch_is_noticed() -> None:
    policy, engine, watch = setup(lr=1e-9)
    row = one_row(policy)
    same = Mismatch(1e-6)
    optimizer_step(engine, watch, [row], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer(), same)
    assert same.kl == pytest.approx(0, abs=1e-9)
    assert same.gap == pytest.approx(0, abs=1e-6)
    near, other = replace(row, rollout_logprob=row.rollout_logprob - 0.01), Mismatch(0.1)
    optimizer_step(engine, watch, [near], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer(), other)
    assert other.gap == pytest.approx(0.01, abs=1e-4)
    appended = row.rollout_logprob - 0.01
    appended[-1] = torch.nan  # a token that no engine has sampled
    row_of_them, left = replace(row, rollout_logprob=appended), Mismatch(0.1)
    optimizer_step(engine, watch, [row_of_them], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer(), left)
    assert left.gap == pytest.approx(0.01, abs=1e-4)
    stale = replace(row, rollout_logprob=row.rollout_logprob - 1)
    with pytest.raises(MismatchError, match="max_mismatch_kl"):
        optimizer_step(
            engine, watch, [stale], ONE, Objective.preset("at2po"), MetricMean(), PhaseTimer(), Mismatch(0.1)
        )
