"""Random models of other architectures than Qwen3 (`model.architecture`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config

from atpo_fast.config import load_config
from atpo_fast.config.model import ModelConfig
from atpo_fast.policy.attention import prefix_token_bytes
from atpo_fast.train.from_config import build_model, model_sizes
from tests.helpers.small_tokenizers import word_level

ROOT = Path(__file__).parents[2]
DELTA: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}


def test_a_random_model_of_another_architecture() -> None:
    """Fails if the sizes of the section, or the fields of the architecture, do not reach the model."""
    config = ModelConfig(dtype="float32", hidden_size=32, architecture={"model_type": "qwen3_5_text"} | DELTA)
    model = build_model(config, word_level(), seed=0)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert [layer.block_type for layer in model.model.layers] == ["linear_attention"] * 3 + ["full_attention"]
    assert model.model.layers[0].linear_attn.num_v_heads == 4 and model.config.hidden_size == 32
    assert build_model(ModelConfig(dtype="float32"), word_level(), seed=0).config.model_type == "qwen3"


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "qwen3_6"}, "transformers has no model_type qwen3_6"),
        ({"model_type": "lfm2", "conv_cache": 3}, "conv_cache: no field of the configuration of lfm2"),
        ({"hidden_size": 64}, "hidden_size: .* or one of the sizes that other keys of the section model set"),
    ],
)
def test_mistakes_in_an_architecture_are_named(architecture: dict[str, Any], message: str) -> None:
    """Fails if a misspelt field is ignored, as transformers does, or a size is set twice."""
    with pytest.raises(ValueError, match=rf"model\.architecture: {message}"):
        build_model(ModelConfig(dtype="float32", architecture=architecture), word_level(), seed=0)


def test_an_architecture_beside_a_path_is_refused() -> None:
    """Fails if the fields are silently not those of the model that is loaded."""
    with pytest.raises(ValueError, match=r"model\.path names one: leave one out"):
        ModelConfig(path="folder", architecture={"model_type": "lfm2"})


def test_the_sizes_of_a_multimodal_model_are_those_of_its_text_part(tmp_path: Path) -> None:
    """Fails if a folder of Qwen3.5, whose configuration has one for text and one for vision, has no sizes."""
    Qwen3_5Config(text_config={"hidden_size": 64, "num_hidden_layers": 8}).save_pretrained(tmp_path)
    sizes = model_sizes(ModelConfig(path=str(tmp_path)))
    assert (sizes.model_type, sizes.hidden_size) == ("qwen3_5_text", 64)
    attending, key_heads, width, every = 2, sizes.num_key_value_heads, sizes.head_dim, 8 * 64 * 4
    assert prefix_token_bytes(sizes, torch.float32) == attending * 2 * key_heads * width * 12 + every


def test_an_architecture_on_the_command_line() -> None:
    """Fails if an override is mixed with the fields of the file, which belong to another model type."""
    config = load_config(ROOT / "configs/quickstart_hybrid.yaml", ["model.architecture={model_type: lfm2}"])
    assert config.model.architecture == {"model_type": "lfm2"}
