"""Sizes of a model that memory and time depend on, without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atpo_fast.config import Config


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model.

    Attributes:
        parameters: number of entries of all weights; tied ones count once.
        layers: number of decoder layers.
        hidden: width of the hidden states.
        inner: width of the MLP.
        vocabulary: number of words of the head.
        queries: width of the queries of one layer, all heads together.
        keys: width of the keys of one layer; that of the values is the same.
        attending: number of layers that have keys and values.
        largest: entries of the largest weight.
    """

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    queries: int
    keys: int
    attending: int
    largest: int

    @property
    def cached(self) -> int:
        """Entries of the keys and values of one token, over all layers."""
        return 2 * self.keys * self.attending


def model_size(config: Config) -> ModelSize:
    """Tell the sizes of the configured model without loading it. Raises what finding it raises."""
    import torch
    from transformers import AutoModelForCausalLM

    from atpo_fast.models.layers import describe_layers
    from atpo_fast.policy.model import find_model_file
    from atpo_fast.train.from_config import model_sizes

    path = config.model.path
    file = None if path is None else find_model_file(path, config.model.package)
    if file is not None and file.suffix == ".gguf":
        return _gguf_size(file)
    sizes = model_sizes(config.model)
    if path is None:
        words = {"world": config.world.entities + 64, "rooms": 2 * config.rooms.colours + 80}
        sizes.vocab_size = words.get(config.data.source, config.model.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    counts = [parameter.numel() for parameter in model.parameters()]
    attending = [layer for layer in describe_layers(sizes) if layer.attends]
    return ModelSize(
        parameters=sum(counts),
        layers=sizes.num_hidden_layers,
        hidden=sizes.hidden_size,
        inner=sizes.intermediate_size,
        vocabulary=sizes.vocab_size,
        queries=max((layer.query_heads * layer.head_dim for layer in attending), default=sizes.hidden_size),
        keys=max((layer.key_heads * layer.head_dim for layer in attending), default=sizes.hidden_size),
        attending=len(attending),
        largest=max(counts),
    )


def _gguf_size(file: Path) -> ModelSize:
    from atpo_fast.policy.gguf import open_gguf

    reader = open_gguf(file)
    name = reader.get_field("general.architecture").contents()

    def read(key: str, otherwise: int | None = None) -> int:
        field = reader.get_field(f"{name}.{key}")
        return otherwise if field is None and otherwise is not None else int(field.contents())

    counts = [int(tensor.n_elements) for tensor in reader.tensors]
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    layers, hidden, heads = read("block_count"), read("embedding_length"), read("attention.head_count")
    width = read("attention.key_length", hidden // heads)
    return ModelSize(
        parameters=sum(counts),
        layers=layers,
        hidden=hidden,
        inner=read("feed_forward_length"),
        vocabulary=int(embedding.shape[-1]),
        queries=heads * width,
        keys=read("attention.head_count_kv", heads) * width,
        attending=layers,
        largest=max(counts),
    )
