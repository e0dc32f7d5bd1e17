"""Qwen3 models of random weights, and what their work is in FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3 model with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int = 151936

    @property
    def layer_weights(self) -> int:
        """Number of entries of one layer's matrices."""
        width = self.head_dim * (2 * self.heads + 2 * self.key_heads)
        return self.hidden * (width + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """Number of entries of all matrices."""
        return self.layers * self.layer_weights + self.vocab * self.hidden


# 20m: head and attention have about the share of the work that they have in 4b at the published lengths, when lengths
# are divided by 8 to 16.
SHAPES = {
    "tiny": Shape(hidden=32, intermediate=64, layers=2, heads=4, key_heads=2, head_dim=16, vocab=512),  # for rehearsals
    "qwen3-20m": Shape(hidden=384, intermediate=1216, layers=8, heads=12, key_heads=6, head_dim=64, vocab=5120),
    "qwen3-0.6b": Shape(hidden=1024, intermediate=3072, layers=28, heads=16, key_heads=8, head_dim=128),
    "qwen3-1.7b": Shape(hidden=2048, intermediate=6144, layers=28, heads=16, key_heads=8, head_dim=128),
    "qwen3-4b": Shape(hidden=2560, intermediate=9728, layers=36, heads=32, key_heads=8, head_dim=128),
}
_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12}  # dense bfloat16, by name of the GPU


@dataclass(frozen=True, slots=True)
class Work:
    """Numbers of tokens, pairs and head rows that a layout of a forest gives a model to compute."""

    tokens: int
    pairs: int  # number of pairs of a query and a key that it sees
    head_rows: int

    def flops(self, shape: Shape, layers: int, head: bool) -> dict[str, float]:
        """Count a forward and a backward, nothing computed twice; MFU is their sum over time and the GPU's peak.

        layers     6 * tokens * weights: a product forward, two backward, of 2 FLOPs an entry
        attention  12 * pairs * heads * head_dim: scores and output forward, four products of that size backward
        head       6 * rows * D * V, without `head` 0
        """
        return {
            "layers": 6.0 * self.tokens * shape.layer_weights * layers,
            "attention": 12.0 * self.pairs * shape.heads * shape.head_dim * layers,
            "head": 6.0 * self.head_rows * shape.hidden * shape.vocab * head,
        }


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of this machine's GPU; None for one that is not listed."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def build(shape: Shape, layers: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Make a `Qwen3ForCausalLM` where it will be, the same in every run on one kind of device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype)
