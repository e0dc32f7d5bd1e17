"""Training traces of OpenEnv's harness: one entry for each call of the engine, with all tokens before it."""

from __future__ import annotations

from typing import Any

from atpo_fast.tree.traces.recorded import Episode, RecordedTurn


def read_openenv(record: dict[str, Any], name: str) -> Episode | None:
    """Read one episode; None for one without a reward.

    A record is a `TrainingTrace` as JSON; `turns` may be the list of `to_trace_entries` as well. OpenEnv's trace holds
    neither the question nor the reward, which is that of `verify`: they are the keys `task_id` and `reward` of the
    record or of its entries. An entry follows the longest earlier one whose tokens its prompt begins with.

    Args:
        record: one line of the file.
        name: name of the question where the record does not say it.

    Raises:
        ValueError: a mask or log-probs do not fit the tokens.
    """
    entries = record["turns"]
    places = [record, *(place for entry in entries for place in (entry, entry.get("metadata", {})))]
    reward = next((place["reward"] for place in places if place.get("reward") is not None), None)
    name = str(next((place["task_id"] for place in places if place.get("task_id") is not None), name))
    turns: list[RecordedTurn] = []
    whole: list[tuple[int, ...]] = []  # tokens up to the end of each turn
    for entry in entries:
        prompt, action = tuple(entry["prompt_token_ids"]), tuple(entry["completion_token_ids"])
        if not _trained(entry, name):
            continue
        parents = [i for i, tokens in enumerate(whole) if prompt[: len(tokens)] == tokens]
        parent = max(parents, key=lambda i: len(whole[i]), default=None)
        context = prompt if parent is None else prompt[len(whole[parent]) :]
        turns.append(RecordedTurn(parent, context, action, tuple(entry["per_token_logps"])))
        whole.append(prompt + action)
    return None if reward is None or not turns else Episode(name, turns, float(reward))


def _trained(entry: dict[str, Any], name: str) -> bool:
    """Tell whether a call's tokens are the policy's to learn from; those of others are context alone."""
    tokens, logprobs = len(entry["completion_token_ids"]), len(entry["per_token_logps"])
    mask = entry["loss_mask"][len(entry["prompt_token_ids"]) :]
    if len(mask) == tokens and not any(mask):
        return False
    if len(mask) != tokens or not all(mask) or logprobs != tokens:
        raise ValueError(
            f"trace of {name}: {sum(mask)} of {tokens} sampled tokens are in the loss mask, which has {len(mask)} "
            f"entries for them, and {logprobs} have a log-prob; a turn is trained as a whole"
        )
    return True
