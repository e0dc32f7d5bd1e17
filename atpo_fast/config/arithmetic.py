"""The batch arithmetic of a run in words, for `--dry-run` and the head of the log."""

from __future__ import annotations

from atpo_fast.config.load import read_deepspeed
from atpo_fast.config.methods import METHODS, setting
from atpo_fast.config.schema import Config


def batch_arithmetic(config: Config) -> str:
    """Say what a run amounts to, a line each: method, trajectories, path length, steps, ranks; then warnings.

    Raises ConfigError when the DeepSpeed file cannot be read.
    """
    return "\n".join([*method_lines(config), *_counts(config), *_dynamic_sampling(config), *_warnings(config)])


def method_lines(config: Config) -> list[str]:
    """Say which method a run follows, from which source, and with which settings, sizes apart, it leaves the method."""
    method = METHODS[config.method]
    lines = [f"method: {method.title} ({method.source})"]
    lines += [f"  differs from the authors' code: {method.departs}"] if method.departs else []
    other = {name: setting(config, name) for name, own in method.essence.items() if setting(config, name) != own}
    if not other:
        return lines
    same = [name for name, known in METHODS.items() if all(setting(config, k) == v for k, v in known.essence.items())]
    words = ", ".join(f"{name}={value}" for name, value in other.items())
    known = f"this is what method={same[0]} sets" if same else "no method that `atpo-fast methods` lists is like it"
    return [*lines, f"  but with {words}: {known}"]


def longest_path(config: Config) -> int:
    """Count the tokens of the longest possible trajectory, prompt included."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def minibatches_per_step(config: Config) -> int:
    """Count the optimizer steps per rollout batch."""
    return config.train.questions_per_step // config.train.questions_per_minibatch


def _counts(config: Config) -> list[str]:
    train, rollout, leaves = config.train, config.rollout, config.rollout.leaves
    minibatches = minibatches_per_step(config)
    ranks = f"{_count(config.ranks, 'rank')}" if config.ranks else "one rank per GPU"
    stage = read_deepspeed(config).get("zero_optimization", {}).get("stage", 0)
    return [
        f"{_count(train.questions_per_step, 'question')} × {_count(leaves, 'leaf', 'leaves')}"
        f" = {_count(train.questions_per_step * leaves, 'trajectory', 'trajectories')},"
        f" {_count(minibatches, 'mini-batch', 'mini-batches')} of {train.questions_per_minibatch * leaves}",
        f"{_tree_shape(config)}",
        f"longest path: {config.data.max_prompt_tokens} prompt + {rollout.max_response_tokens} response"
        f" = {longest_path(config)} tokens; rows of at most {train.row_tokens} tokens",
        f"{_count(train.steps, 'step')} × {_count(minibatches, 'mini-batch', 'mini-batches')}"
        f" = {_count(train.steps * minibatches, 'optimizer step')};"
        f" {_every('evaluation', train.eval_every)}, {_every('checkpoint', train.save_every)}",
        f"{ranks} on device {config.device}, DeepSpeed ZeRO stage {stage} ({config.deepspeed})",
    ]


def _tree_shape(config: Config) -> str:
    rollout = config.rollout
    chains, tools = _count(rollout.initial_chains, "chain"), f"tools: {', '.join(config.tools.builtin)}"
    if rollout.strategy == "chain":
        return f"search: {chains} per question, no expansion; {tools}"
    if rollout.strategy in ("arpo", "aepo"):
        first = "as many chains as monitoring says" if rollout.monitored else chains
        return f"search: {first}, then branches up to {rollout.leaves} per question ({rollout.strategy}); {tools}"
    growth = f"{chains} + {_count(rollout.expansion_rounds, 'round')} × {rollout.expansions_per_round} expansions"
    if rollout.strategy == "tree_grpo":
        trees = _count(rollout.trees_per_question, "tree")
        kept = f"{growth}, {rollout.leaves_per_tree} leaves of each kept"
        return f"search: {trees} of {kept}, per question (tree_grpo); {tools}"
    return f"search: {growth} per question ({rollout.strategy}); {tools}"


def _dynamic_sampling(config: Config) -> list[str]:
    train, sampling = config.train, config.train.dynamic_sampling
    if not sampling.enabled:
        return []
    at_once = sampling.questions_per_rollout or train.questions_per_step
    return [
        f"dynamic sampling: {_count(at_once, 'question')} at a time, in at most {sampling.max_refills + 1} roll-outs,"
        f" until {train.questions_per_step} vary in {sampling.metric}; then {sampling.on_exhausted}"
    ]


def _warnings(config: Config) -> list[str]:
    path = longest_path(config)
    if config.model.path is not None or path <= config.model.max_positions:
        return []
    return [
        f"warning: a path may have {path} tokens but the random model only "
        f"model.max_positions={config.model.max_positions}"
    ]


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _every(what: str, steps: int) -> str:
    return f"{what} every {_count(steps, 'step')}" if steps else f"{what} at the end"
