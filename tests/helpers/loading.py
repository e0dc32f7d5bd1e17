"""Work of test_loading.py: ranks that load models under ZeRO-3, what they then hold, and how much they held."""

from __future__ import annotations

import ctypes
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from atpo_fast.config import Config, ModelConfig
from atpo_fast.policy import load_model
from atpo_fast.train.loading import load_for_training
from atpo_fast.train.zero import deepspeed_config, join_process_group

ZERO3 = str(Path(__file__).resolve().parents[2] / "configs/deepspeed/zero3.json")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def settings(dtype: str) -> Config:
    """A configuration of ZeRO-3."""
    return Config(deepspeed=ZERO3, model=ModelConfig(dtype=dtype))  # type: ignore[arg-type]


class PeakMemory:
    """The most bytes of its own that the process has had beyond those at the start; pages of mapped files aside."""

    def __init__(self) -> None:
        self._before = self._peak = _own_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._peak = max(self._peak, _own_bytes())
            time.sleep(0.001)

    def end(self) -> int:
        """Stop watching; returns the bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak - self._before


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have all weights of a partitioned model whole."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def measure(folder: Path, out: Path) -> None:
    """Load the models below a folder in float32; write the peak of this rank, and check each weight against the file.

    What `load_for_training` has not partitioned is partitioned while the peak is watched, as DeepSpeed's engine does.
    """
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back at once, so only what is held counts
    join_process_group(cuda=False)
    config, peaks = settings("float32"), {}
    for stored in sorted(folder.iterdir()):
        gc.collect()
        dist.barrier()
        peak = PeakMemory()
        model = load_for_training(config, stored)
        deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config(ZERO3, config.model, config.optim))
        peaks[stored.name] = peak.end()
        with safe_open(stored / "model.safetensors", "pt") as file:
            names = dict(model.named_parameters())
            assert names.keys() == set(file.keys())
            for name, parameter in names.items():
                with deepspeed.zero.GatheredParameters([parameter]):
                    assert torch.equal(parameter, file.get_tensor(name).float()), name
        del model, parameter, names
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(peaks))


def compare(folder: Path) -> None:
    """Load the models below a folder as they are trained and as transformers does; weights are the same to the bit.

    Each rank compares one dtype: what it gathers are the shares of both.
    """
    join_process_group(cuda=False)
    for stored in sorted(folder.iterdir()):
        for rank, dtype in enumerate((torch.float32, torch.bfloat16)):
            mine = load_for_training(settings(str(dtype).removeprefix("torch.")), stored)
            assert all(hasattr(parameter, "ds_id") for parameter in mine.parameters()), stored
            if rank == dist.get_rank():
                same(mine, load_model(stored, dtype), dtype)
            else:
                with gathered(mine):
                    pass


def same(mine: PreTrainedModel, other: PreTrainedModel, dtype: torch.dtype) -> None:
    """Fail unless a model has weights, ties and buffers of a whole one in a dtype, and its logits but for rounding."""
    for parameter in other.parameters():  # DeepSpeed's engine does it to what transformers keeps in float32
        parameter.data = parameter.data.to(dtype)
    theirs = dict(other.named_parameters())
    with gathered(mine), torch.no_grad():
        found = dict(mine.named_parameters())
        assert list(found) == list(theirs)
        for name, value in theirs.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        buffers = dict(other.named_buffers())
        assert dict(mine.named_buffers()).keys() == buffers.keys()
        for name, buffer in mine.named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
        if dtype == torch.float32:
            found_logits, logits = mine(input_ids=IDS).logits, other(input_ids=IDS).logits
            # Products round by where their operands lie in memory: equal weights give equal logits but for rounding.
            assert (found_logits - logits).abs().max() <= 1e-4 * logits.abs().max(), name
