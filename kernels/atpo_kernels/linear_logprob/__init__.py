"""Log-prob and entropy of target tokens straight from hidden states, without the (A, V) logits.

See docs/design.md#operators.
"""

from __future__ import annotations

from torch import Tensor

from atpo_kernels.checks import check_linear
from atpo_kernels.devices import eager, kernel_context
from atpo_kernels.dispatch import choose
from atpo_kernels.linear_logprob.reference import linear_logprob_reference
from atpo_kernels.linear_logprob.torch_impl import linear_logprob_torch
from atpo_kernels.records import HeadOptions

__all__ = ["linear_logprob"]


@eager
def linear_logprob(
    hidden: Tensor,  # (A, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (A,) int64 or int32
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # (A,), (A,)
    """Compute the log-prob of `targets` and the entropy, in nats, of softmax((hidden @ weight.T + bias) / temperature).

        log_softmax = (F.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
        return log_softmax.gather(-1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)

    Both outputs are float32 for float32, bfloat16 and float16 inputs and float64 for float64 ones, and differentiable
    in `hidden`, `weight` and `bias`. Logits and statistics are float32 (float64) whatever the input dtype. Logits of
    a chunk of rows exist at a time, and the backward recomputes them. A = 0 is allowed. Autocast has no effect here.

    `softcap` c, positive, makes the logits c * tanh(x / c) before the temperature (Gemma 2).

    `impl`: "auto" (Triton on CUDA, but for float64 and soft caps; else "torch"), "torch" (chunks of rows), "reference"
    (materialises (A, V)), "triton". Triton computes the logits once without gradients, and again in chunks for
    them; its results are the same bits every time.

    Raises ValueError for shapes, dtypes, devices or targets that do not fit, and for a weight without elements (a
    parameter that ZeRO-3 holds in parts: call this inside the forward of the module that owns the weight).
    """
    check_linear("linear_logprob", hidden, weight, targets, bias, HeadOptions(temperature, softcap))
    paths = {"torch": linear_logprob_torch, "reference": linear_logprob_reference}
    impl = "torch" if impl == "auto" and softcap is not None else impl  # no kernel has it
    run = choose("linear_logprob", impl, hidden.device, paths, hidden.dtype)
    with kernel_context(hidden):
        return run(hidden, weight, targets.long(), bias, HeadOptions(temperature, softcap))
