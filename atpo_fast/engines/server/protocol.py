"""Write requests to a completions server and read its answers: token ids in, token ids and log-probs out.

The endpoint is OpenAI's `POST /v1/completions` with vLLM's extensions: `return_token_ids` (vLLM 0.10.2 and later) or at
least `return_tokens_as_token_ids`, `stop_token_ids`, `include_stop_str_in_output`, `ignore_eos`. Text is never read:
where a turn ends is found on its token ids, by the same automaton as in the other engines, so that a server that
decodes some tokens past a stop string (speculative decoding) changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import isfinite
from typing import Any

from atpo_fast.common.errors import EngineError
from atpo_fast.engines.request import Completion, FinishReason, Request
from atpo_fast.engines.stops import StopTable

_TOKEN_ID = "token_id:"  # what vLLM puts before an id in the place of a token's text
# What reading raises where a field is missing or of another type.
_NOT_OF_THE_PROTOCOL = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
_HOW_TO_START = (
    "vLLM >=0.10.2 sends them when asked with return_token_ids, older versions when started with "
    "--return-tokens-as-token-ids; a proxy in between must let both options through"
)


class ServerError(EngineError):
    """The servers cannot serve a rollout; the message says which, why, and what to do."""


class TransientError(Exception):
    """A failure that another try may not meet.

    `down`: the replica may be dead, so its health has to be checked. `redraw`: the same seed would meet it again.
    """

    def __init__(self, message: str, *, down: bool = False, redraw: bool = False):
        super().__init__(message)
        self.down, self.redraw = down, redraw


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, and the number of its prompt tokens in the server's cache (0 where the server does not say)."""

    completion: Completion
    cached_tokens: int


def refuse_truncation(request: Request) -> None:
    """Raise ValueError for top-p or top-k: a server tells log-probs under the truncated distribution only, and the
    trainer needs those without.
    """
    wanted = request.sampling
    if wanted.temperature > 0 and (wanted.top_p < 1 or wanted.top_k > 0):
        raise ValueError(
            "engine.name=server: top_p and top_k must be off, because servers do not tell the log-probs that the "
            "trainer needs; use an engine in the trainer's process to truncate"
        )


def request_body(request: Request, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Build the body of a request but for `model`; every option that a server's own defaults could change is given."""
    wanted = request.sampling
    return {
        "prompt": [int(token) for token in request.prompt_ids],
        "add_special_tokens": False,
        "max_tokens": wanted.max_new_tokens,
        "temperature": wanted.temperature,
        "seed": request.seed & (2**63 - 1),
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(wanted.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # they are the served model's, which may be others
        "skip_special_tokens": False,  # a stop string may be a special token
        "spaces_between_special_tokens": False,
        "logprobs": wanted.top_logprobs,  # 0: that of the sampled token only
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def read_answer(
    answer: Any, request: Request, stops: StopTable, eos_ids: Sequence[int], missing: Set[int] = frozenset()
) -> Answer:
    """Read the completion in the JSON of an answer.

    Raises:
        ServerError: the server does not speak token ids, or ends turns by other rules than those asked for.
        TransientError: the JSON is no answer of the protocol, the server aborted the request, a log-prob is missing or
            no number, or a token is one of those `missing` in the tokenizer.
    """
    try:
        return _read_answer(answer, request, stops, eos_ids, missing)
    except _NOT_OF_THE_PROTOCOL as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise TransientError(f"an answer that is not of the protocol ({reason}): {str(answer)[:200]}") from error


def _read_answer(answer: Any, request: Request, stops: StopTable, eos_ids: Sequence[int], missing: Set[int]) -> Answer:
    choice = _choice(answer)
    token_ids, logprobs = _tokens(choice)
    _check_prompt(choice.get("prompt_token_ids"), request)
    kept, reason, stop = _end(token_ids, stops, eos_ids, missing)
    if reason is None:
        _require_length(choice, request, stops)
        reason = "length"
    logprobs = _numbers(logprobs[:kept], request)
    completion = Completion(
        token_ids=token_ids[:kept],
        logprobs=logprobs,
        policy_logprobs=logprobs,
        finish_reason=reason,
        stop=stop,
        top_logprobs=_candidates(choice["logprobs"], request, kept),
    )
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return Answer(completion, int(details.get("cached_tokens") or 0))


def top_logprob(answer: Any) -> float:
    """Read the largest log-prob in an answer of one token. Raise TransientError when there is none."""
    try:
        (entry,) = _choice(answer)["logprobs"]["top_logprobs"]
        return max(entry.values())
    except _NOT_OF_THE_PROTOCOL as error:
        raise TransientError(f"an answer without top_logprobs: {str(answer)[:200]}") from error


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise TransientError(f"an answer that is not one completion: {str(answer)[:200]}")
    return choices[0]


def _tokens(choice: dict[str, Any]) -> tuple[list[int], list[Any]]:
    """Read the token ids and their log-probs, some of which may be no numbers (`_numbers`)."""
    listed = choice.get("logprobs") or {}
    logprobs, names = listed.get("token_logprobs"), listed.get("tokens") or ()
    ids = choice.get("token_ids")
    if ids is None and names and all(str(name).startswith(_TOKEN_ID) for name in names):
        ids = [int(name.removeprefix(_TOKEN_ID)) for name in names]
    if ids is None:
        raise ServerError(f"the server does not return token ids: {_HOW_TO_START}")
    if logprobs is None or (logprobs and all(value is None for value in logprobs)):
        raise ServerError("the server does not return log-probs: it must honour `logprobs` in POST /v1/completions")
    if not ids or len(ids) != len(logprobs):
        raise TransientError(f"{len(ids)} token ids came with {len(logprobs)} log-probs")
    return [int(token) for token in ids], list(logprobs)


def _numbers(logprobs: Sequence[Any], request: Request) -> list[float]:
    """Return log-probs as numbers. Raise TransientError where one is missing or not finite."""
    for index, value in enumerate(logprobs):
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise TransientError(
                f"turn {request.turn_key}: the log-prob of token {index} is {value!r}, not a finite number"
            )
    return [float(value) for value in logprobs]


def _candidates(listed: dict[str, Any], request: Request, kept: int) -> list[list[float]] | None:
    """Read the log-probs of the likeliest candidates of the first `kept` tokens; None where none are asked for.

    vLLM lists the sampled token with them; for servers that do not, it is added where it is none of them.
    """
    count = request.sampling.top_logprobs
    if not count:
        return None
    tops = listed.get("top_logprobs") or ()
    if len(tops) < kept or any(not isinstance(top, dict) or len(top) < count for top in tops[:kept]):
        raise ServerError(
            f"the server does not return the log-probs of the {count} likeliest tokens, which rollout.strategy needs: "
            "it must honour `logprobs` in POST /v1/completions (vLLM: --max-logprobs of at least as many)"
        )
    sampled = zip(listed["tokens"], listed["token_logprobs"], strict=True)
    return [
        _numbers(list((top if name in top else {**top, name: value}).values()), request)
        for top, (name, value) in zip(tops[:kept], sampled, strict=False)
    ]


def _check_prompt(returned: list[int] | None, request: Request) -> None:
    """Raise ServerError where the server continued other tokens than those sent."""
    sent = request.prompt_ids
    if returned is None or returned == list(sent):
        return
    pairs = zip(returned, sent, strict=False)
    first = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), min(len(returned), len(sent)))
    raise ServerError(
        f"turn {request.turn_key}: the server continued {len(returned)} prompt tokens instead of the {len(sent)} sent; "
        f"the first difference is at token {first}: it must neither cut prompts nor add tokens to them"
    )


def _end(
    token_ids: Sequence[int], stops: StopTable, eos_ids: Sequence[int], missing: Set[int]
) -> tuple[int, FinishReason | None, str | None]:
    """Find the end of a turn: (its tokens, why it ends there, stop string); without an end, all tokens and None.

    Raises TransientError for a token that is `missing` or beyond the model's vocabulary.
    """
    state, vocabulary = 0, stops.next_state.shape[1]
    for count, token in enumerate(token_ids, start=1):
        if token in missing or not 0 <= token < vocabulary:
            raise TransientError(f"it sampled token {token}, which this run's tokenizer does not have", redraw=True)
        state = int(stops.next_state[state, token])
        if token in eos_ids:
            return count, "eos", None
        if stops.found[state] >= 0:
            return count, "stop", stops.stops[int(stops.found[state])]
    return len(token_ids), None, None


def _require_length(choice: dict[str, Any], request: Request, stops: StopTable) -> None:
    """Raise where a turn in which we found no end is not at its limit either."""
    finish, cause = choice.get("finish_reason"), choice.get("stop_reason")
    if finish == "length":
        return
    if finish != "stop":
        raise TransientError(f"the server aborted turn {request.turn_key} ({finish})")
    if isinstance(cause, str) and cause in stops.stops:
        hint = f"it found {cause!r}, which these tokens do not contain: it serves another tokenizer than this run's"
    else:
        hint = f"its own end is {cause!r}: serve the model with `--generation-config vllm`, without other stop tokens"
    raise ServerError(f"the server ended turn {request.turn_key} where this run does not; {hint}")
