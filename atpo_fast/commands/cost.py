"""What a training will cost, said before it starts: parameters, memory of a rank, hours.

The numbers are estimates: how long trajectories will be is not known, so times are told for responses of a quarter of
their limit and for all of it. The speed of this machine is measured by one product of matrices in the model's dtype.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from atpo_fast.common.errors import AtpoError
from atpo_fast.config import Config, read_deepspeed

_UPDATE_EFFICIENCY = 0.5  # share of a plain product's rate that forward and backward reach (measured on a CPU: 0.4-0.6)
_DECODE_EFFICIENCY = 0.25  # the same for decoding, whose batches are small
_ACTIVATION_WIDTHS = 12  # tensors of the hidden width that a layer keeps for the backward, in the model's dtype
_ACTIVATION_INNER = 7  # and of the inner width of its MLP
_SHORT = 0.25  # share of the longest response of which the shorter estimate is


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model that its cost depends on."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int


def cost_lines(config: Config) -> list[str]:
    """Estimate what `train` will take, a line each; one line that says why where the model's size cannot be told."""
    try:
        size = model_size(config)
    except (AtpoError, OSError, ValueError) as error:
        return [f"time and memory: unknown, because {str(error).splitlines()[0]}"]
    return [
        f"model: {size.parameters / 1e6:,.1f} M parameters, {_dtype(config)}{_adapters(config, size)}",
        f"memory of a rank: about {memory_gb(config, size):.1f} GB "
        f"(weights, gradients, AdamW, the engine's copy, one row of {config.train.row_tokens} tokens)",
        _time_line(config, size),
    ]


def model_size(config: Config) -> ModelSize:
    """Tell the sizes of the configured model without loading it. Raises what finding it raises."""
    import torch
    from transformers import AutoModelForCausalLM

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
    count = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(count, sizes.num_hidden_layers, sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size)


def memory_gb(config: Config, size: ModelSize) -> float:
    """Estimate the memory of a rank while it updates, in GB (1e9 bytes)."""
    ranks = max(1, config.ranks)
    stage = int(read_deepspeed(config).get("zero_optimization", {}).get("stage", 0))
    bytes_each = 2 if _dtype(config) == "bfloat16" else 4
    weights, gradients = bytes_each / (ranks if stage >= 3 else 1), bytes_each / (ranks if stage >= 2 else 1)
    optimizer = (12 if bytes_each == 2 else 8) / (ranks if stage >= 1 else 1)
    trained = trained_parameters(config, size)
    states = size.parameters * (weights + bytes_each) + trained * (gradients + optimizer)  # and the engine's copy
    kept = 1 if config.model.gradient_checkpointing == "layer" else size.layers
    layer = _ACTIVATION_WIDTHS * size.hidden + _ACTIVATION_INNER * size.inner
    activations = config.train.row_tokens * bytes_each * (kept * layer + size.layers * size.hidden)
    return (states + activations) / 1e9


def trained_parameters(config: Config, size: ModelSize) -> int:
    """Estimate how many parameters are trained: all, or adapters on all linear layers, none of which is narrow."""
    lora = config.model.lora
    if not lora.rank:
        return size.parameters
    return size.layers * lora.rank * (8 * size.hidden + 3 * (size.hidden + size.inner))


def training_flops(config: Config, size: ModelSize, share: float) -> tuple[float, float]:
    """Estimate (FLOPs of prefill and updates, FLOPs of decoding), for responses of a share of their longest."""
    rollout, train, cold = config.rollout, config.train, config.cold_start
    prompt, response = config.data.max_prompt_tokens, rollout.max_response_tokens * share
    written = rollout.leaves * response / 2  # of a tree: leaves share prefixes, and half of a response is results
    tree = prompt + rollout.leaves * response * 0.7
    questions = train.steps * train.questions_per_step
    forwards = 2 if train.old_logprobs == "recompute" else 1
    update = questions * tree * (2 + 2 * (forwards - 1) + 6)  # prefill, old log-probs, forward and backward
    demonstrations = cold.asks_for_demonstrations or config.data.source != "files"
    if cold.precedes_rl(demonstrations=demonstrations, given_model=config.model.path is not None):
        update += cold.steps * cold.batch_size * (prompt + response) * 6
    own = (config.rooms if config.data.source == "rooms" else config.world).eval_questions
    evaluations = 2 + (train.steps // train.eval_every if train.eval_every else 0)
    answered = evaluations * (config.data.max_eval_questions or own)
    update += answered * (prompt + response / 2) * 2
    return size.parameters * update, size.parameters * 2 * (questions * written + answered * response / 2)


def _adapters(config: Config, size: ModelSize) -> str:
    rank, trained = config.model.lora.rank, trained_parameters(config, size)
    return f"; trained: LoRA of rank {rank}, up to {trained / 1e6:,.1f} M" if rank else ""


def _time_line(config: Config, size: ModelSize) -> str:
    if config.device == "cuda" or (config.device == "auto" and _sees_gpu()):
        return "time: not estimated on a GPU"
    rate = product_rate(_dtype(config))
    seconds = []
    for share in (_SHORT, 1.0):
        update, decode = training_flops(config, size, share)
        seconds.append(update / (rate * _UPDATE_EFFICIENCY) + decode / (rate * _DECODE_EFFICIENCY))
    return (
        f"time on this machine: {_duration(seconds[0])} to {_duration(seconds[1])}, for responses of a quarter of and "
        f"of all of rollout.max_response_tokens; {rate / 1e9:,.0f} GFLOP/s measured now"
    )


def product_rate(dtype: str) -> float:
    """Measure the FLOP/s of a product of matrices on this machine's CPU, in a third of a second."""
    import torch

    left, right = (torch.randn(1024, 1024, dtype=getattr(torch, dtype)) for _ in range(2))
    torch.mm(left, right)
    begun, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < 0.3 or products < 2:
        torch.mm(left, right)
        products += 1
    return products * 2 * 1024**3 / seconds


def _dtype(config: Config) -> str:
    from atpo_fast.policy.model import fast_dtype

    if config.model.dtype != "auto":
        return config.model.dtype
    return fast_dtype(cuda=config.device != "cpu" and _sees_gpu())


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gguf_size(file: Path) -> ModelSize:
    from atpo_fast.policy.gguf import open_gguf

    reader = open_gguf(file)
    name = reader.get_field("general.architecture").contents()

    def read(key: str) -> int:
        return int(reader.get_field(f"{name}.{key}").contents())

    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    count = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return ModelSize(
        count, read("block_count"), read("embedding_length"), read("feed_forward_length"), int(embedding.shape[-1])
    )


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours"
