"""Traces of verifiers 0.4 and prime-rl (`traces.jsonl`): a tree of messages, each with the tokens that it adds."""

from __future__ import annotations

from typing import Any

from atpo_fast.tree.traces.recorded import Episode, RecordedTurn


def read_verifiers(record: dict[str, Any]) -> Episode | None:
    """Read a trace; None for one that is not to be trained on: without a reward, or of an agent that is no policy.

    Log-probs are rounded to 4 decimals in such files unless they were written with `to_record(float_decimals=None)`.

    Raises:
        ValueError: it has no token ids, or they do not fit together.
    """
    rewards = [reward for reward in record.get("rewards", {}).values() if reward is not None]
    if not rewards or not record.get("agent", {}).get("trainable", True):
        return None
    task = record["task"]
    name = str(task.get("key") or task["data"].get("id") or task["data"].get("idx"))
    turns = _turns(record["nodes"], name)
    reward = sum(float(part["score"]) * float(part.get("weight", 1.0)) for part in rewards)
    meta = {"question": _text(task["data"].get("prompt")), "trace": record.get("id")}
    return Episode(name, turns, reward, meta)


def _turns(nodes: list[dict[str, Any]], name: str) -> list[RecordedTurn]:
    spans = [_action_span(node, name) for node in nodes]
    inner = {node["parent"] for node in nodes}
    turn_of: dict[int, int] = {}
    turns: list[RecordedTurn] = []
    for index, node in enumerate(nodes):
        if not node["sampled"] and index in inner:
            continue
        begin, end = spans[index]
        above, context = _context(nodes, spans, index)
        if not node["sampled"]:  # a message behind which nothing was written
            begin = end = len(node["token_ids"])
            if above is None:
                continue
        turn_of[index] = len(turns)
        ids = node["token_ids"]
        parent = None if above is None else turn_of[above]
        turns.append(RecordedTurn(parent, (*context, *ids[:begin]), tuple(ids[begin:end]), tuple(node["logprobs"])))
    if not any(turn.action_ids for turn in turns):
        raise ValueError(
            f"trace of {name}: no message of the policy has token ids; record with a client that gives them, as "
            "verifiers' renderer client does"
        )
    return turns


def _context(
    nodes: list[dict[str, Any]], spans: list[tuple[int, int]], index: int
) -> tuple[int | None, tuple[int, ...]]:
    """Return the sampled message above a node, and the tokens between that message's action and the node's own."""
    between: list[int] = []
    above = nodes[index]["parent"]
    while above is not None and not nodes[above]["sampled"]:
        between = nodes[above]["token_ids"] + between
        above = nodes[above]["parent"]
    if above is not None:
        between = nodes[above]["token_ids"][spans[above][1] :] + between
    return above, tuple(between)


def _action_span(node: dict[str, Any], name: str) -> tuple[int, int]:
    """Return where the sampled tokens of a message begin and end."""
    mask, ids, logprobs = node.get("mask", []), node.get("token_ids", []), node.get("logprobs", [])
    count = sum(mask)
    begin = mask.index(True) if count else len(ids)
    if len(mask) != len(ids) or len(logprobs) != count or not all(mask[begin : begin + count]):
        raise ValueError(
            f"trace of {name}: a message has {len(ids)} tokens, {len(mask)} entries of its mask and {len(logprobs)} "
            f"log-probs for {count} sampled tokens, which have to be consecutive"
        )
    return begin, begin + count


def _text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(str(message.get("content")) for message in prompt)
    return prompt or ""
