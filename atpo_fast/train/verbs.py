"""What a launched process does for each verb of the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from atpo_fast.config.load import load_config, save_config
from atpo_fast.engines.vllm.start import check_vllm
from atpo_fast.policy import build_model
from atpo_fast.train.checkpoints import CheckpointError, complete_checkpoints
from atpo_fast.train.cold_start import cold_start
from atpo_fast.train.evaluate import evaluate, evaluate_step
from atpo_fast.train.forest_file import ForestError, is_server_error, write_forest
from atpo_fast.train.interrupt import StopRequested
from atpo_fast.train.loop import Trainer, make_objective, newest_checkpoint, trainer_summary
from atpo_fast.train.rollout_worker import RolloutWorker
from atpo_fast.train.row_budget import max_prefix
from atpo_fast.train.run import Run, start_run
from atpo_fast.train.step import MismatchError

STOPPED = 143  # exit code of a run that was asked to stop and saved its state


def train(run: Run) -> int:
    """Cold start where needed, RL, evaluation, summary, report."""
    resume_from = newest_checkpoint(run)
    objective = make_objective(run.config.objective, run.config.rollout.max_response_tokens)
    max_prefix(run.config, objective)  # or an error, before the cold start
    if run.config.rollout.engine == "vllm":
        check_vllm()
    if run.config.rollout.engine == "server" and run.config.rollout.server.weights_dir is None:
        raise ValueError("training with rollout.engine=server needs rollout.server.weights_dir")
    start, seconds = starting_model(run)
    check_vocabulary(run, start)
    trainer = Trainer(run, start, resume_from, seconds)
    if not trainer.fit():
        return STOPPED
    if run.is_main:
        from atpo_fast.report import build_report

        summary = trainer_summary(trainer)
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        page = build_report(run.folder)
        run.progress.message(_closing_words(summary, len(run.task.test), page))
    return 0


def _closing_words(summary: dict[str, Any], questions: int, page: Path) -> str:
    words = (
        f"EM on {questions} test questions: {summary['cold_start_em']:.3f} before RL, {summary['final_em']:.3f} after"
    )
    if "random_guess_rate" in summary:
        words += f" (guessing at random: {summary['random_guess_rate']:.3f})"
    return f"{words}; {summary['train_seconds']:.0f} s; report: {page}"


def sft(run: Run) -> int:
    """The cold start alone, and its evaluation."""
    folder = cold_start(run)
    evaluate_step(run, RolloutWorker(run, folder, local_device(run)), 0)
    return 0


def evaluate_verb(run: Run) -> int:
    """Greedy evaluation of `model.path`, or else of the run folder's newest model."""
    folder = run.config.model.path or newest_model(run.folder)
    means = evaluate(
        run, RolloutWorker(run, folder, local_device(run)), "newest" if folder != run.config.model.path else "given"
    )
    if run.is_main:
        print(json.dumps(means, indent=1))
    return 0


def rollout(run: Run, *, out: str | None = None, questions: str | None = None, split: str = "train") -> int:
    """Search trees with token ids, log-probs, rewards and texts into a file; see `write_forest`.

    Args:
        out: the file; default: `rollouts.jsonl` in the run folder.
        questions: the first so many of the split, or "all"; default: `train.questions_per_step`.
        split: train or test.
    """
    asked = run.task.test if split == "test" else run.task.train
    count = len(asked) if questions == "all" else int(questions or run.config.train.questions_per_step)
    if not asked:
        raise ValueError(f"there are no {split} questions: set data.{'eval' if split == 'test' else 'train'}_files")
    path = Path(out) if out else run.folder / "rollouts.jsonl"
    folder = run.config.model.path or newest_model(run.folder)
    worker = RolloutWorker(run, folder, local_device(run))
    left = write_forest(run, worker, asked[:count], path)
    if run.is_main and not left:
        print(f"trees of {len(asked[:count])} questions in {path}")
    return STOPPED if left else 0


VERBS: dict[str, Callable[..., int]] = {"train": train, "sft": sft, "eval": evaluate_verb, "rollout": rollout}


def run_verb(verb: str, config_path: str, overrides: Sequence[str], **options: str | None) -> int:
    """Start the run and do the verb with its options; expected failures become one line on stderr."""
    try:
        run = start_run(load_config(config_path, overrides))
        try:
            if run.is_main and verb in ("train", "sft"):
                save_config(run.config, run.folder / "config.yaml")
            with run.progress:
                return VERBS[verb](run, **options)
        finally:
            run.logger.close()
    except StopRequested:
        return STOPPED
    except (ValueError, FileNotFoundError, CheckpointError, MismatchError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not isinstance(error, ForestError) and not is_server_error(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def starting_model(run: Run) -> tuple[Path | str, float]:
    """(folder of the model that RL starts from, seconds its cold start took)."""
    if run.config.model.path is not None:
        return run.config.model.path, 0.0
    if run.task.demonstrations:
        folder = cold_start(run)
        return folder, float(json.loads((folder / "state.json").read_text())["seconds"])
    return initial_model(run), 0.0


def check_vocabulary(run: Run, folder: Path | str) -> None:
    """Raise ValueError when the model in `folder` was made for another tokenizer than the task's."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return
    other = AutoTokenizer.from_pretrained(folder).get_vocab()
    if other != run.task.tokenizer.get_vocab():
        raise ValueError(
            f"the model in {folder} was made for another vocabulary ({len(other)} tokens) than this task's "
            f"({len(run.task.tokenizer)}); delete that folder or choose another run_dir"
        )


def initial_model(run: Run) -> Path:
    """A random model of the configured sizes, written to the run folder once."""
    folder = run.folder / "initial_model"
    if run.is_main and not (folder / "tokenizer.json").is_file():  # written last
        build_model(run.config.model, run.task.tokenizer, run.config.seed).save_pretrained(folder)
        run.task.tokenizer.save_pretrained(folder)
    run.barrier()
    return folder


def newest_model(run_folder: Path) -> Path:
    """The Hugging Face folder of the newest checkpoint, or of the cold start.

    Raises FileNotFoundError when the run folder has neither.
    """
    checkpoints = complete_checkpoints(run_folder)
    folder = checkpoints[-1] / "hf" if checkpoints else run_folder / "cold_start"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{run_folder} has no trained model; set model.path or train first")
    return folder


def local_device(run: Run) -> torch.device:
    """The device of this rank's engine."""
    cuda = run.config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
