"""A tiny model that is trained, and completions servers for it, which start with another one's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import load_config
from atpo_fast.policy import load_model
from atpo_fast.task import load_task
from atpo_fast.train.from_config import build_model
from tests.helpers.completions_server import CompletionsServer
from tests.helpers.network import Host
from tests.helpers.runs import write_config


class ServedModel:
    """The tiny world's configuration, and the models `model` and `other`, in a folder.

    Servers start with `other`: only a trainer that gives them its weights is answered by `model`.
    """

    def __init__(self, folder: Path):
        self.folder, self.config = folder, write_config(folder)
        config = load_config(self.config)
        self.tokenizer: PreTrainedTokenizerBase = load_task(config).tokenizer
        for seed, name in ((0, "model"), (1, "other")):
            build_model(config.model, self.tokenizer, seed).save_pretrained(folder / name)
            self.tokenizer.save_pretrained(folder / name)

    def start(self, host: Host | None = None) -> CompletionsServer:
        """A server on a host, or here."""
        return CompletionsServer(lambda: load_model(self.folder / "other", torch.float32), self.tokenizer, host=host)

    def overrides(self, name: str, *servers: CompletionsServer) -> list[str]:
        """Overrides of a run into the folder `name`, which asks the servers."""
        urls = ", ".join(server.url for server in servers)
        return [
            f"run_dir={self.folder / name}",
            f"model.path={self.folder / 'model'}",
            "engine.name=server",
            f"engine.urls=[{urls}]",
            f"engine.weights_dir={self.folder / name}-weights",
        ]
