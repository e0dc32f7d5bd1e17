"""A rank's inference side: engine, tools and turn loop, fed with the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from atpo_fast.common.errors import StopRequested
from atpo_fast.config import EngineConfig, PagedConfig, ServerConfig, VLLMConfig
from atpo_fast.data.questions import Question
from atpo_fast.engines import Engine
from atpo_fast.engines.paged import TransformersEngine
from atpo_fast.engines.server.engine import ServerEngine
from atpo_fast.engines.tensor_parallel import SharedEngine
from atpo_fast.engines.vllm.engine import VLLMEngine
from atpo_fast.environment import make_toolbox
from atpo_fast.environment.reward import LeafScore, score_trees
from atpo_fast.policy import Policy, load_model
from atpo_fast.rollout import TurnLoop
from atpo_fast.telemetry import PhaseTimer
from atpo_fast.train.run import Run
from atpo_fast.train.weights import whole_parameters
from atpo_fast.tree import TurnTree


@dataclass(slots=True)
class ScoredTree:
    """A tree with its question and the score of each leaf."""

    question: Question
    tree: TurnTree
    scores: list[LeafScore]


class RolloutWorker:
    """Rolls out this rank's questions.

    The engine holds its own copy of the model at `folder`, because ZeRO-3 shards the trainer's; `sync` brings it up
    to date, a bucket of parameters at a time.
    """

    def __init__(self, run: Run, folder: Path | str, device: torch.device):
        config = run.config
        self._run = run
        self._policy: Policy | None = None  # whose weights the engine has
        max_positions: int = AutoConfig.from_pretrained(folder).max_position_embeddings
        engines = {
            "paged": self._transformers_engine,
            "vllm": self._vllm_engine,
            "server": self._server_engine,
        }
        self.engine = engines[config.engine.name](folder, device, max_positions)
        group = _sharing_ranks(config.engine, run.world)
        if group is not None:
            self.engine = SharedEngine(self.engine, group)
        if isinstance(self.engine, ServerEngine):
            max_positions = min(max_positions, self.engine.max_positions or max_positions)
        self._loop = TurnLoop(
            self.engine,
            run.task.tokenizer,
            make_toolbox(config.tools, run.task.passages),
            config.rollout,
            config.tools,
            cache_tokens=config.engine.cache_tokens,
            max_positions=max_positions,
        )

    def _transformers_engine(self, folder: Path | str, device: torch.device, max_positions: int) -> Engine:
        return TransformersEngine(
            load_model(folder, self._dtype),
            self._run.task.tokenizer,
            cache_tokens=self._run.config.engine.cache_tokens,
            device=device,
        )

    def _vllm_engine(self, folder: Path | str, device: torch.device, max_positions: int) -> Engine:
        config = self._run.config
        assert isinstance(config.engine, VLLMConfig)
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        return VLLMEngine(
            folder,
            self._run.task.tokenizer,
            config.engine,
            cache_tokens=config.engine.cache_tokens,
            max_positions=min(max_positions, longest),
            dtype=self._dtype,
            device=device,
            truncates=config.rollout.top_k > 0 or config.rollout.top_p < 1,
            seed=config.seed,
            current_weights=self._current_weights,
        )

    def _server_engine(self, folder: Path | str, device: torch.device, max_positions: int) -> Engine:
        config = self._run.config
        assert isinstance(config.engine, ServerConfig)
        return ServerEngine(folder, self._run.task.tokenizer, config.engine, temperature=config.rollout.temperature)

    @property
    def _dtype(self) -> torch.dtype:
        engine = self._run.config.engine
        assert not isinstance(engine, ServerConfig)  # whose dtype is the servers' own
        return torch.float32 if engine.cache_dtype == "float32" else getattr(torch, self._run.config.model.dtype)

    def _current_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """The weights that the engine has, once more; a collective under ZeRO-3. None: those of its folder."""
        if self._policy is None:
            return None
        return whole_parameters(self._policy, self._bucket_bytes)

    @property
    def _bucket_bytes(self) -> int:
        engine = self._run.config.engine
        return 256 << 20 if isinstance(engine, PagedConfig) else engine.bucket_mb << 20

    def sync(self, policy: Policy) -> None:
        """Take the policy's weights; a collective under ZeRO-3."""
        self._policy = policy
        with self._run.timer.phase("sync"):
            self.engine.update_weights(whole_parameters(policy, self._bucket_bytes))

    def roll_out(
        self,
        questions: Sequence[Question],
        *,
        seed: int,
        greedy: bool = False,
        on_tree: Callable[[int, ScoredTree], None] | None = None,
        timer: PhaseTimer | None = None,
    ) -> list[ScoredTree]:
        """Search trees of `questions`, scored.

        Args:
            on_tree: gets (index of the question, tree) as each is finished.
            timer: of a roll-out beside something else, which has the run's timer and progress line to itself.

        Raises StopRequested when the run was asked to stop.
        """
        run = self._run
        scored: dict[int, ScoredTree] = {}

        def score(index: int, tree: TurnTree) -> None:
            question = questions[index]
            (scores,) = score_trees([tree], [question], run.task.tokenizer, run.config.reward, validation=greedy)
            scored[index] = ScoredTree(question, tree, scores)
            if on_tree is not None:
                on_tree(index, scored[index])

        shown, timer = timer is None, timer or run.timer
        self.engine.wake()
        with timer.phase("rollout"):
            if isinstance(self.engine, SharedEngine):
                trees = self.engine.for_all(
                    questions, lambda everyones: self._search(everyones, seed, greedy, timer, shown)
                )
                if trees is None:  # the leader has raised; if it was asked to stop, the ranks find out together
                    raise StopRequested
                for index, tree in enumerate(trees):
                    score(index, tree)
            else:
                self._search(questions, seed, greedy, timer, shown, score)
        self.engine.sleep()
        return [scored[index] for index in range(len(questions))]

    def _search(
        self,
        questions: Sequence[Question],
        seed: int,
        greedy: bool,
        timer: PhaseTimer,
        shown: bool,
        on_tree: Callable[[int, TurnTree], None] | None = None,
    ) -> list[TurnTree]:
        run = self._run
        return self._loop.roll_out(
            list(questions),
            [run.task.encode_prompt(question) for question in questions],
            seed=seed,
            greedy=greedy,
            on_progress=self._report if shown else self._check,
            on_tree=on_tree,
            timer=timer,
        )

    def _check(self, done: int, total: int, decoded_tokens: int) -> None:
        self._run.stop.check()

    def _report(self, done: int, total: int, decoded_tokens: int) -> None:
        self._run.stop.check()
        self._run.progress.advance(done, decoded_tokens=decoded_tokens)


def _sharing_ranks(engine: EngineConfig, world: int) -> dist.ProcessGroup | None:
    """The ranks that share this rank's engine, which are neighbours; None where each has its own."""
    if not isinstance(engine, VLLMConfig) or engine.placement != "colocated" or engine.tensor_parallel == 1:
        return None
    size = engine.tensor_parallel
    groups = [list(range(first, first + size)) for first in range(0, world, size)]
    mine: dist.ProcessGroup = dist.new_subgroups_by_enumeration(groups, backend="gloo")[0]
    return mine
