"""The TRL trainers against TRL's own loss, option by option, and in real training (the real package)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
from datasets import Dataset
from trl import GRPOTrainer

from atpo_kernels import turn_policy_loss
from atpo_kernels.hosts.trl import FusedTurnGRPOTrainer, TurnGRPOConfig, TurnGRPOTrainer, check
from tests.helpers.policies import MODELS
from tests.helpers.small_tokenizers import word_level

B, P, T = 6, 3, 9
PAGE = Path(__file__).resolve().parents[3] / "docs" / "integrations.md"
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def make(folder: Path, kind: Any = TurnGRPOTrainer, model: Any = None, **options: Any) -> Any:
    """A trainer of a tiny model, without logging and saving."""
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1}
    sizes = {"per_device_train_batch_size": B, "num_generations": 2, "max_completion_length": T, "beta": 0.0}
    args = TurnGRPOConfig(output_dir=str(folder), **{**quiet, **sizes, **options})
    tokenizer = word_level()
    tokenizer.pad_token = "<eos>"
    torch.manual_seed(0)
    return kind(
        model=MODELS["qwen3"]().float() if model is None else model,
        reward_funcs=lambda completions, **_: [float(len(text) % 3) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["e1 the </sea", "the e1 e1", "rch> the", "e1"] * 3}),
        processing_class=tokenizer,
    )


def saved_model(folder: Path) -> str:
    """A folder with the tiny model: TRL loads the reference by its name."""
    torch.manual_seed(0)
    MODELS["qwen3"]().float().save_pretrained(folder / "model")
    return str(folder / "model")


def batch(seed: int = 0, rows: int = B) -> dict[str, Tensor]:
    """What TRL hands to the loss: row 1 has no action tokens, tool results lie between turns."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    length = torch.randint(2, T + 1, (rows,), generator=rng)
    completion_mask = (torch.arange(T) < length[:, None]).long()
    tool_mask = (torch.rand(rows, T, generator=rng) < 0.7).long()
    tool_mask[1] = 0
    logprob = -normal(rows, T).abs()
    return {
        "prompt_ids": torch.randint(1, 7, (rows, P), generator=rng),
        "prompt_mask": torch.ones(rows, P, dtype=torch.long),
        "completion_ids": torch.randint(1, 7, (rows, T), generator=rng),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": normal(rows),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
        "old_per_token_logps": logprob + 0.3 * normal(rows, T),
        "ref_per_token_logps": logprob + 0.3 * normal(rows, T),
        "logprob": logprob,
    }


def loss_and_gradient(trainer: Any, inputs: dict[str, Tensor], compute: Any) -> tuple[Tensor, Tensor]:
    """The loss of given log-probs, and its gradient, in float64."""
    leaf = inputs["logprob"].clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, leaf.detach().abs(), None)
    trainer._metrics["train"].clear()
    loss = compute(trainer.model, {k: v for k, v in inputs.items() if k != "logprob"})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One trainer, whose options the tests set: making it takes most of their time."""
    made = make(tmp_path_factory.mktemp("trl"))
    made.current_gradient_accumulation_steps = 2
    return made


def with_options(monkeypatch: pytest.MonkeyPatch, trainer: Any, level: str, loss_type: str, **more: Any) -> None:
    """Set what TRL reads when it computes a loss."""
    high = 1.15 if loss_type == "cispo" else 0.15
    options = {"importance_sampling_level": level, "loss_type": loss_type, "epsilon_low": 0.1, "epsilon_high": high}
    options["sapo_temperature_neg"] = 1.25  # TRL keeps it in float32
    for name, value in (options | more).items():
        monkeypatch.setattr(trainer if hasattr(trainer, name) else trainer.args, name, value)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.1, "use_bias_correction_kl": True},
    {"beta": 0.1, "use_bias_correction_kl": False},
    {"delta": 1.2},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "kl", "kl-plain", "delta"])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equals_trl(
    monkeypatch: pytest.MonkeyPatch, trainer: Any, level: str, loss_type: str, options: dict[str, Any], training: bool
) -> None:
    """Fails if an option of TRL is mapped to another loss or to another scale."""
    with_options(monkeypatch, trainer, level, loss_type, **options)
    trainer.model.train(training)
    for inputs in (batch(), {k: v for k, v in batch(1).items() if k not in ("old_per_token_logps", "tool_mask")}):
        ours = loss_and_gradient(trainer, inputs, trainer._compute_loss)
        theirs = loss_and_gradient(trainer, inputs, lambda *given: GRPOTrainer._compute_loss(trainer, *given))
        assert_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(B, 1), (B, T)])
def test_weights_of_vllm_samples(monkeypatch: pytest.MonkeyPatch, trainer: Any, shape: tuple[int, int]) -> None:
    """Fails if the importance weights of vLLM's samples are left out, or advantages by token are not taken."""
    with_options(monkeypatch, trainer, "token", "grpo", use_vllm=True, vllm_importance_sampling_correction=True)
    rng = torch.Generator().manual_seed(0)
    inputs = batch() | {"importance_sampling_ratio": torch.rand(shape, generator=rng, dtype=torch.float64)}
    for advantages in (inputs["advantages"], torch.randn(B, T, generator=rng, dtype=torch.float64)):
        inputs["advantages"] = advantages
        ours = loss_and_gradient(trainer, inputs, trainer._compute_loss)
        theirs = loss_and_gradient(trainer, inputs, lambda *given: GRPOTrainer._compute_loss(trainer, *given))
        assert_equal(ours, theirs)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_and_ranks_add_up(
    monkeypatch: pytest.MonkeyPatch, trainer: Any, loss_type: str, ranks: int
) -> None:
    """Fails if k micro-batches of 1 or two ranks give another gradient than one batch: level turn, with KL.

    "bnpo" averages over the tokens of each micro-batch, in TRL too, so its batch has equally many in all.
    """
    with_options(monkeypatch, trainer, "turn", loss_type, beta=0.1, use_bias_correction_kl=True)
    trainer.model.train()
    whole = batch()
    if loss_type == "bnpo":
        whole["tool_mask"] = whole["completion_mask"] = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 0]).repeat(B, 1)
    parts = [{k: v[i : i + 2] if v.dim() else v for k, v in whole.items()} for i in range(0, B, 2)]
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1)
    monkeypatch.setattr(trainer.args, "steps_per_generation", 1)
    expected = loss_and_gradient(trainer, whole, trainer._compute_loss)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", ranks)  # the mean over ranks is then ours to take
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", len(parts) // ranks if ranks == 1 else 1)
    if ranks == 2:
        parts = [{k: v[i : i + 3] if v.dim() else v for k, v in whole.items()} for i in (0, 3)]
    monkeypatch.setattr(trainer.args, "steps_per_generation", trainer.current_gradient_accumulation_steps)
    found = [loss_and_gradient(trainer, part, trainer._compute_loss) for part in parts]
    losses, gradients = zip(*found, strict=True)
    assert_equal((sum(losses) / ranks, torch.cat(gradients) / ranks), expected)


def test_turns(monkeypatch: pytest.MonkeyPatch, trainer: Any) -> None:
    """Fails if turns are not the runs of ones of completion_mask * tool_mask, or the metrics have other names."""
    with_options(monkeypatch, trainer, "turn", "grpo")
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 1)
    trainer.model.train()
    inputs = batch()
    ours = loss_and_gradient(trainer, inputs, trainer._compute_loss)
    leaf = inputs["logprob"].clone().requires_grad_()
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    out = turn_policy_loss(
        leaf, inputs["old_per_token_logps"], inputs["advantages"], mask=mask, clip_low=0.1, clip_high=0.15
    )
    assert_equal(ours, (out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))
    logged = trainer._metrics["train"]
    assert logged["clip_ratio/low_mean"] == pytest.approx([out.metrics["clipped_low"].item()])
    assert logged["turn/turns"] == [out.metrics["turns"].item()] and "entropy" in logged


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss_type": "luspo"}, "loss_type='luspo'"),
        ({"top_entropy_quantile": 0.8}, "top_entropy_quantile=0.8"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"entropy_coef": 0.01}, "entropy_coef"),
        ({"delta": 1.001}, "delta=1.001"),
    ],
)
def test_refused_by_name(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    """Fails if an option that the loss does not have is dropped without a word."""
    with pytest.raises(ValueError, match=name):
        make(tmp_path, **options)


def test_images_are_refused(trainer: Any) -> None:
    """Fails if a batch with images is trained on without them."""
    with pytest.raises(ValueError, match="pixel_values"):
        loss_and_gradient(trainer, batch() | {"pixel_values": torch.ones(1)}, trainer._compute_loss)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"beta": 0.1}, "use_bias_correction_kl"), ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32")],
)
def test_refused_by_the_fused_head(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    """Fails if the fused head leaves out a term of the loss or a scale of the logits without a word."""
    with pytest.raises(ValueError, match=name):
        make(tmp_path, FusedTurnGRPOTrainer, saved_model(tmp_path), **options)


@pytest.mark.slow(reason="three short trainings by TRL")
def test_training(tmp_path: Path) -> None:
    """Fails if training by TRL itself differs: accumulation, several passes, KL, evaluation, generation in between.

    At level "token" all three have the same loss. The fused head rounds differently, in float32, and AdamW's first
    steps are signs of the gradient, so its parameters are compared by the size of a step.
    """
    options: dict[str, Any] = {"importance_sampling_level": "token", "epsilon": 0.2, "beta": 0.1, "max_steps": 4}
    options |= {"num_iterations": 2, "gradient_accumulation_steps": 2, "loss_type": "dapo", "epsilon_high": 0.2}
    options |= {"use_bias_correction_kl": False, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1}
    weights, logs, path = {}, {}, saved_model(tmp_path)
    for kind in (GRPOTrainer, TurnGRPOTrainer, FusedTurnGRPOTrainer):
        made = make(tmp_path / kind.__name__, kind, path, **options)
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        made.train()
        weights[kind] = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        logs[kind] = [entry for entry in made.state.log_history if "loss" in entry]
    moved = max((weights[GRPOTrainer][n] - p).abs().max() for n, p in before.items())
    for kind in (TurnGRPOTrainer, FusedTurnGRPOTrainer):
        gap = max((weights[GRPOTrainer][n] - p).abs().max() for n, p in weights[kind].items())
        assert gap <= 1e-4 * moved, kind
        for a, b in zip(logs[GRPOTrainer], logs[kind], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["kl"] == pytest.approx(b["kl"], abs=1e-5)


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Loss and gradient in float64, up to the order of some hundred additions."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_check_passes() -> None:
    """Fails if TRL has lost a method that the trainers override."""
    check()


@pytest.mark.slow(reason="two steps of training by TRL")
def test_snippet_of_the_documentation(tmp_path: Path) -> None:
    """Fails if the lines that a user copies do not train at the level of turns."""
    tokenizer = word_level()
    tokenizer.pad_token = "<eos>"
    code = (PAGE.read_text().split("### TRL")[1].split("```python\n")[1]).split("```")[0]
    names: dict[str, Any] = {
        "model_name": saved_model(tmp_path),
        "reward": lambda completions, **_: [float(len(text) % 3) for text in completions],
        "folder": str(tmp_path),
        "dataset": Dataset.from_dict({"prompt": ["e1 the </sea"] * 4}),
        "tokenizer": tokenizer,
    }
    exec(code, names)
    assert names["trainer"].importance_sampling_level == "turn"
    assert any("turn/turns" in entry for entry in names["trainer"].state.log_history)
