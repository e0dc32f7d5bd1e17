"""Requests to an engine over trees of random tokens, and the check of the log-probs that it stores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from atpo_fast.engines.base import Completion, Engine, PathNode, Request, SamplingParams
from atpo_fast.tree.turn_tree import TurnTree

VOCABULARY = 40


def request(tree: TurnTree, name: str, parent: int, turn: int, sampling: SamplingParams, seed: int = 0) -> Request:
    """The request for turn `turn` of the tree called `name`, below its turn `parent`."""
    path = tree.path(parent)
    ends = np.cumsum([len(tree.turns[n].action_ids) + len(tree.turns[n].observation_ids) for n in path])
    nodes = tuple(PathNode(key=(name, n), end=int(end)) for n, end in zip(path, ends, strict=True))
    prompt = tree.path_ids(parent).tolist()
    return Request(prompt_ids=prompt, sampling=sampling, seed=seed, path=nodes, turn_key=(name, turn))


def roots(count: int, seed: int = 0, lengths: tuple[int, int] = (3, 20)) -> list[TurnTree]:
    """`count` trees that are only a prompt of random tokens; `lengths` bounds its length, the end not included."""
    rng = np.random.default_rng(seed)
    return [TurnTree(rng.integers(2, VOCABULARY, rng.integers(*lengths))) for _ in range(count)]


def grow(engine: Engine, trees: Sequence[TurnTree], rounds: int = 2, shuffle: bool = False) -> list[Request]:
    """What the tree search does: chains with observations to their ends, then expansion rounds; the requests."""
    params = SamplingParams(max_new_tokens=6, stop=("</search>",))
    asked: list[Request] = []

    def run(branches: list[tuple[int, int]]) -> None:
        while branches:
            sizes = {i: len(tree) for i, tree in enumerate(trees)}
            batch = []
            for index, parent in branches:
                turn = sizes[index]
                sizes[index] += 1
                batch.append(request(trees[index], f"t{index}", parent, turn, params, seed=1000 * index + turn))
            shuffled = np.random.default_rng(len(asked)).permutation(len(batch)) if shuffle else np.arange(len(batch))
            answers: dict[int, Completion] = {}
            for where, answer in zip(shuffled, engine.generate([batch[i] for i in shuffled]), strict=True):
                answers[int(where)] = answer
            asked.extend(batch)
            following = []
            for at, (index, parent) in enumerate(branches):
                done = answers[at]
                leaf = done.finish_reason == "eos" or len(trees[index].path(parent)) > 3
                rng = np.random.default_rng(1000 * index + batch[at].turn_key[1])
                seen = [] if leaf else rng.integers(2, VOCABULARY, rng.integers(0, 9)).tolist()
                node = trees[index].add_turn(
                    parent, done.token_ids, done.policy_logprobs, seen, finish_reason=done.finish_reason
                )
                if not leaf:
                    following.append((index, node))
            branches = following

    run([(index, 0) for index in range(len(trees)) for _ in range(3)])
    for number in range(rounds):
        rng = np.random.default_rng(number)
        run([(index, tree.turns[int(rng.integers(1, len(tree)))].parent) for index, tree in enumerate(trees)])
    return asked


def check_logprobs(model: PreTrainedModel, trees: Sequence[TurnTree], tolerance: float) -> None:
    """The stored log-probs of every path against one forward of the whole path."""
    for tree in trees:
        for leaf in tree.leaves:
            ids = torch.from_numpy(tree.path_ids(leaf))
            with torch.no_grad():
                logp = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
            at = len(tree.turns[0].observation_ids)
            for turn in (tree.turns[n] for n in tree.path(leaf)[1:]):
                rows = torch.arange(at - 1, at - 1 + len(turn.action_ids))
                np.testing.assert_allclose(turn.logprobs, logp[rows, ids[rows + 1]].numpy(), atol=tolerance)
                at += len(turn.action_ids) + len(turn.observation_ids)
