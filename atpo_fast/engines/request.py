"""What an engine is asked and what it answers (docs/design.md#engines): token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "eos", "length"]
TurnKey = tuple[Hashable, int]  # name of the tree, number of the turn in it


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters by which a completion is sampled.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch truncation off. A completion ends after the token that
    completes one of the `stop` strings (the token stays), after an end-of-sequence id, or at `max_new_tokens`.
    `top_logprobs` asks for the log-probs of as many likeliest candidates with each token; 0 costs nothing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.top_logprobs < 0:
            raise ValueError(f"illegal sampling parameters: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathNode:
    """One turn on the way to a request: its key, unique among the turns of unreleased trees, and where its tokens end.

    `key[0]` names the tree, so that a finished tree's entries can be released together. `key[1]` counts the tree's
    requests in the order in which they are submitted (0: the root): it need not be the turn's index in the finished
    tree.
    """

    key: TurnKey
    end: int  # number of prompt tokens up to and including this turn's observation


@dataclass(slots=True, kw_only=True)
class Request:
    """A request to continue `prompt_ids` by one turn.

    `path` lists the turns of the search tree of which the prompt consists, root first (the last `end` equals
    `len(prompt_ids)`), and `turn_key` names the turn about to be written, so that an engine can keep one cache entry
    per tree token and check that turns are continued as they were written. `seed` makes the sample independent of
    what else is in the batch.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingParams
    seed: int
    path: tuple[PathNode, ...]
    turn_key: TurnKey


@dataclass(slots=True, kw_only=True)
class Completion:
    """A sampled turn with its log-probs.

    `logprobs`: log-prob of each token under the distribution it was really drawn from (temperature, top-p and top-k
    included). `policy_logprobs`: under the policy at this temperature without truncation, which is what the trainer
    recomputes. The two are equal when truncation is off and the tokenizer has a token for each row of the embedding:
    rows without one are never drawn, and the trainer's softmax runs over them too. Engines that learn of such a row
    only when it is drawn (vllm, server) leave their share out of `logprobs`. Greedy decoding reports both at
    temperature 1.
    `top_logprobs`: where asked for, a list for each token with the log-probs of the `top_logprobs` likeliest candidates
    and, where it is none of them, of the sampled token. They are those of the distribution
    that `policy_logprobs` are of.
    """

    token_ids: list[int]
    logprobs: list[float]
    policy_logprobs: list[float]
    finish_reason: FinishReason
    stop: str | None = None  # stop string that ended the turn
    top_logprobs: list[list[float]] | None = None


@dataclass(slots=True)
class EngineCounters:
    """Numbers of tokens of an engine since it was built.

    `prefilled_tokens`: tokens that entered the cache, each counted when it gets its entry. `shared_tokens`: tokens of
    prompts that had entries already, those of another tree that begins alike (engine `paged`). A forest rolled out
    without eviction has exactly as many of both together as it has unique tokens. `decoded_tokens`: the part of the
    first that was sampled. `cache_hit_tokens`: prompt tokens of requests that were found in the cache.
    `forwarded_tokens`: tokens really fed through the model, counted at the forward (the last token of a leaf never
    is). `evicted_tokens`: entries dropped for lack of room while their tree was not released.
    """

    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    cache_hit_tokens: int = 0
    forwarded_tokens: int = 0
    evicted_tokens: int = 0
    shared_tokens: int = 0

    def count_completion(self, prompt: int, cached: int, decoded: int) -> None:
        """Add a completion of `decoded` tokens, `cached` of whose `prompt` tokens were found in the cache."""
        self.cache_hit_tokens += cached
        self.prefilled_tokens += prompt - cached + decoded
        self.decoded_tokens += decoded
        self.forwarded_tokens += prompt - cached + decoded - 1
