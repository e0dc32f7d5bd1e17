"""Sections `optim`, `cold_start`, `train` and `eval`: the loops."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule during RL."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay of AdamW."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    warmup_steps: int = Field(default=0, ge=0)
    """Number of optimizer steps of linear warm-up; the learning rate is constant afterwards."""


@dataclass(config=STRICT, kw_only=True)
class ColdStartConfig:
    """The cold start: imitation of demonstrations before RL."""

    when: Literal["auto", "always", "never"] = "auto"
    """When `train` has a cold start. auto: where demonstrations are asked for (`from_evidence`, `demonstrations`), and
    in the world for a model made from scratch. always: whatever the model; an error without demonstrations. never: RL
    starts from the given weights."""
    steps: int = Field(default=300, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Number of demonstrations per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate (linear warm-up, cosine decay)."""
    warmup_steps: int = Field(default=20, ge=0)
    """Number of steps of warm-up."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the demonstrations that is not trained on; their loss is logged as cold_start/validation_loss."""
    validate_every: int = Field(default=20, ge=1)
    """Number of steps between validations."""
    save_every: int = Field(default=50, ge=0)
    """Number of steps between checkpoints, from which an interrupted cold start continues; 0: only when stopped."""
    from_evidence: bool = False
    """Whether demonstrations are built from the data (files): they search the titles of a training question's gold
    evidence, then answer."""
    demonstrations: str | None = None
    """File of demonstrations, with records {"question", "turns": [{"action", "observation"}, ...]}; none: those of the
    world."""

    @property
    def asks_for_demonstrations(self) -> bool:
        """Whether demonstrations are named or to be built."""
        return self.from_evidence or self.demonstrations is not None

    def precedes_rl(self, *, demonstrations: bool, given_model: bool) -> bool:
        """Tell whether RL begins with a cold start, given whether the task has demonstrations and a model is given.

        Under `auto` the world's own demonstrations are for models made from scratch, those asked for are for any.
        """
        if self.when != "auto":
            return self.when == "always"
        return demonstrations and (self.asks_for_demonstrations or not given_model)


@dataclass(config=STRICT, kw_only=True)
class DynamicSamplingConfig:
    """Dynamic sampling (DAPO): train only on questions whose trajectories differ, and replace the others."""

    enabled: bool = False
    """Whether questions without variance are dropped and the next ones rolled out in their place."""
    metric: Literal["reward", "em", "f1"] = "reward"
    """Score that has to vary over the trajectories of a question. reward: what is trained on, with every penalty. em,
    f1: that of the answer alone."""
    questions_per_rollout: int | None = Field(default=None, ge=1)
    """Number of questions rolled out at a time, over all ranks; none: train.questions_per_step, which surplus=keep does
    not let it exceed."""
    max_refills: int = Field(default=9, ge=0)
    """Number of further roll-outs in a step, at most."""
    surplus: Literal["discard", "keep"] = "discard"
    """What becomes of questions beyond train.questions_per_step. keep: the next step begins with them, so their samples
    are older than its weights; needs old_logprobs=rollout, or objective.importance_cap with old_logprobs=recompute."""
    on_exhausted: Literal["stop", "continue"] = "stop"
    """What happens when too few questions vary after the last refill. stop: the run saves and ends with a message.
    continue: the step trains on those there are."""


@dataclass(config=STRICT, kw_only=True)
class TrainConfig:
    """The RL loop: batch sizes, old log-probs, evaluation and checkpoints."""

    steps: int = Field(default=100, ge=1)
    """Number of rollout batches; a batch is one step, whatever its number of mini-batches."""
    token_budget: int | None = Field(default=None, ge=1)
    """Number of generated tokens after whose step the run ends, if it has not taken all its steps; none: no limit."""
    questions_per_step: int = Field(default=64, ge=1)
    """Number of questions trained on per step, over all ranks; they are all that are rolled out, but for dynamic
    sampling."""
    questions_per_minibatch: int = Field(default=8, ge=1)
    """Number of questions per optimizer step, over all ranks."""
    row_tokens: int = Field(default=16384, ge=16)
    """Number of tokens of a packed row (a micro-batch), at most."""
    prefix_memory_gb: float = Field(default=4.0, ge=0)
    """Memory (GB, of each rank) for the keys and values of ancestors while a tree that does not fit a row is processed
    depth-first, so that no token is computed for several rows; done where it costs less than to repeat the ancestors.
    0: always repeat them."""
    old_logprobs: Literal["rollout", "recompute"] = "recompute"
    """Source of the old log-probs: the engine, or the trainer in a pass without gradient before the first update. The
    first mini-batch needs no pass: its old log-probs are those of its own forward."""
    check_packing: bool = True
    """Whether a run begins by comparing log-probs and gradients of a small packed tree with those of its trajectories
    through the unchanged transformers model, in seconds, and stops if they differ by more than rounding."""
    max_mismatch_kl: float = Field(default=0.1, gt=0)
    """Largest KL (nats a token) between the engine's and the trainer's log-probs under the same weights; more is a
    fault, and the run stops with a message."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """Number of steps by which the weights that sample a batch may be older than those that learn from it. 1: the next
    batch is rolled out while the policy learns from this one; needs old_logprobs=rollout, or objective.importance_cap
    with old_logprobs=recompute. 0: never."""
    eval_every: int = Field(default=20, ge=0)
    """Number of steps between evaluations; 0: only at the end."""
    save_every: int = Field(default=50, ge=0)
    """Number of steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints kept."""
    keep_best: int = Field(default=1, ge=0)
    """Number of checkpoints kept beside them: those with the highest EM of the evaluation at their step."""
    async_save: bool = False
    """Whether the files of a checkpoint are written while training goes on. Needs memory of the CPU for a copy: of
    each rank's share of the optimizer's state, and on rank 0 of the model."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do with an earlier run of the run folder. auto: continue from its newest checkpoint when there is one.
    must: fail when there is none. never: begin again; the earlier run's folder is renamed."""
    on_change: Literal["refuse", "continue"] = "refuse"
    """What to do when what the run folder holds was made with other settings, data, weights or vocabulary than these.
    refuse: name each difference and stop. continue: name it and go on. Harmless differences are only named."""
    save_trees: int = Field(default=2, ge=0)
    """Number of trees per step written out for the report."""
    dynamic_sampling: DynamicSamplingConfig = Field(default_factory=DynamicSamplingConfig)
    """Dynamic sampling of questions."""

    def __post_init__(self) -> None:
        if self.questions_per_step % self.questions_per_minibatch:
            raise ValueError(
                f"train.questions_per_step={self.questions_per_step} must be a multiple of "
                f"train.questions_per_minibatch={self.questions_per_minibatch}"
            )
        sampling = self.dynamic_sampling
        at_once = sampling.questions_per_rollout or 0
        if sampling.enabled and sampling.surplus == "keep" and at_once > self.questions_per_step:
            raise ValueError(
                f"train.dynamic_sampling.questions_per_rollout={at_once} may leave more than one step's questions to "
                f"keep: with surplus=keep it must be at most train.questions_per_step={self.questions_per_step}"
            )


@dataclass(config=STRICT, kw_only=True)
class EvalConfig:
    """Evaluation. During training: one greedy answer to each question of `data.eval_files` (or of the world).
    `atpo-fast eval`: those questions and the sets of `eval.sets`, by the keys below."""

    sets: dict[str, list[str]] = Field(default_factory=dict)
    """Further sets of questions by name, each a list of files relative to `data.root`. Names such as hotpotqa, 2wiki,
    musique, bamboogle, nq, triviaqa and popqa have their columns in the table. Questions of `data.eval_files` are
    sorted into sets by their source."""
    samples: int = Field(default=1, ge=1)
    """Number of answers to each question; several give pass@k and maj@k, and EM and F1 are means over them."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0: greedy, for one sample only."""
    batch_size: int = Field(default=200, ge=1)
    """Number of questions that a rank answers at once; `atpo-fast eval` writes their answers before the next."""

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"eval.samples={self.samples} needs eval.temperature above 0: greedy answers are all the same"
            )
        empty = [name for name, files in self.sets.items() if not files]
        if empty:
            raise ValueError(f"eval.sets: {', '.join(empty)} names no files")
