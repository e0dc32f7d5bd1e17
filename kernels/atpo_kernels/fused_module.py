"""Fused loss as a module that takes Liger's argument names, for padded (B, T) batches (docs/design.md#operators)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atpo_kernels.choices import LOSS_TYPES, MEAN_OVER_STEP, ClipFamily, KLEstimator, RatioLevel, Reduction
from atpo_kernels.linear_logprob import linear_logprob
from atpo_kernels.linear_turn_policy_loss import linear_turn_policy_loss
from atpo_kernels.records import LossConfig, TokenWeights
from atpo_kernels.tokens import padded_shares, token_weights_from_advantages, turns_from_ids, turns_from_mask

__all__ = ["FusedLinearTurnPolicyLoss", "LossMetrics"]

_OURS: tuple[Reduction, ...] = get_args(Reduction)
_REDUCTION: dict[str, Reduction] = LOSS_TYPES | {name: name for name in _OURS if name != "none"}
_CLIP: dict[str, ClipFamily] = {"sapo": "sapo", "cispo": "cispo"}
_IGNORED = {"compiled", "chunk_size", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"}


class LossMetrics(tuple[Tensor, ...]):
    """Metrics: detached 0-dim tensors in the order of NAMES, of which `ref_kl` is left out without a KL term.

    `metrics[0]` is the KL where there is one and `metrics[-1]` the clip ratio, as in Liger, which however leaves out
    tokens that `delta` caps and, for "cispo", tokens of A < 0. The names follow from the
    length only, so that frameworks that rebuild a module's outputs (DeepSpeed, accelerate) keep them.
    """

    NAMES = (
        *("ref_kl", "entropy", "approx_kl", "ratio_mean", "ratio_max", "turns", "tokens"),
        *("clipped_low", "clipped_high", "clip_ratio"),
    )

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Metrics of `turn_policy_loss`, and clip_ratio = clipped_low + clipped_high."""
        return dict(zip(self.NAMES[-len(self) :], self, strict=True))

    @classmethod
    def ordered(cls, values: dict[str, Tensor]) -> LossMetrics:
        """Put the operator's metrics in the order of `NAMES`, with `clip_ratio` added."""
        values = values | {"clip_ratio": values["clipped_low"] + values["clipped_high"]}
        return cls(values[name] for name in cls.NAMES if name in values)


@dataclass(slots=True)
class _ActionTokens:
    """Tokens of a (B, T) batch that go through the head, turn by turn."""

    valid: Tensor  # (B, T) bool
    turn: Tensor  # (B, T) int64
    order: Tensor | None  # (A,) int64 index into the B*T tokens; None: all of them in order
    ratio_offsets: Tensor  # (N+1,) int32 CSR over the A axis of what shares a ratio: turns, or at level sequence rows
    turns: Tensor  # () number of turns

    def pick(self, values: Tensor) -> Tensor:  # (B, T, ...) -> (A, ...)
        """Select their rows of `values`; all others get a gradient of exactly 0."""
        flat = values.flatten(0, 1)
        return flat if self.order is None else flat.index_select(0, self.order)


class FusedLinearTurnPolicyLoss(nn.Module):
    """Module of `linear_turn_policy_loss` with the constructor and forward of Liger's `LigerFusedLinearGRPOLoss`.

    Args:
        beta, epsilon_low, epsilon_high, importance_sampling_level ("token", "turn", "sequence"), kl, entropy_coef,
            sapo_temperature_pos, sapo_temperature_neg: fields of LossConfig (kl_coef, clip_low, clip_high, level, ...).
            **Not Liger's defaults**: left out, they are those of AT2PO: level "turn", 3e-3 and 4e-3, no KL (Liger:
            "token", 0.2 and 0.2, beta 0.04, loss_type "dapo"). `kl` is "k3" unless said otherwise.
        loss_type: how tokens are averaged. "grpo" (default), "sapo": seq-mean-token-mean. "bnpo": token-mean. "dapo",
            "cispo": token-mean with num_items_in_batch / ranks in the denominator, or the mask's sum averaged over
            the ranks of torch.distributed (an all-reduce, as in Liger). "dr_grpo": seq-mean-token-sum-norm. Or a
            reduction of `turn_policy_loss` by its name. "sapo" and "cispo" also set the clip; for "cispo"
            epsilon_high is the upper bound itself, at least 1, and there is no lower bound, as in Liger.
        max_completion_length: L_max of "dr_grpo".
        temperature: divides the logits.
        delta: cap of the ratio where A < 0 (dual clip), beside every loss_type; at least the upper bound of the ratio.
            Liger ignores it for "sapo" and "cispo".
        use_ref_model: False says that there is no reference model, so beta must be 0.
        config: the loss as a LossConfig, in place of the fields above. Its importance_cap must be None: truncated
            importance weights come in as vllm_is_ratio.
        impl: as in `linear_turn_policy_loss`.
        ignored: compiled, chunk_size and vespo_* are accepted and have no effect.

    Ratios are capped at exp(config.max_log_ratio) and their gradient is the straight-through one of
    docs/design.md#ratio-levels. At level "sequence" that is Liger's where the weights of a row's tokens are equal (all
    of Liger's loss_types, vllm_is_ratio None or (B, 1)).

    **ZeRO-3** keeps a parameter whole only in the forward and backward of the module that owns it. Let the LM head call
    this module (`atpo_kernels.hosts.plain.LossHead`), and call the head in the forward of the policy or after it; tied
    weights stay tied. A partitioned weight raises ValueError. `deepspeed.zero.GatheredParameters` around the call is
    not enough to train: the weight is partitioned again when its gradient arrives.

    Raises ValueError for what this loss does not have ("luspo", "vespo", use_bias_correction_kl with a KL term) and
    combinations without meaning, TypeError for unknown arguments.
    """

    def __init__(
        self,
        *,
        beta: float | None = None,
        epsilon_low: float | None = None,
        epsilon_high: float | None = None,
        loss_type: str = "grpo",
        max_completion_length: int | None = None,
        importance_sampling_level: RatioLevel | None = None,
        sapo_temperature_pos: float | None = None,
        sapo_temperature_neg: float | None = None,
        temperature: float = 1.0,
        delta: float | None = None,
        use_ref_model: bool = True,
        use_bias_correction_kl: bool = False,
        kl: KLEstimator | None = None,
        entropy_coef: float | None = None,
        config: LossConfig | None = None,
        impl: str = "auto",
        **ignored: Any,
    ):
        super().__init__()
        if unknown := ignored.keys() - _IGNORED:
            raise TypeError(f"FusedLinearTurnPolicyLoss: unknown arguments {', '.join(sorted(unknown))}")
        if loss_type not in _REDUCTION:
            raise _error(f"loss_type={loss_type!r}: must be one of {', '.join(_REDUCTION)}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise _error("loss_type='dr_grpo' needs max_completion_length")
        named = {
            "beta": beta,
            "epsilon_low": epsilon_low,
            "epsilon_high": epsilon_high,
            "importance_sampling_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            "delta": delta,
            "kl": kl,
            "entropy_coef": entropy_coef,
        }
        self.config = _loss_config({n: v for n, v in named.items() if v is not None}, loss_type, config)
        if self.config.needs_reference and use_bias_correction_kl:
            raise _error("use_bias_correction_kl=True with beta != 0 is not supported: the KL term has no ratio")
        if self.config.needs_reference and not use_ref_model:
            raise _error("a KL term needs reference log-probs, but use_ref_model=False")
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.impl = impl

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, T) int64 or int32
        attention_mask: Tensor | None,  # (B, T)
        advantages: Tensor,  # (B,), (B, T) or (B, K)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, T), (B, 1) or (B,)
        num_items_in_batch: float | Tensor | None = None,
        *,
        turn_ids: Tensor | None = None,  # (B, T) int
    ) -> tuple[Tensor, LossMetrics]:
        """Compute the loss, differentiable in _input, lin_weight and bias, and metrics.

        `attention_mask` is 1 on action tokens (the loss mask), None for all. Other tokens are left out before the
        head: they cost no FLOPs there, get a gradient of exactly 0 and may hold anything. Turns are the maximal runs
        of ones of a row, or the tokens of a row with equal `turn_ids` in [0, T). `advantages` are by row, by token,
        or by turn: (B, K) with turn_ids in [0, K), where (B, T) always means by token. `old_per_token_logps=None`
        takes the current ones. Reference log-probs are read when there is a KL term; `ref_per_token_logps` wins over
        `ref_input` and `ref_weight`, from which they are computed without gradient. `vllm_is_ratio` multiplies the
        policy term, detached.

        Computed in the dtypes of the tensors, whatever autocast says; under autocast `_input` is cast to the dtype of
        `lin_weight`. A mask or turn_ids on a GPU cost one wait for the device (how many action tokens and turns there
        are), beside that of `linear_turn_policy_loss`.

        Raises ValueError for tensors that do not fit together, a weight without elements included (ZeRO-3).
        """
        if torch.is_autocast_enabled(_input.device.type):
            _input = _input.to(lin_weight.dtype)
        if vllm_is_ratio is not None and vllm_is_ratio.dim() == 1:
            vllm_is_ratio = vllm_is_ratio[:, None]
        shape = _input.shape[:2]
        by_token = {
            "selected_token_ids": selected_token_ids,
            "attention_mask": attention_mask,
            "turn_ids": turn_ids,
            "old_per_token_logps": old_per_token_logps,
            "ref_per_token_logps": ref_per_token_logps,
        }
        _check_shapes(_input, by_token, advantages, vllm_is_ratio)
        tokens = _action_tokens(attention_mask, turn_ids, shape, _input.device, self.config.level)
        weights = self._weights(tokens, advantages, turn_ids, num_items_in_batch, _input.dtype)
        if vllm_is_ratio is not None:  # the policy term is linear in W+ and W-
            trust = tokens.pick(vllm_is_ratio.detach().to(weights.pos.dtype).expand(shape))
            weights = replace(weights, pos=weights.pos * trust, neg=weights.neg * trust)
        targets = tokens.pick(selected_token_ids)
        old, ref = (None if x is None else tokens.pick(x) for x in (old_per_token_logps, ref_per_token_logps))
        with torch.autocast(_input.device.type, enabled=False):
            if self.config.needs_reference and ref is None:
                ref = self._reference_logprob(tokens, targets, ref_input, ref_weight, ref_bias)
            out = linear_turn_policy_loss(
                tokens.pick(_input),
                lin_weight,
                targets,
                old,
                bias=bias,
                temperature=self.temperature,
                turn_offsets=tokens.ratio_offsets,
                weights=weights,
                ref_logprob=ref,
                # a row's ratio is that of a turn as long as the row
                config=replace(self.config, level="turn") if self.config.level == "sequence" else self.config,
                impl=self.impl,
            )
        return out.loss, LossMetrics.ordered(out.metrics | {"turns": tokens.turns.to(out.loss.dtype)})

    def _weights(
        self,
        tokens: _ActionTokens,
        advantages: Tensor,  # (B,), (B, T) or (B, K)
        turn_ids: Tensor | None,  # (B, T)
        num_items: float | Tensor | None,
        dtype: torch.dtype,
    ) -> TokenWeights:  # (A,) each
        """Weigh the action tokens by (W+, W-, W0), in float32 (float64)."""
        dtype = torch.promote_types(dtype, torch.float32)
        advantages = _of_tokens(advantages.detach().to(dtype), tokens, turn_ids)
        denominator = _tokens_per_rank(tokens.valid, num_items, dtype) if self.loss_type in MEAN_OVER_STEP else None
        share = padded_shares(
            tokens.valid, tokens.turn, _REDUCTION[self.loss_type], self.max_completion_length, denominator, dtype
        )
        return token_weights_from_advantages(advantages, tokens.pick(share))

    @torch.no_grad()
    def _reference_logprob(
        self,
        tokens: _ActionTokens,
        targets: Tensor,  # (A,)
        ref_input: Tensor | None,  # (B, T, D')
        ref_weight: Tensor | None,  # (V, D')
        ref_bias: Tensor | None,  # (V,)
    ) -> Tensor:  # (A,)
        """Compute the reference log-probs of the action tokens from the reference model's hidden states."""
        if ref_input is None or ref_weight is None:
            raise _error("a KL term needs ref_per_token_logps, or ref_input and ref_weight")
        if ref_input.shape[:2] != tokens.valid.shape:
            raise _error(
                f"ref_input must be (B, T, D) with (B, T) = {tuple(tokens.valid.shape)}, got {tuple(ref_input.shape)}"
            )
        hidden, temperature = tokens.pick(ref_input), self.temperature
        return linear_logprob(hidden, ref_weight, targets, bias=ref_bias, temperature=temperature, impl=self.impl)[0]


def _loss_config(named: dict[str, Any], loss_type: str, config: LossConfig | None) -> LossConfig:
    """Configure the loss by the constructor's names, of which `named` holds those that were given."""
    if config is not None:
        if named or loss_type in _CLIP:
            given = ", ".join(named) or f"loss_type={loss_type!r}"
            raise _error(f"{given}: these are fields of config; give either")
        if config.importance_cap is not None:
            raise _error("config.importance_cap is not read here: give truncated importance weights as vllm_is_ratio")
        return config
    names = {
        "beta": "kl_coef",
        "epsilon_low": "clip_low",
        "epsilon_high": "clip_high",
        "importance_sampling_level": "level",
        "sapo_temperature_pos": "sapo_tau_pos",
        "sapo_temperature_neg": "sapo_tau_neg",
        "delta": "dual_cap",
    }
    fields: dict[str, Any] = {"kl": "k3", "clip": _CLIP.get(loss_type, "hard")}
    fields |= {names.get(name, name): value for name, value in named.items()}
    if loss_type == "cispo":
        if named.get("epsilon_high", 0) < 1:
            raise _error("loss_type='cispo' needs epsilon_high >= 1: it is the upper bound of the ratio itself")
        fields |= {"clip_low": 1.0, "clip_high": fields["clip_high"] - 1}
    if "delta" in named:
        least = 1 + (0 if loss_type == "sapo" else fields.get("clip_high", LossConfig().clip_high))
        if not named["delta"] >= least:
            raise _error(f"delta={named['delta']}: must be at least the upper bound of the ratio, {least:g}")
    return LossConfig(**fields)


def _action_tokens(
    mask: Tensor | None,  # (B, T)
    turn_ids: Tensor | None,  # (B, T)
    shape: torch.Size,
    device: torch.device,
    level: RatioLevel,
) -> _ActionTokens:
    """Find the action tokens, and order them by turn."""
    batch, length = shape
    valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.detach().bool()
    turn = turns_from_mask(valid) if turn_ids is None else turns_from_ids(turn_ids, valid)
    if mask is None and turn_ids is None:
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return _ActionTokens(valid, turn, None, offsets, turn.new_full((), batch if length else 0))
    masked = valid.numel()  # comes after every turn
    key, order = torch.where(valid, turn, masked).flatten().sort(stable=True)
    taken = key < masked
    first = taken & (key.diff(prepend=key.new_full((1,), -1)) != 0)
    tokens, turns = torch.stack([taken.sum(), first.sum()]).tolist()  # the one wait for the device
    order = order[:tokens]
    if level == "sequence":
        group, groups = order // max(length, 1), batch
    else:
        group, groups = first[:tokens].cumsum(0) - 1, turns
    offsets = torch.searchsorted(group, torch.arange(groups + 1, device=device), out_int32=True)
    return _ActionTokens(valid, turn, order, offsets, first.sum())


def _of_tokens(advantages: Tensor, tokens: _ActionTokens, turn_ids: Tensor | None) -> Tensor:
    """Give every action token its advantage (A,), from (B,), (B, T) or (B, K)."""
    shape = tokens.valid.shape
    if advantages.dim() == 1 or advantages.shape == shape:
        return tokens.pick(advantages if advantages.dim() == 2 else advantages[:, None].expand(shape))
    assert turn_ids is not None
    row = tokens.pick(torch.arange(len(advantages), device=advantages.device)[:, None].expand(shape))
    at = tokens.pick(turn_ids).long()
    if at.device.type == "cpu" and at.numel() and int(at.max()) >= advantages.shape[1]:
        raise _error(f"advantages are by turn, {tuple(advantages.shape)}, but turn_ids go up to {int(at.max())}")
    return advantages[row, at]


def _tokens_per_rank(valid: Tensor, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """Find the denominator of a mean over the tokens of all ranks, for a loss that is then averaged over ranks."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is None:
        num_items = valid.sum().to(dtype)
        if ranks > 1:
            dist.all_reduce(num_items)
    if isinstance(num_items, Tensor):
        return (num_items.to(valid.device, dtype) / ranks).clamp_min(1)
    return max(num_items / ranks, 1.0)


def _check_shapes(
    hidden: Tensor, by_token: dict[str, Tensor | None], advantages: Tensor, is_ratio: Tensor | None
) -> None:
    """Raise ValueError unless the (B, T) tensors fit _input; the operator checks the head."""
    if hidden.dim() != 3:
        raise _error(f"_input must be (B, T, D), got {tuple(hidden.shape)}")
    shape = hidden.shape[:2]
    for name, tensor in by_token.items():
        if tensor is not None and tensor.shape != shape:
            raise _error(f"{name} must be (B, T) = {tuple(shape)} as in _input, got {tuple(tensor.shape)}")
    by_turn = by_token["turn_ids"] is not None and advantages.dim() == 2 and len(advantages) == shape[0]
    if advantages.shape not in (shape[:1], shape) and not by_turn:
        wanted = f"(B,) or (B, T) = {tuple(shape)}, or with turn_ids (B, K)"
        raise _error(f"advantages must be {wanted}, got {tuple(advantages.shape)}")
    if is_ratio is not None and is_ratio.shape not in (shape, (shape[0], 1)):
        raise _error(f"vllm_is_ratio must be (B, T) = {tuple(shape)}, (B, 1) or (B,), got {tuple(is_ratio.shape)}")


def _error(message: str) -> ValueError:
    return ValueError(f"FusedLinearTurnPolicyLoss: {message}")
