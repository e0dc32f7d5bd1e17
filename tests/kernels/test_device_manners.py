"""How operators treat what belongs to the whole program: precision settings, the current device, compilers, graphs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import atpo_kernels
from atpo_kernels import devices, linear_logprob, linear_turn_policy_loss, tree_attention, turn_policy_loss
from tests.helpers import interpreter
from tests.helpers.interpreter import DEVICE
from tests.helpers.tree_cases import random_row

Call = Callable[[], Tensor]
BACKENDS: Any = torch.backends
KERNELS = Path(atpo_kernels.__file__).parent


def head() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=rng), torch.randn(20, 8, generator=rng)
    targets = torch.randint(20, (9,), generator=rng)
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def run_logprob(impl: str) -> Call:
    hidden, weight, targets = head()
    return lambda: linear_logprob(hidden, weight, targets, impl=impl)[0].sum()


def run_fused(impl: str) -> Call:
    hidden, weight, targets = head()
    offsets, advantages = torch.tensor([0, 4, 9]), torch.tensor([1.0, -1.0], device=DEVICE)
    given: dict[str, Any] = {"turn_offsets": offsets, "impl": impl}
    return lambda: linear_turn_policy_loss(hidden, weight, targets, None, advantages, **given).loss


def run_loss(impl: str) -> Call:
    logprob = torch.linspace(-1, 0, 9, device=DEVICE).requires_grad_()
    offsets, advantages = torch.tensor([0, 4, 9], device=DEVICE), torch.tensor([1.0, -1.0], device=DEVICE)
    return lambda: turn_policy_loss(logprob, None, advantages, turn_offsets=offsets, impl=impl).loss


def run_attention(impl: str) -> Call:
    q, k, v = (torch.linspace(-1, 1, 40 * 16, device=DEVICE).view(40, 1, 16).requires_grad_() for _ in range(3))
    end = random_row(40, 8, 0).to(DEVICE)
    return lambda: tree_attention(q, k, v, end, impl=impl).sum()


OPERATORS: dict[str, Callable[[str], Call]] = {
    "linear_logprob": run_logprob,
    "linear_turn_policy_loss": run_fused,
    "turn_policy_loss": run_loss,
    "tree_attention": run_attention,
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def test_float32_products_of_kernels_are_ieee() -> None:
    """Fails if a product leaves its precision to Triton, which multiplies float32 numbers as TF32."""
    loose, found = [], 0
    for path in sorted(KERNELS.rglob("kernels*.py")) + sorted(KERNELS.rglob("kernels/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.dot", "tl.dot_scaled"):
                found += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                loose += [] if given.get("input_precision") == "'ieee'" else [f"{path.name}:{node.lineno}"]
    assert found >= 10 and not loose


class Products(TorchDispatchMode):
    """Notes the precision in which every matrix product of PyTorch is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.name().startswith(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv")):
            kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
            self.seen.append(tuple(kind.fp32_precision for kind in kinds))  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))


@contextmanager
def allowed(setting: Callable[[], Any]) -> Iterator[None]:
    """Make a setting of the precision of float32 products, and take it back."""
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision()
    try:
        setting()
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for kind in kinds:
            kind.fp32_precision = "none"
        BACKENDS.fp32_precision = "none"


SETTINGS: dict[str, Callable[[], Any]] = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "tf32 everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("setting", SETTINGS)
@every_operator
def test_float32_products_of_pytorch_are_ieee(name: str, setting: str, impl: str) -> None:
    """Fails if a program that allows TF32 (on a CPU: bfloat16) gets it inside an operator, forward or backward, or has
    lost its setting afterwards."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    products = Products()
    with allowed(SETTINGS[setting]):
        before = (cuda.fp32_precision, cpu.fp32_precision)
        with products:
            OPERATORS[name](impl)().backward()
        after = (cuda.fp32_precision, cpu.fp32_precision)
        BACKENDS.fp32_precision = "ieee"
        follows = (cuda.fp32_precision, cpu.fp32_precision)
    assert after == before
    assert (follows == ("ieee", "ieee")) == (setting == "tf32 everywhere")  # a setting for all stays one for all
    at = 0 if DEVICE == "cuda" else 1
    assert all(seen[at] in ("ieee", "none") for seen in products.seen)
    assert products.seen or name == "turn_policy_loss" or (name, impl) == ("tree_attention", "triton")


@every_operator
def test_kernels_are_launched_on_the_device_of_their_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a launch, forward or backward, leaves it to the caller which of several GPUs is the current one."""
    guards, launches = [], []
    guard, launch = torch.cuda.device_of, interpreter.stock.GridExecutor.__call__

    @contextmanager
    def counted(tensor: Tensor) -> Iterator[None]:
        guards.append(tensor)
        with guard(tensor):
            yield
        guards.pop()

    def watched(executor: Any, *arguments: Any, **options: Any) -> None:
        launches.append((executor.fn.__name__, bool(guards)))
        launch(executor, *arguments, **options)

    monkeypatch.setattr(devices.torch.cuda, "device_of", counted)
    monkeypatch.setattr(interpreter.stock.GridExecutor, "__call__", watched)
    OPERATORS[name]("triton")().backward()
    assert launches and all(guarded for _, guarded in launches), launches


REASON = "the operators of atpo_kernels are not traced"
INSIDE = {"addmm", "mm", "exp", "exp2", "log2", "gather", "scatter_add_", "mean", "searchsorted", "repeat_interleave"}


@every_operator
def test_compiled_models_call_operators_as_they_are(name: str) -> None:
    """Fails if torch.compile looks into an operator: many graphs where there is one break around the call."""
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    operator = OPERATORS[name]("torch")

    def model(x: Tensor) -> Tensor:
        return (x * 2).sum() + operator() * 3

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks and all(REASON in reason for reason in breaks), breaks
    assert called and not {name for name in called if name.removeprefix("aten.") in INSIDE}
    torch._dynamo.reset()
    with pytest.raises(Exception, match=REASON):
        torch.compile(model, backend=backend, fullgraph=True)(x)


def test_a_captured_graph_plans_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if turn_offsets on the device end a CUDA graph's capture with an error of CUDA, or rows are counted on the
    host while a graph is captured, which would wait for a device that does not run."""
    launch = import_module("atpo_kernels.linear_turn_policy_loss.launch")
    monkeypatch.setattr(launch, "_is_capturing", lambda _: True)
    monkeypatch.setattr(launch.KeptRows, "wait", lambda _: pytest.fail("the host waits for the device"))
    run_fused("triton")().backward()
    offsets = torch.empty(3, dtype=torch.int32, device="cuda" if DEVICE == "cuda" else "meta")
    with pytest.raises(RuntimeError, match="give them on the CPU"):
        launch._on_host(offsets)
