"""`turn_policy_loss` on Triton kernels: one launch for the loss of every token, one for the sums.

Prediction for an H200, not measured: 65,536 tokens move 60 bytes each at the most (all inputs, outputs and scratch),
4 MB, below 1 us at 4.8 TB/s; so the time is latency. All programs (437 turns of 150 tokens, or 64 rows of 1024) run at
once on the 132 multiprocessors. A turn waits for memory some four times in a row (offsets, log-probs, weights, the same
again in the reduction), 0.8 us each, and sums over its threads ten times, 0.1 us each; with 2 to 3 us to start each of
two kernels that is about 10 us. A row adds two scans and one more wait per block, about 15 us for rows of up to 2048.
Longer rows and turns go block by block, some 3 us a block of 2048 of a row and 2 us of a turn: 4 rows of 16,384 take
about 30 us, and one turn of 65,536 some 60 us.

`PackedLoss` is the packed layout in ranges of turns, for callers that compute the log-probs chunk by chunk.
"""

from __future__ import annotations

import torch

from atpo_kernels.turn_policy_loss.layout import LossArguments
from atpo_kernels.turn_policy_loss.torch_path import Evaluation
from atpo_kernels.turn_policy_loss.triton_packed import PackedLoss
from atpo_kernels.turn_policy_loss.triton_padded import padded_launches
from atpo_kernels.turn_policy_loss.triton_variants import variants

__all__ = ["PackedLoss", "turn_policy_loss", "variants"]


@torch.no_grad()
def turn_policy_loss(arguments: LossArguments) -> Evaluation:
    """See `atpo_kernels.turn_policy_loss`.

    Two launches; level "sequence" on packed turns has two more kernels, and sorts its table of paths. A tensor that is
    not contiguous is copied first.
    """
    turn_offsets, inputs = arguments.structure.turn_offsets, arguments.inputs
    if turn_offsets is not None:
        loss = PackedLoss.prepare(arguments)
        loss.turns(0, turn_offsets.numel() - 1, inputs.logprob, inputs.entropy)
        return loss.finish()
    outputs, launches = padded_launches(arguments)
    for launch in launches:
        launch.run()
    return outputs.evaluation()
