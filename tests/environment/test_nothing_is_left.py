"""Handles, threads and memory after many openings and closings of what a run of days opens."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from atpo_fast.config import ToolsConfig
from atpo_fast.data.questions import Passage
from atpo_fast.engines.paged.engine import PagedEngine
from atpo_fast.environment import make_toolbox
from atpo_fast.environment.result_cache import ResultCache
from atpo_fast.environment.tags import ToolCall
from atpo_fast.retrieval import BM25Settings, build_index, open_index
from tests.helpers.retrieval_cases import random_rows, write_corpus
from tests.helpers.small_tokenizers import byte_level
from tests.helpers.waiting import wait_for

MEGABYTES = 8  # of growth that an allocator may explain; one leaked tool box or cache a round is more than that
PASSAGES = [Passage(id=str(number), title="", text=f"w{number} w{number + 1}") for number in range(200)]


def held() -> tuple[int, int]:
    """Open handles and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def megabytes() -> int:
    """Memory of this process."""
    return psutil.Process().memory_info().rss >> 20


def tool_box(folder: Path) -> None:
    tools = ToolsConfig(builtin=["search", "python"], cache=str(folder / "cache.sqlite"))
    with make_toolbox(tools, PASSAGES) as box:
        results = box.run([ToolCall("search", "w1"), ToolCall("search", "w3"), ToolCall("python", "")])
        assert results[0].ok and not results[2].ok


def cache(folder: Path) -> None:
    kept = ResultCache(folder / "results.sqlite", max_mb=1)
    kept.close()


def index(folder: Path) -> None:
    if not (folder / "i").exists():
        build_index(folder / "i", [write_corpus(folder / "c.jsonl", random_rows(20))], BM25Settings())
    assert open_index(folder / "i").hits(["w1"], 2)


def engine(folder: Path) -> None:
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=64))
    PagedEngine(model, byte_level(), cache_tokens=256).close()


@pytest.fixture
def new_objects_only() -> Iterator[None]:
    """Spare the collector of garbage all that tests and libraries hold already."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_only")
@pytest.mark.parametrize("use", [tool_box, cache, index, engine])
def test_nothing_is_left(tmp_path: Path, use: Callable[[Path], None]) -> None:
    """Fails if a part keeps a handle, a thread or memory after it was closed."""
    for _ in range(3):
        use(tmp_path)
    gc.collect()
    (handles, threads), memory = held(), megabytes()
    for _ in range(12):
        use(tmp_path)
    gc.collect()
    wait_for(lambda: held()[0] <= handles and held()[1] <= threads, seconds=60)  # a thread needs a moment to end
    assert megabytes() <= memory + MEGABYTES
