"""Send weights to vLLM engines on GPUs of their own, over NCCL, in buckets of bounded size.

See docs/design.md#weight-sync.

Each rank sends to its own engine: both form an NCCL group in which the rank is the source and the engine's workers
follow. The workers are told a bucket's names and shapes by RPC and receive while the rank sends.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from atpo_fast.engines.weight_stream import in_buckets

OLDEST = Version("0.28")  # earlier versions have another protocol
Named = tuple[str, Tensor]


class NCCLTransfer:
    """The NCCL connection that sends weights to the workers of one engine.

    Args:
        llm: the `vllm.LLM`, built with `weight_transfer_config={"backend": "nccl"}`.
        version: version of vLLM.
        workers: number of the engine's workers.
        bucket_bytes: bytes sent at once.

    Raises:
        ValueError: a vLLM whose workers speak another protocol.
    """

    def __init__(self, llm: Any, version: Version, workers: int, bucket_bytes: int):
        if version < OLDEST:
            raise ValueError(f"engine.placement=own_gpus needs vLLM >={OLDEST}, not {version}")
        self._llm, self._bucket_bytes = llm, bucket_bytes
        self._pool = ThreadPoolExecutor(max_workers=1)  # for calls that wait for us to do our part
        group = {"master_address": "127.0.0.1", "master_port": _free_port(), "world_size": workers + 1}
        join = import_module("vllm.distributed.weight_transfer.nccl_common").trainer_init
        self._group = self._meanwhile(
            "init_weight_transfer_engine",
            {"init_info": group | {"rank_offset": 1, "packed": False}},
            lambda: join(group),
        )

    def send(self, named_parameters: Iterable[Named]) -> None:
        """Send all weights; `named_parameters` may reuse a tensor's memory for the next."""
        copies = ((name, tensor.detach().contiguous().clone()) for name, tensor in named_parameters)
        self._llm.collective_rpc("start_weight_update")
        for bucket in in_buckets(copies, lambda item: item[1].nbytes, self._bucket_bytes):
            description = {
                "names": [name for name, _ in bucket],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
            }
            self._meanwhile("update_weights", {"update_info": description}, partial(self._broadcast, bucket))
        self._llm.collective_rpc("finish_weight_update")

    def _broadcast(self, bucket: Sequence[Named]) -> None:
        stream = torch.cuda.current_stream()
        for _, tensor in bucket:
            self._group.broadcast(tensor, src=0, stream=stream)
        stream.synchronize()  # the bucket's memory is about to be freed

    def _meanwhile(self, method: str, arguments: dict[str, Any], ours: Callable[[], Any]) -> Any:
        """Call the workers and do our part meanwhile; an error of theirs that comes at once is raised before ours."""
        theirs = self._pool.submit(self._llm.collective_rpc, method, kwargs=arguments)
        if theirs.done():
            theirs.result()
        result = ours()
        theirs.result()
        return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
