"""The vllm engine's placements on GPUs, with a stand-in for vLLM: who is called when (no vLLM needed)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import deepspeed
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast.config import VLLMConfig
from atpo_fast.engines.vllm import engine as vllm_engine
from atpo_fast.engines.vllm.engine import VLLMEngine
from atpo_fast.engines.vllm.start import llm_options, start_llm
from atpo_fast.train.weights import whole_parameters
from tests.helpers.small_tokenizers import byte_level

TOKENIZER = byte_level()
SIZES = dict(vocab_size=336, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class StandIn:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        cache = SimpleNamespace(block_size=16)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def collective_rpc(self, method: str, kwargs: dict[str, Iterable[Any]] | None = None) -> None:
        weights = "" if kwargs is None else f" {len(list(kwargs['weights']))}"
        self.calls.append(method + weights)

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append("wake " + " ".join(tags))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


Make = Callable[..., tuple[VLLMEngine, list[str]]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An engine on a GPU that is not there, and the list of calls."""
    Qwen3Config(**SIZES).save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_engine, "check_vllm", lambda: Version("0.32.0"))

    def made(
        sleep: Literal["off", "host", "drop"], device: torch.device = CUDA, **options: Any
    ) -> tuple[VLLMEngine, list[str]]:
        llm = StandIn()
        monkeypatch.setattr(vllm_engine, "start_llm", lambda *_: (None, llm))
        config = VLLMConfig(sleep=sleep)
        engine = VLLMEngine(tmp_path, TOKENIZER, config, cache_tokens=1000, max_positions=128, device=device, **options)
        return engine, llm.calls

    return made


def weights() -> Iterator[tuple[str, Tensor]]:
    yield from Qwen3ForCausalLM(Qwen3Config(**SIZES)).named_parameters()


COUNT = len(list(weights()))


# Fails if the cache's memory is taken before the weights are in place, or weights in host memory are sent for nothing.
def test_two_stage_wake(make: Make) -> None:
    engine, calls = make("host")
    engine.sleep()
    engine.update_weights(weights())
    engine.wake()
    assert calls == ["sleep 1", "wake weights", f"load {COUNT}", "reset", "wake kv_cache"]
    calls.clear()
    engine.sleep()
    engine.wake()  # as between two evaluations
    engine.wake()
    engine.update_weights(weights())
    assert calls == ["sleep 1", "wake weights", "wake kv_cache", f"load {COUNT}", "reset"]


# Fails if an engine whose weights were dropped wakes up with whatever is in its memory.
@pytest.mark.parametrize("synced", [True, False])
def test_dropped_weights_come_again(make: Make, synced: bool) -> None:
    engine, calls = make("drop", current_weights=weights if synced else lambda: None)
    engine.sleep()
    engine.wake()
    again = [f"load {COUNT}", "reset"] if synced else ["reload_weights"]
    assert calls == ["sleep 2", "wake weights", *again, "wake kv_cache"]
    calls.clear()
    engine.sleep()
    engine.update_weights(weights())
    engine.wake()
    assert calls == ["sleep 2", "wake weights", f"load {COUNT}", "reset", "wake kv_cache"]


@pytest.mark.parametrize(("sleep", "device"), [("off", CUDA), ("host", CPU), ("drop", CPU)])
def test_no_sleep_on_cpu_or_when_off(make: Make, sleep: str, device: torch.device) -> None:
    engine, calls = make(sleep, device)
    engine.sleep()
    engine.update_weights(weights())
    engine.wake()
    assert calls == [f"load {COUNT}", "reset"]


def test_options_follow_the_placement() -> None:
    # Fails if the cache is not sized in bytes of this rank's share, or a GPU loses vLLM's own defaults.
    model = Qwen3Config(**SIZES)

    def options(device: torch.device, **config: Any) -> dict[str, Any]:
        return llm_options(model, VLLMConfig(**config), device, 1000, 128, torch.bfloat16, truncates=False)

    cpu, gpu, spread = options(CPU), options(CUDA), options(CUDA, tensor_parallel=2, block_size=16)
    assert (cpu["block_size"], cpu["enforce_eager"], cpu["async_scheduling"]) == (32, True, False)
    assert not {"block_size", "async_scheduling", "logits_processors"} & gpu.keys() and not gpu["enforce_eager"]
    assert gpu["enable_sleep_mode"] and not options(CUDA, sleep="off")["enable_sleep_mode"]
    token = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, head_dim, bytes
    assert cpu["kv_cache_memory_bytes"] == 1064 * token
    assert spread["kv_cache_memory_bytes"] == 1032 * token // 2
    own = options(CUDA, placement="own_gpus", gpus=["6"])
    assert own["weight_transfer_config"] == {"backend": "nccl"} and "enable_sleep_mode" not in own


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        ({"placement": "own_gpus", "gpus": ["6"]}, CPU, "needs GPUs"),
        ({"placement": "own_gpus", "gpus": ["6"], "tensor_parallel": 2}, CUDA, "has no 2 GPUs for rank 0"),
        ({"tensor_parallel": 2}, CPU, "must divide the number of ranks, 1"),
    ],
)
def test_options_that_do_not_fit_the_machine(config: dict[str, Any], device: torch.device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_llm("folder", {}, VLLMConfig(**config), device, truncates=False)


def test_parameters_are_gathered_in_bounded_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if all parameters are gathered at once, one by one, or a persistent one is gathered.
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)), nn.Linear(4, 40, bias=False))
    for parameter in list(model.parameters())[:-1]:
        parameter.ds_id, parameter.ds_numel = 1, parameter.numel()  # type: ignore[attr-defined]
    gathered: list[list[int]] = []

    class Gathered:
        def __init__(self, parameters: list[nn.Parameter], enabled: bool) -> None:
            assert enabled == bool(parameters)
            gathered.append([parameter.nbytes for parameter in parameters])

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", Gathered)
    policy: Any = SimpleNamespace(model=model)
    names = [name for name, _ in whole_parameters(policy, 150)]
    assert names == [name for name, _ in model.named_parameters()]
    assert gathered == [[64, 64], [64, 64], [64], []]
