"""Triton kernels of `turn_policy_loss`: one launch for the loss of every token, one for the sums.

For each token, with W+, W- and W0 its weights, rho the ratio of its group (token, turn or sequence) and g+, g- the clip
family (docs/design.md#objective):

    loss = trust (W- g-(rho) - W+ g+(rho)) + kl_coef W0 KL - entropy_coef W0 entropy
    rho = exp(min(mean of logprob - old_logprob over the group, max_log_ratio))
    grad_logprob = trust (W- rho g-'(rho) - W+ rho g+'(rho)) + kl_coef W0 dKL/dlogprob

The ratio is differentiated straight through: d rho / d logprob = rho for each token of its group, 0 over the cap. What
is None (a pointer, dual_cap) is left out when a kernel is compiled. `terms` has these
formulas, `packed` and `padded` bring them to the tokens of a turn or row, `paths` has ratio level "sequence" on packed
turns, and `sums` the loss and the metrics of all tokens.

Prediction for an H200, not measured: 65,536 tokens move 60 bytes each at the most (all inputs, outputs and scratch),
4 MB, below 1 us at 4.8 TB/s; so the time is latency. All programs (437 turns of 150 tokens, or 64 rows of 1024) run at
once on the 132 multiprocessors. A turn waits for memory some four times in a row (offsets, log-probs, weights, the same
again in the reduction), 0.8 us each, and sums over its threads ten times, 0.1 us each; with 2 to 3 us to start each of
two kernels that is about 10 us. A row adds two scans and one more wait per block, about 15 us for rows of up to 2048.
Longer rows and turns go block by block, some 3 us a block of 2048 of a row and 2 us of a turn: 4 rows of 16,384 take
about 30 us, and one turn of 65,536 some 60 us.
"""

from __future__ import annotations

from atpo_kernels.turn_policy_loss.kernels.packed import _turns_kernel
from atpo_kernels.turn_policy_loss.kernels.padded import _rows_kernel
from atpo_kernels.turn_policy_loss.kernels.paths import _leaf_kernel, _turn_sums_kernel
from atpo_kernels.turn_policy_loss.kernels.sums import _finish_kernel

__all__ = ["_finish_kernel", "_leaf_kernel", "_rows_kernel", "_turn_sums_kernel", "_turns_kernel"]
