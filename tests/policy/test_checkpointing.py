"""Checkpointing with tokens left out of the backward gives the gradients of the full backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from atpo_fast import Objective, TurnTree, assign_credit, pack_trees
from atpo_fast.common.choices import GradientCheckpointing
from atpo_fast.packing import PackedTrees
from atpo_fast.policy import Policy, attention
from atpo_fast.policy.checkpointing import GradientTokens
from atpo_kernels import make_tree_blocks
from tests.helpers.policies import MODELS, SIZES, grad_of, make, trees


def gradients(policy: Policy, row: PackedTrees, coef: Tensor) -> dict[str, Tensor]:
    """Of sum(coef * logprob)."""
    policy.zero_grad()
    logprob, _ = policy(row)
    (logprob * coef).sum().backward()
    return {name: grad_of(p).clone() for name, p in policy.named_parameters()}


def one_row() -> PackedTrees:
    (row,) = pack_trees(trees(), Objective.preset("at2po"), 4096, dtype=torch.float64)
    return row


@pytest.mark.parametrize("choice", ["layer", "mlp"])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("alive", ["all", "one turn", "one token", "none", "half"])
def test_equal_to_the_full_backward(name: str, alive: str, choice: GradientCheckpointing) -> None:
    """Fails if an ancestor of a token with gradient is left out, a kept token's position or mask is wrong, or the
    gradients of the tokens that an MLP was computed again for go to other tokens.
    """
    row = one_row()
    rng = torch.Generator().manual_seed(1)
    coef = torch.randn(row.num_actions, generator=rng, dtype=torch.float64)
    last = row.num_turns - 1
    turn = torch.arange(row.num_turns).repeat_interleave(row.turn_offsets.diff())
    index = torch.arange(row.num_actions)
    keep = {
        "all": torch.ones_like(turn, dtype=torch.bool),
        "one turn": turn == last,
        "one token": index == row.num_actions // 2,
        "none": torch.zeros_like(turn, dtype=torch.bool),
        "half": turn % 2 == 0,
    }[alive]
    full, pruned = (Policy(make(name), gradient_checkpointing=c).train() for c in ("none", choice))
    expected, found = (gradients(policy, row, coef * keep) for policy in (full, pruned))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12, msg=f"{name} {parameter}")
    assert pruned.skipped_tokens >= (row.num_tokens // 2 if alive in ("one turn", "one token", "none") else 0)


@pytest.mark.parametrize("choice", ["layer", "mlp"])
def test_every_backward_is_cut_by_its_own_gradients(choice: GradientCheckpointing) -> None:
    """Fails if what one backward left out is still left out in the next."""
    row, policy = one_row(), Policy(make("qwen3"), gradient_checkpointing=choice).train()
    full = Policy(make("qwen3")).train()
    coefs = [torch.zeros(row.num_actions, dtype=torch.float64) for _ in range(2)]
    coefs[0][0], coefs[1][-1] = 1, 1
    for coef in coefs:
        expected, found = gradients(full, row, coef), gradients(policy, row, coef)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choice", ["layer", "mlp"])
def test_evaluation_is_not_checkpointed(choice: GradientCheckpointing) -> None:
    """Fails if a backward in evaluation mode leaves out what the last one in training did."""
    row, policy = one_row(), Policy(make("qwen3"), gradient_checkpointing=choice).train()
    coefs = [torch.zeros(row.num_actions, dtype=torch.float64) for _ in range(2)]
    coefs[0][0], coefs[1][-1] = 1, 1
    gradients(policy, row, coefs[0])
    skipped = policy.skipped_tokens
    found, expected = (gradients(p.eval(), row, coefs[1]) for p in (policy, Policy(make("qwen3"))))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12)
    assert policy.skipped_tokens == skipped


@pytest.mark.parametrize("choice", ["layer", "mlp"])
def test_rows_keep_their_own_tokens(choice: GradientCheckpointing) -> None:
    """Fails if the backward of a row takes the tokens of another row that was forwarded in between."""
    rows = pack_trees(trees(), Objective.preset("at2po"), 22, dtype=torch.float64)
    assert len(rows) > 2
    full, policy = (Policy(make("qwen3"), gradient_checkpointing=c).train() for c in ("none", choice))
    for each in (full, policy):
        logprobs = [each(row)[0] for row in rows]
        sum(logprob[-1] for logprob in logprobs).backward()
    assert policy.skipped_tokens
    for (name, found), expected in zip(policy.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("choice", ["layer", "mlp"])
def test_left_out_tokens_are_not_computed_again(choice: GradientCheckpointing) -> None:
    """Fails if the recomputation runs over tokens without gradient, or a layer is computed more often than twice."""
    row, policy = one_row(), Policy(make("llama"), gradient_checkpointing=choice).train()
    sizes: dict[str, list[int]] = {"self_attn.q_proj": [], "mlp.up_proj": []}
    for name, module in policy.named_modules():
        for part, seen in sizes.items():
            if name.endswith(part):
                module.register_forward_hook(lambda _module, _in, out, seen=seen: seen.append(out.shape[1]))
    coef = torch.zeros(row.num_actions, dtype=torch.float64)
    coef[-1] = 1
    gradients(policy, row, coef)
    layers, whole, kept = 2, row.num_tokens, row.num_tokens - policy.skipped_tokens
    again = {"self_attn.q_proj": [kept] * layers if choice == "layer" else [], "mlp.up_proj": [kept] * layers}
    assert 0 < kept < whole / 2
    assert sizes == {part: [whole] * layers + seen for part, seen in again.items()}


def test_what_all_layers_share_is_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if every layer cuts the positions and makes the block lists again, or an MLP has them made at all."""
    taken: list[tuple[int, ...]] = []
    plain = GradientTokens.take
    monkeypatch.setattr(GradientTokens, "take", lambda self, x: taken.append(tuple(x.shape)) or plain(self, x))
    row = one_row()
    coef = torch.zeros(row.num_actions, dtype=torch.float64)
    coef[-1] = 1
    hidden, positions, angles = (1, row.num_tokens, 32), (1, row.num_tokens), (1, row.num_tokens, 8)
    made: list[int] = []
    make_blocks = attention.make_attention_blocks
    monkeypatch.setattr(attention, "make_attention_blocks", lambda *a, **k: made.append(1) or make_blocks(*a, **k))
    cases: list[tuple[GradientCheckpointing, list[tuple[int, ...]], int]]
    cases = [("layer", [positions, angles, angles], 2), ("mlp", [], 1)]
    for choice, expected, lists in cases:
        policy = Policy(make("llama"), gradient_checkpointing=choice).train()
        made.clear()
        taken.clear()
        gradients(policy, row, coef)
        assert sorted(taken) == sorted(expected + [hidden] * 4)  # 2 layers, each its input and its gradient
        assert len(made) == lists


def test_kept_bytes() -> None:
    """Fails if `mlp` keeps activations of the MLP, or `layer` more than the layers' inputs."""
    row = one_row()
    kept = {choice: saved_bytes(choice, row) for choice in ("none", "mlp", "layer")}
    wide = row.num_tokens * SIZES["intermediate_size"] * 8 * SIZES["num_hidden_layers"]  # one tensor of the MLPs
    assert kept["mlp"] <= kept["none"] - 4 * wide  # gate, its SiLU, up, their product
    assert kept["layer"] < kept["mlp"] / 2


def saved_bytes(choice: GradientCheckpointing, row: PackedTrees) -> int:
    """Bytes that a forward keeps for the backward, without parameters."""
    policy = Policy(make("qwen3"), gradient_checkpointing=choice).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes twice

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        policy.hidden_states(row)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("seed", range(20))
def test_needed_tokens_are_the_ancestors(seed: int) -> None:
    """Fails if the needed tokens are not exactly those that a token with gradient sees, by brute force."""
    rng = np.random.default_rng(seed)
    tree = TurnTree(rng.integers(0, 9, 5))
    inner = {0}
    for turn in range(1, 13):
        parent = int(rng.integers(0, turn))
        inner.add(parent)
        tree.add_turn(parent, rng.integers(0, 9, rng.integers(1, 5)), observation_ids=[1, 2])
    for leaf in set(range(13)) - inner:
        tree.set_reward(leaf, float(rng.random()))
    assign_credit([tree])
    (row,) = pack_trees([tree], Objective.preset("at2po"), 4096, prune=False)
    end, length = row.subtree_end.long(), row.num_tokens
    carries = torch.from_numpy(rng.random(length) < 0.05)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    needed = ((k <= q) & (q < end[None, :]) & carries[:, None]).any(0)
    needed[0] = True
    tokens = GradientTokens(row.subtree_end, lambda end: {"tree_blocks": make_tree_blocks(end)})
    tokens.observe(carries[None, :, None].double())
    if needed.sum() > 0.95 * length:
        assert tokens.index is None
        return
    assert tokens.index is not None and tokens.subtree_end is not None
    assert torch.equal(tokens.index, needed.nonzero().squeeze(1))
    kept = tokens.index
    visible = (k <= q) & (q < end[None, :])
    new_end = tokens.subtree_end.long()
    i = torch.arange(len(kept))
    assert torch.equal((i[None, :] <= i[:, None]) & (i[:, None] < new_end[None, :]), visible[kept][:, kept])


@pytest.mark.parametrize("choice", ["layer", "mlp"])
def test_dropout_is_refused(choice: GradientCheckpointing) -> None:
    """Fails if a layer that draws random numbers is computed twice with different ones."""
    model = make("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        Policy(model, gradient_checkpointing=choice)


def test_models_without_mlp_are_refused() -> None:
    """Fails if `mlp` silently keeps everything, or dies with an AttributeError, for such a model."""
    model = make("llama")
    for layer in model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    with pytest.raises(ValueError, match="no module named mlp"):
        Policy(model, gradient_checkpointing="mlp")


def test_unknown_choice_is_refused() -> None:
    """Fails if a misspelt choice, or True of older code, leaves checkpointing off."""
    for choice in ("layers", True):
        with pytest.raises(ValueError, match="'none', 'layer' or 'mlp'"):
            Policy(make("llama"), gradient_checkpointing=choice)  # type: ignore[arg-type]  # that is refused
