"""What the ranks of a run must share, checked before anything expensive: configuration, run folder, model, questions.

On one machine it holds by itself. On several, a folder of the same name may be another one.
"""

from __future__ import annotations

import json
import secrets
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from atpo_fast.config import Config, as_dict
from atpo_fast.task import Task
from atpo_fast.train.digests import model_digest, questions_digest, text_digest

_ADVICE = {
    "configuration": "start every node with the same file and overrides",
    "run folder": "run_dir must lie on a file system that all nodes share",
    "model": "model.path must hold the same files on every node",
    "questions": "the data files must be the same on every node",
}


def check_shared_files(config: Config, task: Task, folder: Path) -> None:
    """Compare what every rank sees with what rank 0 sees; a collective.

    Raises:
        ValueError: on every rank, when some rank sees something else; it names the hosts and what to do.
    """
    if dist.get_world_size() == 1:
        return
    mark = _leave_mark(folder)
    seen = {
        "configuration": text_digest([json.dumps(_shared_settings(config), sort_keys=True, default=str)]),
        "run folder": str((folder / mark).is_file()),
        "model": text_digest(_model_files(config.model.path)),
        "questions": questions_digest((*task.train, *task.eval)),
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), seen))
    if dist.get_rank() == 0:
        (folder / mark).unlink(missing_ok=True)
    expected = everywhere[0][1]
    problems = [
        f"{name} on {host} (rank {rank}): {_ADVICE[name]}"
        for rank, (host, found) in enumerate(everywhere)
        for name in expected
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError("the nodes do not see the same: " + "; ".join(problems))


def _shared_settings(config: Config) -> dict[str, Any]:
    """Return what all nodes have to set alike: everything but `ranks`, since a node may have fewer devices."""
    return {name: value for name, value in as_dict(config).items() if name != "ranks"}


def _leave_mark(folder: Path) -> str:
    """Create an empty file in the run folder on rank 0; returns its name on every rank."""
    name = [f".shared-{secrets.token_hex(8)}"]
    if dist.get_rank() == 0:
        (folder / name[0]).touch()
    dist.broadcast_object_list(name, src=0)
    return name[0]


def _model_files(path: str | None) -> list[str]:
    """Name the files of a model folder with their sizes, and the digest of its weights."""
    if path is None:
        return []
    files = [f"{file.name}:{file.stat().st_size}" for file in sorted(Path(path).glob("*")) if file.is_file()]
    return [*files, model_digest(Path(path))]
