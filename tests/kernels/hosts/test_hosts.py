"""What holds for all adapters, without their hosts: imports, averages over micro-batches and ranks, credit."""

from __future__ import annotations

import pkgutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atpo_fast import TurnTree, assign_credit
from atpo_kernels import FusedLinearTurnPolicyLoss, hosts, turn_policy_loss
from atpo_kernels.hosts import prime_rl, slime
from atpo_kernels.hosts.credit import return_advantages, tree_advantages, turn_spans
from atpo_kernels.hosts.openrlhf import TurnPolicyLoss
from atpo_kernels.hosts.plain import LossHead, add_turn_loss
from atpo_kernels.hosts.verl.loss import policy_loss
from tests.helpers.absent_packages import run_without
from tests.helpers.forked_runs import ForkedProcess, finish
from tests.helpers.policies import make

B, T = 6, 12
CLIP: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.15}
FOLDER = Path(hosts.__path__[0])


def test_import_without_hosts_and_triton() -> None:
    """Fails if an adapter needs its host, another host, Triton or transformers to be imported."""
    names = [m.name for m in pkgutil.walk_packages(hosts.__path__, "atpo_kernels.hosts.")]
    names = [n for n in names if not n.endswith((".plugin", ".__main__"))]
    assert "atpo_kernels.hosts.trl.trainers" in names and "atpo_kernels.hosts.slime" in names
    absent = ("triton", "transformers", "trl", "verl", "skyrl", "openrlhf", "prime_rl", "slime")
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    finish(ForkedProcess(run_without, absent, code, *names))


def test_adapters_stay_small() -> None:
    """Fails if an adapter grows beyond what one reads at once; credit is no adapter."""
    sizes = {p.relative_to(FOLDER): len(p.read_text().splitlines()) for p in FOLDER.rglob("*.py")}
    assert {p: n for p, n in sizes.items() if n > 80 and p.name != "credit.py"} == {}


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Log-probs, advantages and mask; row 1 has no action tokens."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    mask = torch.rand(B, T, generator=rng) < 0.7
    mask[1] = False
    old = -normal(B, T).abs()
    return {"old": old, "logprob": old + 0.3 * normal(B, T), "advantages": normal(B, T), "mask": mask}


def by_verl(mode: str, rows: dict[str, Tensor], whole: dict[str, Tensor], ranks: int) -> Tensor:
    """The loss of some rows as verl asks for it."""
    tokens = int(whole["mask"].sum())
    info = {"dp_size": ranks, "batch_num_tokens": tokens, "global_batch_size": B, "loss_scale_factor": None}
    config = SimpleNamespace(clip_ratio_low=0.1, clip_ratio_high=0.15, global_batch_info=info)
    return policy_loss(rows["old"], rows["logprob"], rows["advantages"], rows["mask"], mode, config)[0]


def by_openrlhf(mode: str, rows: dict[str, Tensor], whole: dict[str, Tensor], ranks: int) -> Tensor:
    """The loss of some rows as OpenRLHF asks for it."""
    counts: dict[str, Any] = {"batch_num_tokens": int(whole["mask"].sum()), "global_batch_size": B, "dp_size": ranks}
    loss = TurnPolicyLoss(0.1, 0.15, token_level_loss=mode == "token-mean")
    return loss(rows["logprob"], rows["old"], rows["advantages"], rows["mask"], **counts)[0]


@dataclass
class LossOutputs:
    """prime-rl's record of that name (commit 559b447)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class LossInputs:
    """prime-rl's record of that name (commit 559b447)."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = field(default=None)


@pytest.fixture
def absent_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the adapters call of hosts that are not on PyPI: prime-rl's record, slime's log-probs from logits."""

    def module(name: str, **names: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(names)
        for end in range(1, name.count(".") + 1):
            parent = name.rsplit(".", end)[0]
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        monkeypatch.setitem(sys.modules, name, made)

    def from_logits(logits: Tensor, *, response_lengths: list[int], **_: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        parts = list(logits.split(response_lengths))
        return logits[:0], {"log_probs": parts, "entropy": [x.detach().abs() for x in parts]}

    module("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    log_probs = {"get_log_probs_and_entropy": from_logits, "get_rollout_top_p_logprob_kwargs": lambda *_: {}}
    module("slime.backends.megatron_utils.loss", **log_probs)


def by_prime_rl(mode: str, rows: dict[str, Tensor], whole: dict[str, Tensor], ranks: int) -> Tensor:
    """The loss of some rows as prime-rl asks for it: one by one, divided by the tokens of all."""
    total: Any = 0
    for logprob, old, a, mask in zip(*(rows[k] for k in ("logprob", "old", "advantages", "mask")), strict=True):
        out = prime_rl.loss(LossInputs(logprob, old, None, a / 2, mask, torch.full_like(a, 2.0)), **CLIP)
        assert isinstance(out, LossOutputs)
        total = total + out.loss
    return total / whole["mask"].sum() * ranks


def by_slime(mode: str, rows: dict[str, Tensor], whole: dict[str, Tensor], ranks: int) -> Tensor:
    """The loss of some rows as slime asks for it: rows of different lengths, averaged by its own function."""
    lengths = [T - i % 3 for i in range(len(rows["mask"]))]
    cut = lambda x: [row[:n] for row, n in zip(x, lengths, strict=True)]  # noqa: E731
    masks = cut(rows["mask"].double())

    def sum_of_sample_mean(x: Tensor) -> Tensor:
        parts = zip(x.split(lengths), masks, strict=True)
        return torch.stack(
            [(a * m).sum() / (1 if mode == "token-mean" else m.sum().clamp(min=1)) for a, m in parts]
        ).sum()

    args = SimpleNamespace(**OPTIONS_OF_SLIME)
    given: dict[str, Any] = {"log_probs": cut(rows["old"]), "advantages": cut(rows["advantages"]), "loss_masks": masks}
    given |= {"response_lengths": lengths, "total_lengths": lengths, "unconcat_tokens": None}
    loss, logged = slime.policy_loss(args, given, torch.cat(cut(rows["logprob"])), sum_of_sample_mean)
    assert {"loss", "pg_loss", "entropy_loss", "clipped_low"} <= logged.keys()
    return loss / (whole["mask"].sum() if mode == "token-mean" else B) * ranks


OPTIONS_OF_SLIME: dict[str, Any] = {
    **{"use_rollout_logprobs": False, "use_opsm": False, "use_tis": False, "get_mismatch_metrics": False},
    **{"use_kl_loss": False, "entropy_coef": 0.0, "eps_clip": 0.1, "eps_clip_high": 0.15, "eps_clip_c": None},
}
ADAPTERS = [(by_verl, "token-mean"), (by_verl, "seq-mean-token-mean"), (by_verl, "token-sum")]
ADAPTERS += [(by_openrlhf, "token-mean"), (by_openrlhf, "seq-mean-token-mean")]
ADAPTERS += [(by_prime_rl, "token-mean"), (by_slime, "token-mean"), (by_slime, "seq-mean-token-mean")]


@pytest.mark.usefixtures("absent_hosts")
@pytest.mark.parametrize(("adapter", "mode"), ADAPTERS, ids=lambda x: getattr(x, "__name__", x))
def test_micro_batches_and_ranks_add_up(adapter: Any, mode: str) -> None:
    """Fails if three micro-batches, or two ranks whose gradients are averaged, give another gradient than one batch.

    verl's gradient was three times too large with three micro-batches while the counts of the batch were not read.
    """
    whole = batch()
    if adapter is by_slime:  # its rows have lengths
        whole["mask"] = whole["mask"] & (torch.arange(T) < torch.tensor([[T - i % 3] for i in range(B)]))
    expected = gradient(lambda rows: adapter(mode, rows, whole, 1), whole)
    for size, ranks in ((2, 1), (3, 2)):
        if adapter is by_slime and size == 2:
            continue  # the lengths above have a period of 3
        parts = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, B, size)]
        found = [gradient(lambda rows, ranks=ranks: adapter(mode, rows, whole, ranks), part) for part in parts]
        torch.testing.assert_close(torch.cat(found) / ranks, expected, rtol=1e-11, atol=1e-13)
    reduction: Any = "sum" if mode == "token-sum" else mode
    direct = gradient(lambda rows: plain_loss(rows, reduction), whole)
    torch.testing.assert_close(expected, direct, rtol=1e-11, atol=1e-13)


def gradient(loss: Any, rows: dict[str, Tensor]) -> Tensor:
    """d loss / d log-probs."""
    leaf = rows["logprob"].clone().requires_grad_()
    return torch.autograd.grad(loss({**rows, "logprob": leaf}), leaf)[0]


def plain_loss(rows: dict[str, Tensor], reduction: Any) -> Tensor:
    """The loss without an adapter."""
    given = rows["logprob"], rows["old"], rows["advantages"]
    return turn_policy_loss(*given, mask=rows["mask"], reduction=reduction, **CLIP).loss


@pytest.mark.usefixtures("absent_hosts")
@pytest.mark.parametrize("option", ["use_opsm", "use_tis", "use_kl_loss"])
def test_slime_refuses_by_name(option: str) -> None:
    """Fails if an option of slime that the loss does not have is dropped without a word."""
    args = SimpleNamespace(**OPTIONS_OF_SLIME | {option: True})
    with pytest.raises(ValueError, match=option):
        slime.policy_loss(args, {}, torch.zeros(1), torch.sum)


def random_trees(rng: np.random.Generator) -> list[TurnTree]:
    """Trees of random shape with rewards; one leaf counts twice."""
    trees = []
    for t in range(3):
        tree = TurnTree([1, 2], question_id=str(t))
        turns = [0]
        for _ in range(8):
            parent = int(rng.choice(turns))
            size = int(rng.integers(1, 4))
            ids = [*rng.integers(3, 50, size - 1).tolist(), 100 + len(tree)]
            turns.append(tree.add_turn(parent, ids, (-rng.random(size)).tolist(), [51, 52]))
        for leaf in tree.leaves:
            tree.set_reward(leaf, float(rng.integers(3)))
        trees.append(tree)
    return trees


def written_out(trees: list[TurnTree]) -> dict[str, Any]:
    """Rows of all leaves: ids, mask, log-probs and advantages by token, rewards, groups."""
    rows: dict[str, list[Any]] = {name: [] for name in ("ids", "mask", "logprobs", "advantages", "rewards", "groups")}
    for t, tree in enumerate(trees):
        for leaf in tree.leaves:
            path = tree.path(leaf)[1:]
            assert tree.advantages is not None
            parts: dict[str, list[float]] = {"ids": [], "mask": [], "logprobs": [], "advantages": []}
            for n in path:
                turn, a = tree.turns[n], tree.advantages[n]
                for name, action, other in (
                    ("ids", turn.action_ids, turn.observation_ids),
                    ("mask", np.ones(len(turn.action_ids)), np.zeros(len(turn.observation_ids))),
                    ("logprobs", turn.logprobs, np.zeros(len(turn.observation_ids))),
                    ("advantages", np.full(len(turn.action_ids), a), np.zeros(len(turn.observation_ids))),
                ):
                    parts[name] += [*map(float, action), *map(float, other)]
            for name, values in parts.items():
                rows[name].append(torch.tensor(values, dtype=torch.float64))
            rows["rewards"].append(tree.turns[leaf].reward)
            rows["groups"].append(t)
    padded = {
        k: nn.utils.rnn.pad_sequence(rows[k], batch_first=True) for k in ("ids", "mask", "logprobs", "advantages")
    }
    return padded | {"rewards": torch.tensor(rows["rewards"], dtype=torch.float64), "groups": rows["groups"]}


@pytest.mark.parametrize("seed", range(3))
def test_tree_advantages_are_those_of_the_trainer(seed: int) -> None:
    """Fails if the tree is not found again from its rows, or values are backed up otherwise than in atpo_fast."""
    trees = random_trees(np.random.default_rng(seed))
    for value, logprobs in (("child_softmax", True), ("child_mean", False)):
        assign_credit(trees, "at2po", value=value)
        rows = written_out(trees)
        found = tree_advantages(
            rows["ids"], rows["mask"], rows["rewards"], rows["groups"], rows["logprobs"] if logprobs else None
        )
        torch.testing.assert_close(found, rows["advantages"], rtol=1e-9, atol=1e-9)


def test_return_advantages_are_those_of_the_trainer() -> None:
    """Fails if a reward goes to another turn, or returns are standardised otherwise than in atpo_fast."""
    rng = np.random.default_rng(0)
    trees = []
    for t in range(4):  # chains of two questions
        tree = TurnTree([1], question_id=str(t % 2))
        at = 0
        for _ in range(int(rng.integers(1, 4))):
            at = tree.add_turn(at, [int(rng.integers(3, 9))], [-0.5], [4])
        tree.set_reward(at, float(t))
        tree.turn_rewards = rng.random(len(tree))
        trees.append(tree)
    assign_credit(trees, "gtpo", discount=0.8)
    rows = written_out(trees)
    rewards = torch.zeros(rows["mask"].shape, dtype=torch.float64)
    for i, tree in enumerate(trees):
        spans = turn_spans(rows["mask"][i])
        for (_, end), extra in zip(spans, tree.turn_rewards[1:], strict=True):  # type: ignore[index]
            rewards[i, end - 1] = extra
        rewards[i, spans[-1][1]] += float(i)  # the outcome may stand after the last action token
    found = return_advantages(rewards, rows["mask"], [i % 2 for i in range(4)], 0.8)
    torch.testing.assert_close(found, rows["advantages"], rtol=1e-9, atol=1e-9)


def test_loss_head() -> None:
    """Fails if a batch given by name gives logits, if log-probs are not those of the loss, or ties are cut."""
    model = make("qwen3")
    plain = make("qwen3")
    loss = FusedLinearTurnPolicyLoss(temperature=0.7, epsilon_low=0.1, epsilon_high=0.15)
    add_turn_loss(model, loss)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    logits = plain(input_ids=ids).logits[:, 3:-1] / 0.7
    table = logits.log_softmax(-1)
    expected = table.gather(-1, ids[:, 4:, None])[..., 0]
    logprob, entropy = model(input_ids=ids, turn_loss={"selected_token_ids": ids[:, 4:]})
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1))
    batch = {"selected_token_ids": ids[:, 4:], "attention_mask": torch.ones(3, 5), "advantages": torch.arange(3.0)}
    value, _ = model(input_ids=ids, turn_loss=batch)
    theirs = turn_policy_loss(expected, None, batch["advantages"].double(), mask=batch["attention_mask"])
    torch.testing.assert_close(value, theirs.loss)
    with pytest.raises(TypeError, match="attention_mask"):
        model.lm_head(torch.zeros(3, 5, 32), advantages=batch["advantages"])
    with pytest.raises(TypeError, match=r"expected torch.nn.Linear"):
        LossHead(nn.Identity(), loss)  # type: ignore[arg-type]


def test_autocast() -> None:
    """Fails if hidden states of autocast's bfloat16 are not taken, or are scored in bfloat16."""
    head = LossHead(nn.Linear(32, 50), FusedLinearTurnPolicyLoss())
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, ones = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5)
    expected = head(hidden.float(), selected_token_ids=ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, metrics = head(hidden, ids, ones, torch.ones(2), old_per_token_logps=expected.detach())
        assert torch.equal(head(hidden, selected_token_ids=ids)[0], expected)
    assert metrics.by_name["ratio_max"] == 1


def test_shapes_of_other_trainers() -> None:
    """Fails if advantages (B, 1) or importance weights (B,) are refused, or spread over the wrong axis."""
    rows, one = batch(), torch.linspace(-1, 1, B, dtype=torch.float64)
    losses = [turn_policy_loss(rows["logprob"], rows["old"], x, mask=rows["mask"]).loss for x in (one, one[:, None])]
    torch.testing.assert_close(losses[0], losses[1])
    hidden, weight = torch.randn(B, T, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    loss, trust = FusedLinearTurnPolicyLoss(), one.abs()
    values = [
        loss(hidden, weight, torch.zeros(B, T, dtype=torch.long), rows["mask"], one, vllm_is_ratio=x)[0]
        for x in (trust, trust[:, None], trust[:, None].expand(B, T))
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
