"""The Triton kernels of turn_policy_loss against float64, on the GPU where there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atpo_kernels import LossConfig, turn_policy_loss
from atpo_kernels.arguments import Averaging, LossArguments, LossInputs, Structure
from atpo_kernels.choices import ClipFamily, KLEstimator, RatioLevel, Reduction
from atpo_kernels.turn_policy_loss import tiles
from atpo_kernels.turn_policy_loss.launch import Launch, PackedLoss, turn_policy_loss_triton
from bench.kernels.operators import variants
from tests.helpers import interpreter  # noqa: F401  (repairs Triton's interpreter)
from tests.helpers.interpreter import DEVICE, INTERPRETED
from tests.helpers.kernel_cases import NoHostSync, turn_offsets
from tests.helpers.turn_loss_cases import (
    BOUNDS,
    EVERY_TERM,
    assert_precise,
    converted,
    packed_case,
    padded_case,
    run,
    turn_clip,
)

LEVELS, CLIPS, REDUCTIONS, KLS = (get_args(x) for x in (RatioLevel, ClipFamily, Reduction, KLEstimator))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPS = [*((clip, 1.5) for clip in CLIPS), ("hard", None)]  # clip family, dual cap
# Pairs of a level and a clip, of an estimator and a dtype: padded kernels run one half of a chessboard, packed ones the
# other, so that each of a pair meets both kinds of kernels.
PADDED_CLIPS, PACKED_CLIPS = (
    [(level, clip) for (i, level), (j, clip) in product(enumerate(LEVELS), enumerate(CAPS)) if (i + j) % 2 == colour]
    for colour in (0, 1)
)
BLOCK = 32
# Empty turns, also the first and the last; one token; less than a block, a block, more than one; longer than two.
LENGTHS = [0, 5, 1, BLOCK, 0, BLOCK + 1, 2 * BLOCK + 7, 3, 0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Blocks of 32 tokens on every device, so that short rows and turns have several."""
    if "gpu" not in request.keywords:
        for table in (tiles._PACKED_BLOCKS, tiles._PADDED_BLOCKS):
            monkeypatch.setitem(table, DEVICE, ((BLOCK, 1),))


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("level", "clip"), PADDED_CLIPS)
def test_padded_clips(level: Any, clip: tuple[Any, float | None]) -> None:
    """Fails on an error in a ratio level, a clip or a cap: its value, its slope, or where it counts as clipped."""
    case = padded_case(3, 9)
    case["logprob"][0] += 0.5  # a row beyond both caps
    assert_precise(case, level=level, clip=clip[0], dual_cap=clip[1], max_log_ratio=0.6, **EVERY_TERM)


@pytest.mark.parametrize(("level", "clip"), PACKED_CLIPS)
def test_packed_clips(level: Any, clip: tuple[Any, float | None]) -> None:
    """The same for packed turns, some longer than a block, and with the trajectories of level sequence."""
    assert_precise(packed_case(LENGTHS), level=level, clip=clip[0], dual_cap=clip[1], **EVERY_TERM)


@pytest.mark.parametrize(("level", "clip"), [("turn", "hard"), ("token", "soft_high"), ("turn", "cispo")])
def test_clip_ranges_of_turns(level: Any, clip: Any) -> None:
    """Fails if a turn gets another's clip range, low and high are mixed up, or a range hides the number beside it."""
    ranges = turn_clip(len(LENGTHS))
    assert_precise(packed_case(LENGTHS) | ranges, level=level, clip=clip)
    assert_precise(packed_case(LENGTHS) | {"clip_high": ranges["clip_high"]}, level=level, clip=clip)


@pytest.mark.parametrize(("kl", "dtype"), list(product(KLS, DTYPES)), ids=str)
def test_kl_and_dtypes(kl: Any, dtype: torch.dtype) -> None:
    """Fails if an estimator or its slope is wrong, or half precision is not computed in float32."""
    if (KLS.index(kl) + DTYPES.index(dtype)) % 2:
        case = packed_case([3, 0, 40])
    else:
        case = padded_case(3, 12)
        case["ref_logprob"][0, :4] += torch.tensor([4.0, -4.0, 30.0, -30.0])  # beyond both clamps of low_var
    assert_precise(case, dtype, **EVERY_TERM | {"kl": kl})


@pytest.mark.parametrize(("level", "reduction"), list(product(LEVELS, REDUCTIONS)))
def test_padded_reductions_over_several_blocks(level: Any, reduction: Any) -> None:
    """Fails if a turn that crosses a block's border is cut, or a weight counts the wrong rows, turns or tokens."""
    case = padded_case(4, 2 * BLOCK + 9)
    case["mask"][0, 20:60] = True  # a turn over the whole of a block's rest and most of the next
    case["mask"][2] = True  # one turn over all blocks
    case["mask"][3, BLOCK - 1 : BLOCK + 1] = torch.tensor([True, False])  # one that ends with its block
    assert_precise(case, level=level, reduction=reduction, entropy_coef=0.1)
    if (LEVELS.index(level) + REDUCTIONS.index(reduction)) % 2:
        case = {name: value[:2] for name, value in case.items()} | {"mask": None}
        case["advantages"] = case["advantages"][:, 0]
        assert_precise(case, level=level, reduction=reduction, max_length=50)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none", "token-mean", "turn-mean"])
def test_packed_reductions(reduction: Any, masked: bool) -> None:
    """Fails if a weight is wrong, the mask is not counted, or advantages by turn go to another turn's tokens."""
    case = packed_case(LENGTHS)
    del case["weights"], case["paths"]
    rng = torch.Generator().manual_seed(1)
    case["mask"] = torch.rand(sum(LENGTHS), generator=rng) < 0.6 if masked else None
    for size, level in ((len(LENGTHS), "turn"), (sum(LENGTHS), "token")):
        case["advantages"] = torch.randn(size, generator=rng, dtype=torch.float64)
        assert_precise(case, level=level, reduction=reduction, entropy_coef=0.1)
    for denominator in (37.0, torch.tensor(37.0, device=DEVICE)):
        assert_precise(case, reduction=reduction, denominator=denominator)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "token-mean", "turn-mean", "seq-mean-token-sum-norm"])
def test_denominator(reduction: Any) -> None:
    """Fails if a denominator, a number or on the device, does not replace the number of rows or tokens."""
    for denominator in (37.0, torch.tensor(37, device=DEVICE)):
        assert_precise(padded_case(3, 9), reduction=reduction, denominator=denominator)


def test_padded_weights_of_zero_are_not_counted() -> None:
    """Fails if metrics count tokens with W0 = 0, or turns of which no token counts."""
    case = packed_case([3 * (2 * BLOCK + 5)])
    case = {name: case[name].view(3, -1) for name in ("logprob", "old_logprob", "entropy")} | {
        "weights": replace(
            case["weights"], **{n: getattr(case["weights"], n).view(3, -1) for n in ("pos", "neg", "all")}
        ),
        "mask": torch.rand(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(5)) < 0.7,
    }
    case["weights"].all[torch.rand(case["mask"].shape, generator=torch.Generator().manual_seed(2)) < 0.6] = 0
    assert_precise(case)
    assert_precise(case, level="token", reduction="none")


def test_turn_ids() -> None:
    """Fails if adjacent turns merge, a masked gap cuts a turn, or an id is lost at a block's border."""
    length = 2 * BLOCK + 6
    case = padded_case(3, length)
    starts = torch.rand(3, length, generator=torch.Generator().manual_seed(3)) < 0.12
    ids = (length - 1 - starts.cumsum(1)) % length  # not in rising order, and not from 0
    case["mask"][0, BLOCK - 6 : BLOCK + 3] = False  # a gap across a border, within a turn
    ids[0, BLOCK - 9 : BLOCK + 9] = 7
    case["turn_ids"] = torch.where(case["mask"], ids, -5)
    for level, reduction in (("turn", "turn-mean"), ("token", "turn-mean"), ("turn", "seq-mean-token-mean")):
        assert_precise(case, level=level, reduction=reduction, entropy_coef=0.1)
    case["turn_ids"][2], case["mask"][2] = torch.arange(length) // 20, True
    assert_precise(case, reduction="turn-mean")
    with pytest.raises(ValueError, match="must not be interrupted"):
        broken = converted(case, torch.float32)
        broken["turn_ids"][2, 5] = 3
        turn_policy_loss(**broken)


def test_many_trajectories() -> None:
    """Fails if paths beyond a block of 32, of a trajectory's turns or of a turn's trajectories, are lost."""
    assert_precise(packed_case([1 + i % 3 for i in range(70)], leaves=40), level="sequence", **EVERY_TERM)


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("packed", [False, True])
def test_garbage_outside_the_mask_is_not_seen(garbage: float, packed: bool) -> None:
    """Fails if padding reaches a result, also as 0 * inf."""
    case = padded_case(3, BLOCK + 9)
    if packed:
        case = {name: value.flatten() for name, value in case.items()} | {"turn_offsets": turn_offsets([50, 0, 40, 33])}
    dirty = {
        n: v if v.dtype == torch.bool or n == "turn_offsets" else v.where(case["mask"], garbage)
        for n, v in case.items()
    }
    for reduction in ("none", "turn-mean"):
        keywords = {"reduction": reduction, "impl": "triton", **EVERY_TERM, **BOUNDS}
        clean, other = (run(converted(x, torch.float32, DEVICE), **keywords) for x in (case, dirty))
        assert_same_bits(clean, other)
        assert not clean["coef"][~case["mask"].to(DEVICE)].any()


@pytest.mark.parametrize("packed", [False, True])
def test_nan_of_an_action_token_is_seen(packed: bool) -> None:
    """Fails if a clamp swallows a NaN: the trainer would not skip the step."""
    case = packed_case([5, 4, 3]) if packed else padded_case(2, 9)
    case = converted(case, torch.float32, DEVICE)
    case["logprob"].view(-1)[0] = torch.nan
    if not packed:
        case["mask"][0, 0] = True
    for level in LEVELS:
        assert run(case, impl="triton", level=level)["loss"].isnan()


def test_strided_inputs() -> None:
    """Fails if a stride is ignored."""
    case = converted(padded_case(3, 9), torch.float32, DEVICE)
    case["turn_ids"] = torch.arange(9, device=DEVICE).expand(3, 9) // 4
    strided = {name: value.mT.contiguous().mT for name, value in case.items()}
    expanded = {"advantages": case["advantages"][:, :1].expand(3, 9)}
    for change in ({}, expanded):
        assert_same_bits(*(run(x | change, impl="triton", **EVERY_TERM) for x in (case, strided)))
    packed = converted(packed_case([4, 3]), torch.float32, DEVICE)
    names = ("logprob", "old_logprob", "entropy")
    apart = packed | {name: torch.stack([packed[name]] * 2, 1)[:, 0] for name in names}
    assert not apart["logprob"].is_contiguous()
    assert_same_bits(*(run(x, impl="triton", level="sequence", entropy_coef=0.1) for x in (packed, apart)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0]], ids=str)
def test_few_packed_tokens(lengths: list[int], level: Any) -> None:
    """Fails if nothing to do is an error, or an empty turn adds anything; offsets are int64 here."""
    case = packed_case(lengths)
    case["turn_offsets"] = case["turn_offsets"].long()
    assert_precise(case, level=level, **EVERY_TERM)
    del case["weights"], case["paths"]
    case["advantages"] = torch.ones(len(lengths), dtype=torch.float64)
    if level != "sequence":
        assert_precise(case, level=level, reduction="turn-mean", **EVERY_TERM)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (7,), (3, 1)], ids=str)
def test_few_padded_tokens(shape: tuple[int, ...]) -> None:
    """Fails if an empty batch breaks, or a 1-D tensor is not one padded row."""
    rng = torch.Generator().manual_seed(0)
    names = ("logprob", "old_logprob", "advantages", "entropy")
    case = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name in names}
    reductions = ("seq-mean-token-mean", "token-mean", "turn-mean", "none")
    for level, reduction in zip(cycle(LEVELS), reductions, strict=False):
        assert_precise(case, level=level, reduction=reduction, entropy_coef=0.1)


@pytest.mark.parametrize("level", LEVELS)
def test_same_bits_every_time(level: Any) -> None:
    """Fails if sums depend on the order in which programs end."""
    case = converted(packed_case(LENGTHS), torch.float32, DEVICE)
    assert_same_bits(*(run(case, impl="triton", level=level, **EVERY_TERM) for _ in range(2)))
    case = converted(padded_case(3, 40), torch.float32, DEVICE)
    assert_same_bits(*(run(case, impl="triton", level=level, reduction="token-mean", **EVERY_TERM) for _ in range(2)))


def arguments(case: dict[str, Any], reduction: Any = "sum", **fields: Any) -> LossArguments:
    """What turn_policy_loss passes on, in float32."""
    given = converted(case, torch.float32, DEVICE)
    names = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy")
    structure = Structure(given.get("turn_offsets"), given.get("mask"), given.get("turn_ids"), given.get("paths"))
    return LossArguments(
        LossInputs(*(given.get(name) for name in names)),
        given.get("advantages"),
        given.get("weights"),
        structure,
        Averaging(reduction),
        LossConfig(**BOUNDS | fields),
    )


class Launches(TorchDispatchMode):
    """Counts launches of Triton kernels, and names the operations of PyTorch that would launch one."""

    FREE = (
        "aten::empty",
        "aten::new_empty",
        "aten::detach",
        "aten::unbind",
        "aten::select",
        "aten::view",
        "aten::alias",
    )

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.others: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.name().startswith(self.FREE):
            self.others.append(func.name())
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Count while active, and not what happens inside a launch: the interpreter copies tensors."""
        original = Launch.run

        def counted(launch: Launch) -> None:
            self.kernels += 1
            with torch._C._DisableTorchDispatch():
                original(launch)

        with monkeypatch.context() as patch, self:
            patch.setattr(Launch, "run", counted)
            yield


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "token-mean", "turn-mean", "none"])
def test_two_launches(monkeypatch: pytest.MonkeyPatch, packed: bool, reduction: Any) -> None:
    """Fails if a call takes more than two launches, by Triton or by PyTorch."""
    case = padded_case(3, 9)
    if packed:
        case = packed_case([5, 4, 3]) | {"advantages": torch.ones(3), "weights": None, "mask": torch.ones(12)}
    given = arguments(case, reduction, **EVERY_TERM)
    launches = Launches()
    with launches.counting(monkeypatch):
        turn_policy_loss_triton(given)
    assert (launches.kernels, launches.others) == (2, [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_waits_for_the_device(packed: bool, level: Any) -> None:
    """Fails if the host reads a number that is computed on the device."""
    given = arguments(packed_case(LENGTHS) if packed else padded_case(3, 9), level=level, **EVERY_TERM)
    with NoHostSync():
        turn_policy_loss_triton(given)


@pytest.mark.parametrize("level", ["token", "turn"])
@pytest.mark.parametrize("reduction", ["sum", "token-mean", "turn-mean"])
def test_packed_loss_in_ranges(level: Any, reduction: Any) -> None:
    """Fails if a range writes another's tokens, reads log-probs elsewhere, or an empty turn left out is summed."""
    case = packed_case(LENGTHS) | {"weights": None, "paths": None}
    case["advantages"] = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64)
    whole = arguments(case, reduction, level=level, **EVERY_TERM)
    expected = turn_policy_loss_triton(whole)
    inputs = replace(whole.inputs, logprob=torch.full_like(whole.inputs.logprob, torch.nan))
    loss = PackedLoss.prepare(replace(whole, inputs=inputs), nonempty_turns=6)
    loss.outputs.partial.fill_(torch.nan)
    starts = whole.structure.turn_offsets
    assert starts is not None
    logprob, entropy = (torch.full_like(inputs.logprob, torch.nan) for _ in range(2))
    for first, count in ((1, 2), (3, 1), (5, 3)):
        rows = slice(int(starts[first]), int(starts[first + count]))
        for known, value in ((logprob, whole.inputs.logprob), (entropy, whole.inputs.entropy)):
            assert value is not None
            known[rows] = value[rows]
        loss.turns(first, count, logprob, entropy)
        torch.testing.assert_close(loss.grad_logprob[rows], expected.grad_logprob[rows])  # right at once
    found = loss.finish()
    torch.testing.assert_close(
        (found.loss, found.grad_logprob, found.grad_entropy, found.metrics),
        (expected.loss, expected.grad_logprob, expected.grad_entropy, expected.metrics),
    )


def test_on_policy() -> None:
    """Fails if log-probs that arrive later are not taken as the old ones where these are not given."""
    case = packed_case(LENGTHS) | {"old_logprob": None}
    for level in LEVELS:
        assert_precise(case, level=level, **EVERY_TERM)
    given = arguments(case)
    loss = PackedLoss.prepare(replace(given, inputs=replace(given.inputs, logprob=given.inputs.logprob * torch.nan)))
    loss.turns(0, len(LENGTHS), given.inputs.logprob, given.inputs.entropy)
    assert float(loss.finish().metrics["ratio_max"]) == 1


def test_small_kl_is_exact() -> None:
    """Fails if exp(-x) - 1 + x or its slope is taken as it stands near 0, where the terms cancel."""
    gap = torch.logspace(-6, 1.2, 200, dtype=torch.float64)
    gap = torch.cat([gap, -gap]).float()
    exact = (-gap.double()).expm1() + gap.double(), -(-gap.double()).expm1()
    old = torch.zeros(400)
    case = {"logprob": gap, "old_logprob": old, "ref_logprob": old, "advantages": torch.zeros(400)}
    keywords: dict[str, Any] = {"level": "token", "kl": "k3", "kl_coef": 1.0, "reduction": "none", "impl": "triton"}
    ours = turn_policy_loss(**converted(case, torch.float32, DEVICE), **keywords)
    for found, value in zip((ours.loss, ours.coef), exact, strict=True):
        torch.testing.assert_close(found.double().cpu(), value, rtol=2e-6, atol=0)


@pytest.mark.skipif(DEVICE == "meta", reason="makes tensors without numbers, which the second device gives numbers")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_variants_say_all_that_compiling_needs(target: str) -> None:
    """Fails if a variant leaves out an argument of its kernel, or a block size of the wrappers is not among them."""
    found = variants("turn_policy_loss", target)
    for variant in found:
        assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names), variant.label
        assert not {*variant.types} & {*variant.constants}
    for kernel, blocks in (("_turns_kernel", tiles.PACKED_BLOCKS), ("_rows_kernel", tiles.PADDED_BLOCKS)):
        used = {(v.constants["BLOCK"], v.num_warps) for v in found if v.kernel.__name__ == kernel}
        assert used == set(blocks)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
@pytest.mark.parametrize("level", LEVELS)
def test_large_inputs_with_the_blocks_of_the_gpu(level: Any) -> None:
    """Fails if a block of the sizes that are used goes wrong, which the interpreter cannot tell."""
    for length in (200, 1000, 5000):
        assert_precise(padded_case(5, length), level=level, reduction="turn-mean", truth="torch", **EVERY_TERM)
    for mean in (20, 300, 4000):
        lengths = torch.randint(2 * mean, (20,), generator=torch.Generator().manual_seed(mean)).tolist()
        assert_precise(packed_case(lengths), level=level, truth="torch", **EVERY_TERM)
