"""FusedLinearTurnPolicyLoss against turn_policy_loss on plain log-probs, and against Liger's fused_module."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atpo_kernels import FusedLinearTurnPolicyLoss, LossConfig, fused_module, turn_policy_loss

B, T, D, V = 5, 12, 5, 11
PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
SECTION = "## Drop the loss into another trainer"
LEVELS = ("token", "turn", "sequence")
BOUNDS = {"epsilon_low": 0.1, "epsilon_high": 0.15}
# Liger's loss_type -> reduction and LossConfig fields of turn_policy_loss
MEANING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"reduction": "seq-mean-token-mean"}, {}),
    "bnpo": ({"reduction": "token-mean"}, {}),
    "dr_grpo": ({"reduction": "seq-mean-token-sum-norm", "max_length": 20}, {}),
    "dapo": ({"reduction": "token-mean", "denominator": 17.0}, {}),
    "cispo": ({"reduction": "token-mean", "denominator": 17.0}, {"clip": "cispo", "clip_low": 1, "clip_high": 0.15}),
    "sapo": ({"reduction": "seq-mean-token-mean"}, {"clip": "sapo", "sapo_tau_neg": 1.3}),
    "turn-mean": ({"reduction": "turn-mean"}, {}),
}


class Batch:
    """Random arguments of forward; row 1 has no action tokens, and turns of every length occur."""

    def __init__(self, dtype: torch.dtype = torch.float64, temperature: float = 1.0):
        rng = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        self.hidden, self.weight, self.bias = normal(B, T, D), normal(V, D), normal(V)
        self.ids = torch.randint(V, (B, T), generator=rng)
        self.mask = (torch.rand(B, T, generator=rng) < 0.7).long()
        self.mask[1] = 0
        ids = torch.randint(3, (B, T), generator=rng)
        ids[:, :3] = torch.arange(3)
        self.turn_ids = ids.sort(dim=1, descending=True).values
        self.by_row, self.by_token, self.by_turn = normal(B), normal(B, T), normal(B, 3)
        logprob = self.plain(self.hidden, self.weight, self.bias, temperature)[0]
        self.old, self.ref = (logprob + 0.3 * normal(B, T) for _ in range(2))
        self.trust = torch.rand(B, T, generator=rng, dtype=torch.float64) + 0.5
        for name, value in vars(self).items():
            setattr(self, name, value.to(dtype) if value.is_floating_point() else value)

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(B, T) log-prob and entropy from materialised logits."""
        table = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
        return table.gather(-1, self.ids[..., None])[..., 0], -(table.exp() * table).sum(-1)

    def leaves(self) -> list[Tensor]:
        """hidden, weight and bias, to differentiate."""
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def run(self, loss: nn.Module, **changed: Any) -> list[Tensor]:
        """Loss, and gradients under an upstream gradient other than 1."""
        leaves, arguments = self.leaves(), self.arguments() | changed
        value, metrics = loss(arguments.pop("_input", leaves[0]), leaves[1], bias=leaves[2], **arguments)
        self.metrics = metrics
        wanted = [x for x in leaves if value.requires_grad]
        return [value, *torch.autograd.grad(value * -2.5, wanted, allow_unused=True, materialize_grads=True)]

    def arguments(self) -> dict[str, Any]:
        """What forward takes beside hidden, weight and bias."""
        return {
            "selected_token_ids": self.ids,
            "attention_mask": self.mask,
            "advantages": self.by_row,
            "old_per_token_logps": self.old,
        }


def expected(batch: Batch, config: LossConfig, temperature: float = 1.0, **more: Any) -> tuple[list[Tensor], Any]:
    """Loss and gradients of turn_policy_loss on plain log-probs, and its metrics."""
    leaves = batch.leaves()
    logprob, entropy = batch.plain(leaves[0], leaves[1], leaves[2], temperature)
    more = {"advantages": batch.by_row, "mask": batch.mask, "ref_logprob": batch.ref} | more
    out = turn_policy_loss(logprob, batch.old, entropy=entropy, config=config, **more)
    return [out.loss, *torch.autograd.grad(out.loss * -2.5, leaves)], out.metrics


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    """Relative to the largest element."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (1e-2 + b.abs().max().item()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", MEANING)
@pytest.mark.parametrize("explicit_turns", [False, True])
def test_equals_the_loss_on_plain_logprobs(level: Any, loss_type: str, explicit_turns: bool) -> None:
    """Fails if a token gets another's advantage, weight or turn, or a name of Liger's is mapped to another loss."""
    batch = Batch(temperature=0.8)
    how, fields = MEANING[loss_type]
    turns = {"turn_ids": batch.turn_ids} if explicit_turns else {}
    config = LossConfig(
        **{"clip_low": 0.1, "clip_high": 0.15, **fields}, level=level, kl="k3", kl_coef=0.2, entropy_coef=0.1
    )
    theirs, metrics = expected(batch, config, 0.8, advantages=batch.by_token, **how, **turns)
    bounds: dict[str, Any] = BOUNDS | ({"epsilon_high": 1.15} if loss_type == "cispo" else {})
    loss = FusedLinearTurnPolicyLoss(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.2,
        entropy_coef=0.1,
        max_completion_length=20,
        sapo_temperature_neg=1.3,
        temperature=0.8,
        **bounds,
    )
    more = {"advantages": batch.by_token, "ref_per_token_logps": batch.ref, "num_items_in_batch": 17, **turns}
    assert_equal(batch.run(loss, **more), theirs)
    assert (
        level != "token" or loss_type in ("cispo", "sapo") or min(metrics["clipped_low"], metrics["clipped_high"]) > 0.1
    )
    found = batch.metrics.by_name
    assert found.keys() - metrics.keys() == {"clip_ratio"}
    assert_equal([found[name] for name in metrics], list(metrics.values()))
    assert_equal([found["clip_ratio"], batch.metrics[-1]], [metrics["clipped_low"] + metrics["clipped_high"]] * 2)


def test_defaults_are_the_published_loss() -> None:
    """Fails if Liger's defaults (token, 0.2, dapo, KL) stand in for AT2PO's."""
    batch = Batch()
    assert_equal(batch.run(FusedLinearTurnPolicyLoss()), expected(batch, LossConfig())[0])
    config = LossConfig(clip="soft", clip_low=0.1, level="token", kl="k2", kl_coef=0.3)
    loss = FusedLinearTurnPolicyLoss(config=config, loss_type="bnpo")
    theirs = expected(batch, config, reduction="token-mean")[0]
    assert_equal(batch.run(loss, ref_per_token_logps=batch.ref), theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
def test_delta_is_the_dual_cap(loss_type: str) -> None:
    """Fails if delta is lost beside a loss_type, or is anything but a constant loss for A < 0 past it."""
    batch = Batch()
    how, fields = MEANING[loss_type]
    names: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.15, "level": "token", **fields}
    config = LossConfig(**names, dual_cap=1.2)
    more: dict[str, Any] = BOUNDS | ({"epsilon_high": 1.15} if loss_type == "cispo" else {})
    more |= {"importance_sampling_level": "token", "sapo_temperature_neg": 1.3, "delta": 1.2}
    ours = batch.run(FusedLinearTurnPolicyLoss(loss_type=loss_type, **more), num_items_in_batch=17)
    assert_equal(ours, expected(batch, config, **how)[0])
    assert not torch.allclose(ours[0], expected(batch, LossConfig(**names), **how)[0][0])


def test_advantages_by_turn() -> None:
    """Fails if the advantage of a turn is looked up by another token's turn or row."""
    batch = Batch()
    spread = batch.by_turn.gather(1, batch.turn_ids)
    for mask in (batch.mask, None):
        more = {"attention_mask": mask, "turn_ids": batch.turn_ids}
        by_turn, by_token = (
            batch.run(FusedLinearTurnPolicyLoss(), advantages=a, **more) for a in (batch.by_turn, spread)
        )
        assert_equal(by_turn, by_token)


@pytest.mark.parametrize("level", LEVELS)
def test_interleaved_turns(level: Any) -> None:
    """Fails if a turn whose tokens lie apart is more than one turn."""
    together, apart = Batch(), Batch()
    shuffle = torch.rand(B, T, generator=torch.Generator().manual_seed(1)).argsort(1)
    rows = torch.arange(B)[:, None]
    for name in ("hidden", "ids", "mask", "turn_ids", "old"):
        setattr(apart, name, getattr(together, name)[rows, shuffle])
    loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level, loss_type="turn-mean")
    value, by_hidden, *others = together.run(loss, turn_ids=together.turn_ids, advantages=together.by_turn)
    found = apart.run(loss, turn_ids=apart.turn_ids, advantages=apart.by_turn)
    assert_equal(found, [value, by_hidden[rows, shuffle], *others])


@pytest.mark.parametrize("level", LEVELS)
def test_other_tokens_do_not_reach_the_head(monkeypatch: pytest.MonkeyPatch, level: Any) -> None:
    """Fails if masked tokens are computed, get a gradient, or what they hold gets anywhere."""
    batch = Batch()
    loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level, beta=0.1)
    more = {
        "advantages": batch.by_token,
        "turn_ids": batch.turn_ids,
        "ref_weight": batch.weight,
        "ref_bias": batch.bias,
    }
    more |= {"vllm_is_ratio": batch.trust}
    clean = batch.run(loss, ref_input=batch.hidden * 1.1, **more)
    ref_input = batch.hidden * 1.1
    for tensor in (batch.hidden, batch.old, batch.by_token, batch.trust, ref_input):
        tensor[batch.mask == 0] = torch.nan
    batch.ids[batch.mask == 0] = -100
    batch.turn_ids[batch.mask == 0] = -1
    rows: list[int] = []

    def counting(original: Any) -> Any:
        return lambda hidden, *rest, **keywords: (rows.append(len(hidden)), original(hidden, *rest, **keywords))[1]

    for name in ("linear_turn_policy_loss", "linear_logprob"):
        monkeypatch.setattr(fused_module, name, counting(getattr(fused_module, name)))
    dirty = batch.run(loss, ref_input=ref_input, **more)
    assert_equal(dirty, clean, 0.0)
    assert not dirty[1][batch.mask == 0].any() and dirty[1][batch.mask == 1].any()
    assert rows == [int(batch.mask.sum())] * 2


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_liger(level: Any, loss_type: str, extras: bool) -> None:
    """Fails if an argument means something else than in Liger's module, or the metrics are in another order."""
    liger = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    own_ratio = loss_type in ("cispo", "sapo")
    if own_ratio and level == "sequence":
        pytest.skip("Liger refuses this combination")
    batch = Batch(torch.float32, temperature=0.8)
    names = {
        "beta": 0.1 if extras else 0.0,
        "epsilon_low": 0.1,
        "epsilon_high": 1.15 if loss_type == "cispo" else 0.15,
        "loss_type": loss_type,
        "max_completion_length": 20,
        "importance_sampling_level": level,
        "sapo_temperature_neg": 1.3,
        "temperature": 0.8,
        "use_ref_model": extras,
        "compiled": False,
        "chunk_size": 1,
        "delta": 1.3 if extras and not own_ratio else None,
    }
    trust = batch.trust if level == "token" else batch.trust[:, :1]
    more = {"ref_per_token_logps": batch.ref, "vllm_is_ratio": trust, "num_items_in_batch": 17} if extras else {}
    results = []
    for make in (FusedLinearTurnPolicyLoss, liger):
        found = batch.run(make(**names), **more)
        metrics = [batch.metrics[0]] * extras
        if names["delta"] is None and loss_type != "cispo":  # Liger does not count these as clipped where A < 0
            metrics.append(batch.metrics[-1])
        results.append([*found, *metrics])
    assert_equal(results[0], results[1], tolerance=2e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("bnpo", "bnpo"), ("turn-mean", "grpo")])
def test_turns_are_ligers_sequences(ours: str, theirs: str) -> None:
    """Fails if level turn averages over anything but the turn: Liger gets each turn of one row as its own sequence."""
    liger = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    batch = Batch(torch.float32)
    at = batch.turn_ids[:1].argsort(stable=True)[0]
    sizes = batch.turn_ids[0].bincount(minlength=3).tolist()
    shared: dict[str, Any] = {"epsilon_low": 0.1, "epsilon_high": 0.15, "beta": 0.0}
    leaves = batch.leaves()
    ids, old = batch.ids[:1], batch.old[:1]
    loss = FusedLinearTurnPolicyLoss(loss_type=ours, **shared)
    value, _ = loss(
        leaves[0][:1],
        leaves[1],
        ids,
        None,
        batch.by_turn[:1],
        leaves[2],
        old_per_token_logps=old,
        turn_ids=batch.turn_ids[:1],
    )
    found = [value, *torch.autograd.grad(value, leaves)]

    def cut(tensor: Tensor) -> Tensor:  # (1, T, ...) -> (3, longest turn, ...)
        return nn.utils.rnn.pad_sequence(list(tensor[0][at].split(sizes)), batch_first=True)

    loss = liger(loss_type=theirs, importance_sampling_level="sequence", compiled=False, use_ref_model=False, **shared)
    mask, hidden = cut(torch.ones(1, T)), cut(leaves[0][:1])
    value, _ = loss(hidden, leaves[1], cut(ids), mask, batch.by_turn[0], leaves[2], old_per_token_logps=cut(old))
    assert_equal(found, [value, *torch.autograd.grad(value, leaves)], tolerance=2e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_importance_weights_multiply_the_policy_term(level: Any) -> None:
    """Fails if vllm_is_ratio reaches the KL term, or is spread over a row wrongly."""
    batch = Batch()
    for trust in (batch.trust, batch.trust[:, :1]):
        config = LossConfig(level=level, kl="k3", kl_coef=0.2, importance_cap=1e9)
        theirs = expected(batch, config, rollout_logprob=batch.old - trust.expand(B, T).log())[0]
        loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level, beta=0.2)
        assert_equal(batch.run(loss, vllm_is_ratio=trust, ref_per_token_logps=batch.ref), theirs)


@pytest.mark.parametrize("level", LEVELS)
def test_without_old_logprobs_every_ratio_is_one(level: Any) -> None:
    """Fails if old_per_token_logps=None is not the current policy."""
    batch = Batch()
    loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level)
    batch.old = batch.plain(batch.hidden, batch.weight, batch.bias)[0]
    assert_equal(
        batch.run(loss, old_per_token_logps=None, vllm_is_ratio=batch.trust), batch.run(loss, vllm_is_ratio=batch.trust)
    )
    batch.run(loss, old_per_token_logps=None)
    assert batch.metrics.by_name["ratio_max"] == 1 and batch.metrics[-1] == 0


def test_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the reference is computed otherwise than the policy, wins over given log-probs, or builds a graph."""
    original = fused_module.linear_logprob

    def without_graph(*rest: Any, **keywords: Any) -> Any:
        assert not torch.is_grad_enabled()
        return original(*rest, **keywords)

    monkeypatch.setattr(fused_module, "linear_logprob", without_graph)
    batch = Batch()
    loss = FusedLinearTurnPolicyLoss(beta=0.3, temperature=0.8)
    hidden, weight, bias = (1.1 * x for x in batch.leaves())
    batch.ref = batch.plain(hidden, weight, bias, 0.8)[0].detach()
    given = batch.run(loss, ref_per_token_logps=batch.ref)
    model = {"ref_input": hidden, "ref_weight": weight, "ref_bias": bias}
    assert_equal(batch.run(loss, **model), given)
    assert_equal(batch.run(loss, ref_per_token_logps=batch.ref, ref_input=hidden, ref_weight=weight * 0), given, 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_no_mask(level: Any) -> None:
    """Fails if a missing mask is anything but all ones, or then tensors are read back (on meta there is nothing to)."""
    batch = Batch()
    loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level)
    for turns in (None, batch.turn_ids):
        ones, none = (batch.run(loss, attention_mask=m, turn_ids=turns) for m in (torch.ones(B, T), None))
        assert_equal(none, ones)
    tokens = fused_module._action_tokens(None, None, torch.Size((B, T)), torch.device("meta"), level)
    assert tokens.order is None and tokens.ratio_offsets.shape == (B + 1,)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("length", [T, 0])
def test_no_action_tokens(level: Any, length: int) -> None:
    """Fails if a micro-batch without action tokens gives nan, or no gradient for the all-reduce to wait on."""
    batch = Batch()
    for name in ("hidden", "ids", "mask", "old", "turn_ids"):
        setattr(batch, name, getattr(batch, name)[:, :length])
    for turns in (None, batch.turn_ids):
        for loss_type in ("grpo", "bnpo", "dapo", "turn-mean"):
            loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level, loss_type=loss_type)
            found = batch.run(loss, attention_mask=batch.mask * 0, turn_ids=turns)
            assert len(found) == 4 and not any(x.any() for x in found)
            assert torch.stack(batch.metrics).isfinite().all() and batch.metrics.by_name["tokens"] == 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_metrics_survive_being_rebuilt(beta: float) -> None:
    """Fails if the names are lost when a framework rebuilds outputs as type(x)(list(x)), as DeepSpeed does."""
    batch = Batch()
    batch.run(FusedLinearTurnPolicyLoss(beta=beta), ref_per_token_logps=batch.ref)
    names = list(batch.metrics.by_name)
    assert (names[0] == "ref_kl") == (beta != 0) and names[-1] == "clip_ratio"
    for again in (type(batch.metrics)(list(batch.metrics)), copy.deepcopy(batch.metrics)):
        assert again.by_name == batch.metrics.by_name
    assert not any(x.requires_grad or x.dim() for x in batch.metrics)


def test_items_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if num_items_in_batch is read as something else than the number of tokens of all ranks to divide by."""
    batch = Batch()
    loss = FusedLinearTurnPolicyLoss(loss_type="dapo")
    tokens = int(batch.mask.sum())
    assert_equal(batch.run(loss), batch.run(loss, num_items_in_batch=tokens))
    half = [x / 2 for x in batch.run(loss)]
    monkeypatch.setattr(fused_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fused_module.dist, "get_world_size", lambda: 3)
    for items in (6 * tokens, torch.tensor(6 * tokens)):
        assert_equal(batch.run(loss, num_items_in_batch=items), half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    """Fails if the loss is rounded to half precision, or autocast changes what is computed."""
    batch = Batch(dtype)
    plain = batch.run(FusedLinearTurnPolicyLoss())
    assert plain[0].dtype == torch.float32 and all(x.dtype == dtype for x in plain[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(batch.run(FusedLinearTurnPolicyLoss()), plain, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_equals_cpu(level: Any) -> None:
    """Fails if a tensor of the layout is made on the wrong device, or the GPU path computes another loss."""
    batch = Batch(torch.float32)
    loss = FusedLinearTurnPolicyLoss(importance_sampling_level=level, beta=0.1, loss_type="turn-mean")
    on_cpu = batch.run(loss, turn_ids=batch.turn_ids, ref_per_token_logps=batch.ref)
    for name, value in list(vars(batch).items()):
        if isinstance(value, Tensor):
            setattr(batch, name, value.cuda())
    on_gpu = batch.run(loss, turn_ids=batch.turn_ids, ref_per_token_logps=batch.ref)
    assert_equal([x.cpu() for x in on_gpu], on_cpu, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type='vespo': must be one of"),
        ({"loss_type": "luspo"}, "loss_type='luspo': must be one of"),
        ({"loss_type": "none"}, "loss_type='none': must be one of"),
        ({"use_bias_correction_kl": True, "beta": 0.1}, "use_bias_correction_kl=True with beta != 0 is not supported"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"beta": 0.1, "use_ref_model": False}, "use_ref_model=False"),
        ({"loss_type": "cispo"}, "epsilon_high >= 1"),
        ({"delta": 1.1, "epsilon_high": 0.2}, "delta=1.1: must be at least"),
        ({"delta": 1.2, "loss_type": "cispo", "epsilon_high": 1.3}, "at least the upper bound of the ratio, 1.3"),
        ({"config": LossConfig(), "epsilon_low": 0.1}, "epsilon_low: these are fields of config"),
        ({"config": LossConfig(), "loss_type": "cispo"}, "loss_type='cispo': these are fields of config"),
        ({"config": LossConfig(importance_cap=2.0)}, "as vllm_is_ratio"),
        ({"importance_sampling_level": "word"}, "level='word': must be one of"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    """Fails if a loss that does not exist here is quietly replaced by another."""
    with pytest.raises(ValueError, match=re.escape(message)):
        FusedLinearTurnPolicyLoss(**arguments)
    with pytest.raises(TypeError, match="unknown arguments epsilon"):
        FusedLinearTurnPolicyLoss(epsilon=0.2)
    FusedLinearTurnPolicyLoss(compiled=True, chunk_size=1, vespo_k_pos=2.0, delta=None, beta=0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_input": torch.zeros(B * T, D)}, "_input must be (B, T, D)"),
        ({"selected_token_ids": torch.zeros(B, T - 1).long()}, "selected_token_ids must be (B, T) = (5, 12)"),
        ({"attention_mask": torch.ones(B)}, "attention_mask must be (B, T)"),
        ({"old_per_token_logps": torch.zeros(B * T)}, "old_per_token_logps must be (B, T)"),
        ({"turn_ids": torch.zeros(B, 1).long()}, "turn_ids must be (B, T)"),
        ({"turn_ids": torch.full((B, T), T)}, "turn_ids must lie in [0, 12)"),
        ({"advantages": torch.zeros(B, 3)}, "or with turn_ids (B, K), got (5, 3)"),
        ({"advantages": torch.zeros(B, 2), "turn_ids": torch.full((B, T), 2)}, "turn_ids go up to 2"),
        ({"vllm_is_ratio": torch.ones(B + 1)}, "(B, 1) or (B,), got (6, 1)"),
        ({"ref_input": torch.zeros(B, 1, D), "ref_weight": torch.zeros(V, D)}, "ref_input must be (B, T, D)"),
        ({}, "needs ref_per_token_logps, or ref_input and ref_weight"),
    ],
)
def test_forward_errors(changed: dict[str, Any], message: str) -> None:
    """Fails if tensors that do not fit are broadcast, or fail somewhere deep inside."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Batch().run(FusedLinearTurnPolicyLoss(beta=0.1), **changed)


def test_partitioned_weight() -> None:
    """Fails if a weight that ZeRO-3 holds in parts gives anything but words on what to do."""
    batch = Batch()
    with pytest.raises(ValueError, match=r"weight has no elements.*ZeRO-3"):
        FusedLinearTurnPolicyLoss()(batch.hidden, torch.empty(0, dtype=torch.float64), **batch.arguments())


def test_snippets_of_the_documentation() -> None:
    """Fails if the snippets for other trainers do not run, or call the loss in a way that gives no gradient."""
    section = PAGE.read_text().split(SECTION)[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    batch = Batch(torch.float32)
    hidden, _, _ = batch.leaves()
    lm_head = nn.Linear(D, V)
    model = nn.Module()
    model.lm_head = lm_head
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "last_hidden_state": hidden,
        "completion_ids": batch.ids,
        "completion_mask": batch.mask,
        "tool_mask": batch.mask,
        "advantages": batch.by_row,
        "old_per_token_logps": batch.old,
    }
    exec(blocks[0], names)
    assert hidden.grad is not None and lm_head.weight.grad is not None and hidden.grad.any()
    theirs = turn_policy_loss(
        batch.plain(hidden, lm_head.weight, lm_head.bias)[0], batch.old, batch.by_row, mask=batch.mask
    )
    torch.testing.assert_close(names["loss"], theirs.loss)
    assert set(names["logs"]) == set(names["metrics"].by_name)
    exec(blocks[1], names)
    assert model.lm_head.weight is lm_head.weight
    torch.testing.assert_close(model.lm_head(hidden), lm_head(hidden))
    value, _ = model.lm_head(hidden, batch.ids, batch.mask, batch.by_row, old_per_token_logps=batch.old)
    torch.testing.assert_close(value, theirs.loss)
