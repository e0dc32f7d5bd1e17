"""Memory of a rank by component, and the most of it in each phase of a step (docs/performance.md#plan-a-run).

What the layers keep for the backward is counted tensor by tensor for a decoder of RMSNorms, rotary attention with
normalised queries and keys, and a gated MLP. Other architectures keep about as much. The plan is compared with
measurements by `python -m bench.systems.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atpo_fast.config import Config, PagedConfig, ServerConfig, VLLMConfig, read_deepspeed
from atpo_fast.config.arithmetic import longest_path
from atpo_fast.train.plan.sizes import ModelSize

ROLLOUT, HEAD, LAYERS, STEP = "rollout", "head and loss", "backward of the layers", "optimizer step"
PHASES = (ROLLOUT, HEAD, LAYERS, STEP)
_UPDATE = (HEAD, LAYERS, STEP)
_ROW = (HEAD, LAYERS)
_FLOAT32 = 4
_MOMENTS = 2 * _FLOAT32  # bytes of the two moments of AdamW
_BUCKET_ELEMENTS = 5e8  # of DeepSpeed, where its file says nothing
_LIVE_ELEMENTS = 1e9
_MLP_TENSORS = 4  # of the inner width that a gated MLP keeps: gate, its activation, the other half, their product


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a rank's memory.

    Attributes:
        name: what it is.
        bytes: its size.
        phases: phases of a step in which it is there.
        on_host: whether it lies in the host's memory, whatever the device.
    """

    name: str
    bytes: float
    phases: tuple[str, ...] = PHASES
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The components of a rank's memory."""

    components: tuple[Component, ...]

    def during(self, phase: str, *, on_host: bool = False) -> float:
        """Add up the bytes of a phase, on the device or on the host."""
        return sum(c.bytes for c in self.components if phase in c.phases and c.on_host == on_host)

    @property
    def peak(self) -> float:
        """Most bytes on the device in any phase."""
        return max(self.during(phase) for phase in PHASES)

    @property
    def peak_phase(self) -> str:
        """Phase with the most bytes on the device."""
        return max(PHASES, key=self.during)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the components depend on: the model, its dtype, DeepSpeed's file, the ranks."""

    config: Config
    size: ModelSize
    zero: dict[str, Any]
    ranks: int
    itemsize: int
    on_gpu: bool

    @property
    def stage(self) -> int:
        """Stage of ZeRO."""
        return int(self.zero.get("stage", 0))

    def share(self, stage: int) -> int:
        """Return by how many ranks is divided what ZeRO partitions from a stage on."""
        return self.ranks if self.stage >= stage else 1

    def on_host(self, part: str) -> bool:
        """Tell whether a part of the state (`optimizer`, `param`) is offloaded."""
        return self.on_gpu and self.zero.get(f"offload_{part}", {}).get("device", "none") != "none"


def plan_memory(config: Config, size: ModelSize, *, ranks: int, dtype: str, on_gpu: bool) -> MemoryPlan:
    """Plan the memory of each of so many ranks. Raises ConfigError when the DeepSpeed file cannot be read."""
    zero = read_deepspeed(config).get("zero_optimization", {})
    setting = _Setting(config, size, zero, max(1, ranks), 2 if dtype == "bfloat16" else 4, on_gpu)
    components = [*_states(setting), *_communication(setting), *_activations(setting), *_reference(setting)]
    return MemoryPlan(tuple(c for c in [*components, *_engine(setting)] if c.bytes))


def trained_parameters(config: Config, size: ModelSize) -> int:
    """Estimate how many parameters are trained: all, or adapters on all linear layers, none of which is narrow."""
    rank = config.model.lora.rank
    return size.layers * rank * (8 * size.hidden + 3 * (size.hidden + size.inner)) if rank else size.parameters


def row_token_bytes(config: Config, size: ModelSize, itemsize: int) -> tuple[float, float]:
    """Return the bytes of one token of a row: what all layers keep, and what the one that is differentiated needs."""
    layer, inner = _layer_bytes(size, itemsize), size.inner * itemsize  # gradients of one inner tensor live at a time
    choices = {
        "none": (size.layers * layer, inner),
        "layer": (size.layers * size.hidden * itemsize, layer + inner),
        "mlp": (size.layers * (layer - _MLP_TENSORS * inner), (_MLP_TENSORS + 1) * inner),
    }
    return choices[config.model.gradient_checkpointing]


# --- components --------------------------------------------------------------------------------------------------


def _states(s: _Setting) -> list[Component]:
    """Count weights, gradients, master weights and moments of the policy."""
    whole, trained = s.size.parameters, trained_parameters(s.config, s.size)
    has_master = s.stage >= 1 or s.itemsize == 2  # DeepSpeed copies the weights in float32 too, from stage 1 on
    gradients = trained * s.itemsize / s.share(2)
    flat = trained / s.share(1)  # entries that this rank updates, as one tensor from stage 1 on
    largest = flat if s.stage >= 1 else min(s.size.largest, trained)
    temporary = largest * (_FLOAT32 if s.on_gpu else 2 * _FLOAT32)  # of AdamW: root of a moment, and the quotient
    converted = flat * _FLOAT32 if has_master else 0  # gradients of this rank in float32
    host = s.on_host("optimizer")
    kept_gradients = s.stage in (0, 3) or (s.stage == 2 and s.itemsize == 4)  # else freed as they are joined
    return [
        Component("weights", whole * s.itemsize / s.share(3), on_host=s.on_host("param")),
        Component("gradients", gradients, _UPDATE if kept_gradients else _ROW),
        Component("master weights", flat * _FLOAT32 if has_master else 0, on_host=host),
        Component("moments of AdamW", flat * _MOMENTS, on_host=host),
        Component("gradients in float32", converted, (STEP,), on_host=host),
        Component("temporaries of AdamW", 0 if host else temporary, (STEP,)),
    ]


def _communication(s: _Setting) -> list[Component]:
    """Count buffers of DeepSpeed, whose size has nothing to do with the model's, and weights gathered under ZeRO-3.

    The buffers are as large as the largest bucket allowed; on a CPU what is not filled takes no memory.
    """
    if s.stage < 1:
        return []
    trained = trained_parameters(s.config, s.size)
    elements = float(s.zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
    filled = min(elements, trained)
    kept = {1: 0, 2: 2 if s.zero.get("overlap_comm") else 1, 3: 1}[s.stage]
    sent = filled * s.itemsize if s.stage == 1 else 0.0
    sent += filled * _FLOAT32 if s.itemsize == 2 else 0.0  # what ranks send one another is in float32
    live = min(s.size.parameters, float(s.zero.get("stage3_max_live_parameters", _LIVE_ELEMENTS)))
    several = s.ranks > 1
    return [
        Component("buckets of gradients", kept * (elements if s.on_gpu else filled) * s.itemsize, _UPDATE),
        Component("a bucket on its way", sent if several else 0.0, (LAYERS,)),
        Component("gathered weights", live * s.itemsize if s.stage == 3 and several else 0.0, _ROW),
    ]


def _activations(s: _Setting) -> list[Component]:
    """Count what a row keeps for its backward, what head and layers work with, and keys and values of opened rows."""
    tokens = s.config.train.row_tokens
    kept, layer = row_token_bytes(s.config, s.size, s.itemsize)
    return [
        Component("activations of a row", tokens * kept, _ROW),
        Component("one layer's backward", tokens * layer, (LAYERS,)),
        Component("head: logits of a chunk, gradients", _head_bytes(s, tokens), (HEAD,)),
        Component("keys and values of opened rows", _prefix_bytes(s), _ROW),
    ]


def _reference(s: _Setting) -> list[Component]:
    """Count the reference policy of a KL term; adapters switched off are one without a copy."""
    from atpo_fast.train.from_config import make_objective

    config = s.config
    if not make_objective(config).loss_config.needs_reference:
        return []
    if config.model.lora.rank and config.model.reference_path is None:
        return []
    weights = s.size.parameters * s.itemsize / s.share(3)
    master = s.size.parameters * _FLOAT32 / s.share(1) if s.stage >= 1 or s.itemsize == 2 else 0
    return [
        Component("reference policy", weights, on_host=s.on_host("param")),
        Component("reference policy, master weights", master, on_host=s.on_host("optimizer")),
    ]


def _engine(s: _Setting) -> list[Component]:
    """Count the inference engine in this process: its weights, and its cache of keys and values."""
    engine = s.config.engine
    if isinstance(engine, ServerConfig) or (isinstance(engine, VLLMConfig) and engine.placement == "own_gpus"):
        return []
    itemsize = _FLOAT32 if engine.cache_dtype == "float32" else s.itemsize
    parts = engine.tensor_parallel if isinstance(engine, VLLMConfig) else 1
    weights, cache = s.size.parameters * itemsize / parts, engine.cache_tokens * s.size.cached * itemsize / parts
    beside = s.config.train.max_staleness > 0  # then it samples while the policy learns
    asleep = not beside and (isinstance(engine, PagedConfig) or engine.sleep != "off")
    leaves = asleep and s.on_gpu  # on a CPU the weights stay where they are
    dropped = isinstance(engine, VLLMConfig) and engine.sleep == "drop"
    away = 0.0 if not leaves or dropped else weights
    return [
        Component("engine: weights", weights, (ROLLOUT,) if leaves else PHASES),
        Component("engine: weights while it sleeps", away, _UPDATE, on_host=True),
        Component("engine: cache of keys and values", cache, (ROLLOUT,) if asleep else PHASES),
    ]


# --- bytes -------------------------------------------------------------------------------------------------------


def _layer_bytes(size: ModelSize, itemsize: int) -> float:
    """Return the bytes that a decoder layer keeps for the backward of one token.

    Two norms over the hidden states, norms of queries and keys, the rotated queries and keys, the values, the output
    of attention twice (as attention and as the projection have it), and four inner tensors of the MLP.
    """
    norms = 2 * _norm_bytes(size.hidden, itemsize) + _qk_norm_bytes(size, itemsize)
    return norms + itemsize * (3 * size.queries + 2 * size.keys + _MLP_TENSORS * size.inner)


def _norm_bytes(width: int, itemsize: int) -> float:
    """Return what an RMSNorm and the products behind it keep: its input in float32, normalised, and its output."""
    return width * (_FLOAT32 + 2 * itemsize)


def _qk_norm_bytes(size: ModelSize, itemsize: int) -> float:
    """Return what the norms of queries and keys keep: inputs in float32, and normalised."""
    return (size.queries + size.keys) * (_FLOAT32 + itemsize)


def _head_bytes(s: _Setting, tokens: int) -> float:
    """Return the working memory of the last norm and the head, whose chunk of logits has the rows that it chooses.

    Every token is taken for one of an action: rows of hidden states, their gradients, and that of the head's weight.
    """
    import torch

    from atpo_kernels.linear_logprob.tiles import torch_rows

    size, device = s.size, torch.device("cuda" if s.on_gpu else "cpu")
    dtype = torch.bfloat16 if s.itemsize == 2 else torch.float32
    rows = min(tokens, torch_rows(size.vocabulary, dtype, device))
    weight = 0 if s.config.model.lora.rank else size.vocabulary * size.hidden
    hidden = tokens * (2 * size.hidden * s.itemsize + _norm_bytes(size.hidden, s.itemsize))
    return hidden + (rows * size.vocabulary + weight) * s.itemsize


def _prefix_bytes(s: _Setting) -> float:
    """Return what the rows above an opened row keep, at most: of a tree that fits no row, within the memory allowed."""
    from atpo_fast.train.from_config import make_objective

    config = s.config
    if make_objective(config).whole_trajectories:
        return 0.0
    token = s.size.cached * (2 * s.itemsize + _FLOAT32) + s.size.layers * s.size.hidden * s.itemsize
    tree = config.data.max_prompt_tokens + config.rollout.leaves * config.rollout.max_response_tokens
    beyond = min(longest_path(config), max(0, tree - config.train.row_tokens))
    return min(config.train.prefix_memory_gb * 1e9, beyond * token)
