"""slime: the function that its arguments name. Written against slime 0.3.1 at commit 624b824 (not on PyPI).

--loss-type custom_loss --custom-loss-function-path atpo_kernels.hosts.slime.policy_loss
--eps-clip 0.003 --eps-clip-high 0.004
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atpo_kernels.turn_policy_loss import turn_policy_loss


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,  # (1, T, V)
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the turn loss in the place of slime's `policy_loss_function`: averaged by slime, entropy bonus included.

    Raises ValueError, naming them, for options that it does not have: context parallelism (a turn may be cut), OPSM,
    truncated importance sampling, a KL loss.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    _refuse(args)
    lengths = batch["response_lengths"]
    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=lengths,
        with_entropy=True,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    rows = found["log_probs"], batch["advantages"], batch["loss_masks"]
    logprob, advantages, mask = (pad_sequence(list(x), batch_first=True) for x in rows)
    out = turn_policy_loss(
        logprob,
        pad_sequence(list(old), batch_first=True) if old else None,
        advantages,
        mask=mask,
        reduction="none",
        clip_low=args.eps_clip,
        clip_high=args.eps_clip_high,
        dual_cap=args.eps_clip_c,
    )
    pg_loss = sum_of_sample_mean(torch.cat([x[:n] for x, n in zip(out.loss, lengths, strict=True)]))
    entropy = sum_of_sample_mean(torch.cat(list(found["entropy"])))
    loss = pg_loss - args.entropy_coef * entropy
    logged = {"loss": loss, "pg_loss": pg_loss, "entropy_loss": entropy}
    for name in ("clipped_low", "clipped_high", "approx_kl", "ratio_mean"):  # slime divides what is logged
        logged[name] = sum_of_sample_mean(out.metrics[name].expand(sum(lengths)))
    return loss, {name: value.detach().clone() for name, value in logged.items()}


def _refuse(args: Any) -> None:
    found = {
        "context_parallel_size > 1": getattr(args, "context_parallel_size", 1) > 1,
        "use_opsm": args.use_opsm,
        "use_tis or get_mismatch_metrics": args.use_tis or args.get_mismatch_metrics,
        "use_kl_loss": args.use_kl_loss,
    }
    if names := [name for name, on in found.items() if on]:
        raise ValueError(f"atpo_kernels.hosts.slime.policy_loss does not have {', '.join(names)}: switch it off")
