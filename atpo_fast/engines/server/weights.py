"""Give weights to servers through a Hugging Face folder on storage that they see too.

Over HTTP vLLM takes weights from a path only (`POST /collective_rpc` with `reload_weights`); its other transfers need
the trainer and the server in one NCCL group or on one device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from atpo_fast.common.files import replacing
from atpo_fast.engines.weight_stream import in_buckets

_INDEX = "model.safetensors.index.json"


def write_weights(
    named_parameters: Iterable[tuple[str, Tensor]], config: PretrainedConfig, folder: Path, bucket_bytes: int
) -> None:
    """Write a Hugging Face folder, one file for each bucket. Memory holds one bucket at a time.

    The folder appears when it is complete, and replaces one of the same name.

    Raises:
        OSError: the folder cannot be written.
    """
    copies = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in named_parameters)
    with replacing(folder) as partial:
        partial.mkdir()
        places: dict[str, str] = {}
        total = 0
        for number, bucket in enumerate(in_buckets(copies, lambda item: item[1].nbytes, bucket_bytes), start=1):
            file = f"model-{number:05d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in bucket}, partial / file, metadata={"format": "pt"})
            places |= dict.fromkeys((name for name, _ in bucket), file)
            total += sum(tensor.nbytes for _, tensor in bucket)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (partial / _INDEX).write_text(json.dumps(index, indent=1))
        config.save_pretrained(partial)


def folder_weights(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter in a Hugging Face folder.

    Raises:
        FileNotFoundError: it has no safetensors files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files, so its weights cannot be given to the servers")
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, file.get_tensor(name)


def shared_outcome(outcome: list[str] | Exception) -> list[str]:
    """Share the outcome of rank 0, addresses or an error, with every rank; a collective that ignores that of others.

    Raises:
        Exception: the error on rank 0, and a RuntimeError with its words on the others.
    """
    if dist.is_initialized():
        box = [str(outcome) if isinstance(outcome, Exception) else outcome]
        dist.broadcast_object_list(box, src=0)
        if dist.get_rank() != 0:
            outcome = RuntimeError(f"rank 0 failed: {box[0]}") if isinstance(box[0], str) else box[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
