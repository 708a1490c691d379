"""Layers in FP8: values and gradients against float64 within what rounding to FP8 costs, and as PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import deep_gemm
from deep_gemm import functional, reference
from deep_gemm.errors import InvalidInputError
from deep_gemm.quantize import (
    per_block_cast_back,
    per_block_cast_to_fp8,
    per_token_cast_back,
    per_token_cast_to_fp8,
    swiglu_cast_to_fp8,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
SHAPES = [(1, 1, 1), (7, 70, 33), (50, 256, 128), (130, 16, 8), (200, 384, 264), (3, 129, 257)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = torch.ops.deep_gemm


@pytest.fixture
def alignment(request: pytest.FixtureRequest) -> Iterator[int]:
    before = deep_gemm.get_mk_alignment_for_contiguous_layout()
    deep_gemm.set_mk_alignment_for_contiguous_layout(request.param)
    yield request.param
    deep_gemm.set_mk_alignment_for_contiguous_layout(before)


each_alignment = pytest.mark.parametrize("alignment", [64, 128, 192, 256], indirect=True)


class Calls(TorchDispatchMode):
    """The names of this package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deep_gemm":
            self.names.append(func._schema.name.removeprefix("deep_gemm::"))
        return func(*args, **(kwargs or {}))


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def layout_of(counts: list[int], alignment: int, m: int | None = None, gap: int = 0) -> torch.Tensor:
    """Groups of so many rows, starting at multiples of the alignment, with `gap` alignments of padding before each.

    m: rows in all; None: up to the last one that is real.
    """
    layout = torch.full((100_000,), -1, dtype=torch.int32)
    start = end = 0
    for group, count in enumerate(counts):
        start += gap * alignment
        layout[start : start + count] = group
        end = start + count if count else end
        start += -(-count // alignment) * alignment
    assert m is None or m >= end
    return layout[: end if m is None else m].clone()


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def of_rounding(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """How far a cast may be from x: half of E4M3's last place, and what the division and the product round."""
    return torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20) + x.abs() * 2**-22


def check_product(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, per_row: bool, bf16: bool = True) -> None:
    """got is x @ w.T, element by element within a bound; per_row: w is quantised per 1x128, else per 128x128."""
    cast, back = (
        (per_token_cast_to_fp8, per_token_cast_back) if per_row else (per_block_cast_to_fp8, per_block_cast_back)
    )
    a, b = per_token_cast_to_fp8(x), cast(w)
    of_x, of_w = (
        of_rounding(each.double(), inverse(torch.ones_like(each).to(torch.float8_e4m3fn), scales).double())
        for each, scales, inverse in ((x, a[1], per_token_cast_back), (w, b[1], back))
    )
    x, w = x.double(), w.double()
    quantised = of_x @ w.abs().T + x.abs() @ of_w.T + of_x @ of_w.T
    scales = b[1].repeat_interleave(128, 0)[: len(w)] if not per_row else b[1]
    sum_of, bound = per_column_bound(a, (b[0], scales), exact=got.is_cuda)
    bound = 4 * bound  # K may be split on a GPU, and on a CPU the sum is of any order
    bound = reference.bf16_bound(sum_of, bound) if bf16 else bound
    error = (got.double() - x @ w.T).abs()
    assert bool((error <= quantised + bound + 2.0**-8 * got.double().abs()).all())
    assert bool(((got.double() - sum_of).abs() <= bound + 2.0**-8 * got.double().abs() * bf16 + 1e-7).all())


def per_column_bound(a: Any, b: Any, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.truth_and_bound for scales of every row of b."""
    values, scales = b
    truth = torch.zeros(len(a[0]), len(values), dtype=torch.float64, device=values.device)
    bound = torch.zeros_like(truth)
    for i in range(len(values)):  # a row of b has a block of scales to itself
        one = reference.truth_and_bound(*a, values[i : i + 1], scales[i : i + 1], exact=exact)
        truth[:, i], bound[:, i] = one[0][:, 0], one[1][:, 0]
    return truth, bound


def near(got: torch.Tensor, want: torch.Tensor, most: float = 0.045) -> None:
    """As near as FP8 is: rounding at random to 4 significant bits costs 2.6 % an operand, two of them 3.7 %."""
    got, want = got.detach().double().flatten(), want.detach().double().flatten()
    assert float((got - want).norm()) <= most * float(want.norm())
    if want.any():
        assert float(torch.nn.functional.cosine_similarity(got, want, 0)) > 1 - most**2


@on_each_device
@pytest.mark.parametrize("m, k, n", SHAPES)
def test_values_and_gradients_are_within_bounds(device: str, m: int, k: int, n: int) -> None:
    x, w = leaves(randn(m, k, device=device), randn(n, k, device=device) / k**0.5)
    dy = randn(m, n, device=device, seed=1)
    y = functional.linear(x, w)
    y.backward(dy)
    check_product(y.detach(), x.detach(), w.detach(), per_row=False)
    check_product(x.grad, dy, w.detach().T, per_row=False)
    check_product(w.grad, dy.T, x.detach().T, per_row=True, bf16=False)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_beside_those_of_floats(device: str, dtype: torch.dtype) -> None:
    m, k, n = 300, 320, 200
    x, w, bias = leaves(
        randn(m, k, device=device, dtype=dtype), randn(n, k, device=device), randn(n, device=device, dtype=dtype)
    )
    dy = randn(m, n, device=device, dtype=dtype)
    y = functional.linear(x, w, bias)
    y.backward(dy)
    x2, w2, bias2 = leaves(x.double(), w.double(), bias.double())
    want = torch.nn.functional.linear(x2, w2, bias2)
    want.backward(dy.double())
    assert y.dtype == dtype and [t.grad.dtype for t in (x, w, bias)] == [dtype, torch.float32, dtype]
    for got, truth in ((y, want), (x.grad, x2.grad), (w.grad, w2.grad)):
        near(got, truth)
    near(bias.grad, bias2.grad, 0.01)


@on_each_device
def test_bits_are_those_of_the_multiplications(device: str) -> None:
    m, k, n = 200, 256, 384
    x, w = leaves(randn(m, k, device=device, dtype=torch.bfloat16), randn(n, k, device=device))
    dy = randn(m, n, device=device, dtype=torch.bfloat16)
    y = functional.linear(x, w)
    y.backward(dy)
    values, scales = per_block_cast_to_fp8(w)
    want = [
        torch.empty(s, dtype=t, device=device) for s, t in (((m, n), x.dtype), ((m, k), x.dtype), ((n, k), w.dtype))
    ]
    deep_gemm.fp8_gemm_nt(per_token_cast_to_fp8(x), (values, scales), want[0])
    deep_gemm.fp8_gemm_nt(per_token_cast_to_fp8(dy), (values.mT.contiguous(), scales.mT), want[1])
    padded = [torch.nn.functional.pad(t.detach(), (0, 0, 0, 8)).mT for t in (dy, x)]
    deep_gemm.fp8_gemm_nt(*(per_token_cast_to_fp8(t) for t in padded), want[2], recipe=(1, 1, 128))
    for got, bits in zip((y, x.grad, w.grad), want, strict=True):
        assert torch.equal(got, bits)
    pair = functional.linear(x, (values, scales))
    assert torch.equal(pair, y) and torch.equal(torch.autograd.grad(pair, x, dy)[0], x.grad)


@on_each_device
def test_nothing_is_computed_that_nobody_asked_for(device: str) -> None:
    x, w = randn(32, 64, device=device), randn(48, 64, device=device)
    pair = per_block_cast_to_fp8(w)
    for by_x, by_w in ((False, False), (True, False), (False, True), (True, True)):
        given = x.clone().requires_grad_(by_x), w.clone().requires_grad_(by_w)
        with Calls() as calls:
            y = functional.linear(*given)
            if y.requires_grad:
                y.sum().backward()
        assert calls.names == ["linear"] + ["linear_dgrad"] * by_x + ["linear_wgrad"] * by_w
        assert [t.grad is not None for t in given] == [by_x, by_w] and y.requires_grad == (by_x or by_w)
    given = leaves(x, w)
    with Calls() as calls:
        functional.linear(given[0], pair).sum().backward()
    assert calls.names == ["linear", "linear_dgrad"]
    with torch.no_grad():
        assert not functional.linear(*given).requires_grad


@on_each_device
def test_what_is_kept_for_gradients(device: str) -> None:
    x, w = randn(32, 64, device=device), randn(48, 64, device=device)
    layout = torch.zeros(128, dtype=torch.int32, device=device)
    rows, stack = randn(128, 128, device=device), randn(1, 48, 64, device=device)

    def kept(call: Callable[[], torch.Tensor]) -> list[int]:
        pointers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (pointers.append(t.data_ptr()), t)[1], lambda t: t):
            call()
        return pointers

    tracked = x.clone().requires_grad_()
    assert kept(lambda: functional.linear(tracked, w)) == [w.data_ptr()]
    tracked_w = w.clone().requires_grad_()
    assert kept(lambda: functional.linear(x, tracked_w)) == [x.data_ptr()]
    tracked = rows.clone().requires_grad_()
    pointers = kept(lambda: functional.grouped_linear(tracked, stack, layout, swiglu=True))
    assert set(pointers) == {tracked.data_ptr(), stack.data_ptr(), layout.data_ptr()}


@on_each_device
@pytest.mark.parametrize("m, k, n", [(0, 64, 32), (5, 0, 32), (5, 64, 0), (0, 0, 0)])
def test_empty(device: str, m: int, k: int, n: int) -> None:
    x, w, bias = leaves(randn(m, k, device=device), randn(n, k, device=device), randn(n, device=device))
    y = functional.linear(x, w, bias)
    y.sum().backward()
    assert torch.equal(y, bias.expand(m, n)) and torch.equal(bias.grad, torch.full_like(bias, m))
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(w.grad, torch.zeros_like(w))


@on_each_device
def test_leading_dimensions_and_strides(device: str) -> None:
    w = randn(24, 48, device=device)
    x = randn(2, 3, 5, 48, device=device)
    want = functional.linear(x.view(30, 48), w)
    assert torch.equal(functional.linear(x, w), want.view(2, 3, 5, 24))
    assert torch.equal(functional.linear(x.view(30, 48).T.contiguous().T, w), want)
    assert torch.allclose(functional.linear(x[0, 0, 0], w), want[0], atol=1e-2)
    assert functional.linear(x[:0], w).shape == (0, 3, 5, 24)
    dy = randn(24, 30, device=device).T  # a gradient that is not contiguous
    grads = [torch.autograd.grad(functional.linear(t, w), t, dy.reshape(*t.shape[:-1], 24)) for t in leaves(x)]
    near(grads[0][0], (dy @ w).view_as(x))


def test_gradients_of_gradients_are_an_error() -> None:
    x, w = leaves(randn(16, 32, device="cpu"), randn(16, 32, device="cpu"))
    for i in range(2):
        (first,) = torch.autograd.grad(functional.linear(x, w).square().sum(), (x, w)[i], create_graph=True)
        with pytest.raises(
            NotImplementedError, match="gradients of gradients of FP8 layers are not offered: leave out"
        ):
            first.sum().backward()


@on_each_device
def test_autocast(device: str) -> None:
    x, w, bias = leaves(randn(16, 32, device=device), randn(16, 32, device=device), randn(16, device=device))
    with torch.autocast(device, torch.bfloat16):
        y = functional.linear(x, w, bias)
        assert y.dtype == torch.nn.functional.linear(x, w, bias).dtype == torch.bfloat16
        y.sum().backward()
    assert [t.grad.dtype for t in (x, w, bias)] == [torch.float32] * 3
    assert torch.equal(y, functional.linear(x.bfloat16(), w, bias))
    with torch.autocast(device, enabled=False):
        assert functional.linear(x, w).dtype == torch.float32


@on_each_device
def test_gradients_of_a_small_loss_need_it_multiplied(device: str) -> None:
    x, w = randn(64, 64, device=device), randn(48, 64, device=device)
    dy = 1e-10 * randn(64, 48, device=device)
    errors = []
    for scale in (1.0, 2.0**20):
        given = leaves(x, w)
        (functional.linear(*given) * (dy * scale)).sum().backward()
        pairs = [(given[0].grad / scale, dy @ w), (given[1].grad / scale, dy.T @ x)]
        errors.append([float((got - want).norm() / want.norm()) for got, want in pairs])
    assert min(errors[0]) > 0.3 and max(errors[1]) < 0.045


def test_meta_tensors_have_no_autocast() -> None:
    x = torch.ones(5, 64, device="meta")
    assert functional.linear(x, torch.ones(48, 64, device="meta")).shape == (5, 48)


@pytest.fixture
def comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's check of schemas compares inputs before and after with allclose, which E4M3 does not have."""
    allclose = torch.allclose

    def same(x: torch.Tensor, y: torch.Tensor, *args: Any, **keywords: Any) -> bool:
        if x.dtype == torch.float8_e4m3fn:
            return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        return allclose(x, y, *args, **keywords)

    monkeypatch.setattr(torch, "allclose", same)


def problems(device: str) -> dict[str, tuple[Any, ...]]:
    x, w, dy = randn(24, 70, device=device), randn(33, 70, device=device), randn(24, 33, device=device)
    rows, stack = randn(256, 140, device=device), randn(2, 33, 70, device=device)
    d_rows, layout = randn(256, 33, device=device), layout_of([100, 72], 128, 256).to(device)
    return {
        "linear": (x.requires_grad_(), w.requires_grad_(), None),
        "linear frozen": (x, *per_block_cast_to_fp8(w)),
        "linear_dgrad": (dy, w.detach(), None),
        "linear_wgrad": (dy, x.detach(), torch.bfloat16),
        "grouped_linear": (rows.requires_grad_(), stack.requires_grad_(), None, layout, True),
        "grouped_linear frozen": (rows, *per_block_cast_to_fp8(stack), layout, True),
        "grouped_linear_dgrad": (d_rows, stack.detach(), None, layout),
        "grouped_linear_wgrad": (d_rows, rows.detach(), layout, 2, True, torch.float32),
    }


@on_each_device
@pytest.mark.parametrize("name", problems("cpu"))
def test_operators(comparable: None, name: str, device: str) -> None:
    operator = getattr(OPS, name.split()[0]).default
    assert set(library.opcheck(operator, problems(device)[name]).values()) == {"SUCCESS"}


def backends(device: str) -> list[str]:
    return ["aot_eager", "inductor"] if device == "cuda" else ["aot_eager"]


@on_each_device
def test_compiled(device: str) -> None:
    w, bias = leaves(randn(33, 70, device=device), randn(33, device=device))
    pair = per_block_cast_to_fp8(w)

    def layers(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.linear(x, w, bias).sin() @ w, pair)

    for backend in backends(device):
        torch._dynamo.reset()
        compiled = torch.compile(layers, fullgraph=True, backend=backend, dynamic=True)
        for m in (24, 5, 40):
            x = leaves(randn(m, 3, 70, device=device))[0]
            y, want = compiled(x, w, bias), layers(x, w, bias)
            dy = randn(m, 3, 33, device=device)
            grads, wanted = (torch.autograd.grad(each, (x, w, bias), dy) for each in (y, want))
            for got, truth in zip((y, *grads), (want, *wanted), strict=True):
                near(got, truth, 0.02 if backend == "inductor" else 1e-6)


@on_each_device
def test_compiled_groups(device: str) -> None:
    layout = layout_of([100, 0, 72], 128, 384).to(device)
    w1, w2 = leaves(randn(3, 64, 48, device=device), randn(3, 40, 32, device=device))

    def layers(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
        return functional.grouped_linear(functional.grouped_linear(x, w1, layout), w2, layout, swiglu=True)

    for backend in backends(device):
        torch._dynamo.reset()
        compiled = torch.compile(layers, fullgraph=True, backend=backend)
        x = leaves(randn(384, 48, device=device))[0]
        results = []
        for call in (compiled, layers):
            y = call(x, w1, w2, layout)
            results.append((y, *torch.autograd.grad(y, (x, w1, w2), torch.ones_like(y))))
        for got, truth in zip(*results, strict=True):
            near(got, truth, 0.02 if backend == "inductor" else 1e-6)


def test_exported() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(randn(33, 70, device="cpu"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, self.w)

    model = Model()
    shapes = {"x": {0: torch.export.Dim("m", min=1)}}
    program = torch.export.export(model, (randn(24, 70, device="cpu"),), dynamic_shapes=shapes)
    assert sum(node.target == OPS.linear.default for node in program.graph.nodes) == 1
    x = randn(9, 70, device="cpu")
    assert torch.equal(program.module()(x), model(x))


def test_operations_are_counted() -> None:
    x, w = leaves(randn(24, 70, device="cpu"), randn(33, 70, device="cpu"))
    rows, stack = leaves(randn(128, 140, device="cpu"), randn(2, 33, 70, device="cpu"))
    with FlopCounterMode(display=False) as counter:
        functional.linear(x, w).sum().backward()
        functional.grouped_linear(rows, stack, layout_of([5], 128, 128), swiglu=True).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 24 * 70 * 33 + 3 * 2 * 128 * 70 * 33


LAYOUTS: dict[str, tuple[list[int], int | None, int]] = {  # rows of each group; of all, or as many as needed; gaps
    "full": ([256, 768, 256], None, 0),
    "padded": ([100, 3, 129, 60], 2048, 0),
    "empty groups": ([0, 70, 0, 0, 190, 0], 1024, 0),
    "gaps": ([100, 0, 129], 2304, 1),
    "cut": ([100, 30], None, 0),
    "cut, and no more": ([100, 30, 0, 0], None, 0),
    "one alignment each": ([64, 64, 64, 64], None, 0),
    "nothing": ([0, 0], 256, 0),
}


@on_each_device
@each_alignment
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("swiglu", [False, True])
def test_groups(device: str, alignment: int, name: str, swiglu: bool) -> None:
    counts, rows, gap = LAYOUTS[name]
    k, n = (70, 33) if name == "padded" else (144, 40)
    layout = layout_of(counts, alignment, rows, gap).to(device)
    m = len(layout)
    if name == "padded":
        layout[50] = layout[0] = layout[-(-100 // alignment) * alignment] = -1  # among the rows of a group, and first
        layout[-1] = len(counts)  # no group of these
    real = (layout >= 0) & (layout < len(counts))
    x, w = leaves(randn(m, k * (1 + swiglu), device=device), randn(len(counts), n, k, device=device) / k**0.5)
    dy = randn(m, n, device=device)
    with torch.no_grad():
        x[~real], dy[~real] = (0 if swiglu else torch.nan), torch.nan
    y = functional.grouped_linear(x, w, layout, swiglu)
    y.backward(dy)
    assert not y[~real].any() and not x.grad[~real].any()
    for group, count in enumerate(counts):
        rows = layout == group
        x_g, w_g = leaves(x[rows].double(), w[group].double())
        inner = torch.nn.functional.silu(x_g[:, :k]) * x_g[:, k:] if swiglu else x_g
        want = inner @ w_g.T
        want.backward(dy[rows].double())
        for got, truth in ((y[rows], want), (x.grad[rows], x_g.grad), (w.grad[group], w_g.grad)):
            near(got, truth, 0.045 if count > 64 else 0.06)
        assert count or not w.grad[group].any()


@on_each_device
def test_groups_are_linear_layers(device: str) -> None:
    counts, k, n = [128, 100, 17], 144, 48
    layout = layout_of(counts, 128, 384).to(device)
    x, w = leaves(randn(384, k, device=device, dtype=torch.bfloat16), randn(3, n, k, device=device))
    dy = randn(384, n, device=device, dtype=torch.bfloat16)
    pair = per_block_cast_to_fp8(w)
    y = functional.grouped_linear(x, w, layout)
    grads = torch.autograd.grad(y, (x, w), dy)
    frozen = functional.grouped_linear(x, pair, layout)
    assert torch.equal(frozen, y) and torch.equal(torch.autograd.grad(frozen, x, dy)[0], grads[0])
    for group in range(3):
        rows = layout == group
        x_g, w_g = leaves(x[rows], w[group])
        y_g = functional.linear(x_g, w_g)
        y_g.backward(dy[rows])
        # On a CPU the order of sums depends on the shape; the bits of a Hopper GPU do not, but where K is split.
        for got, want, bits in (
            (y[rows], y_g, 2**-7),
            (grads[0][rows], x_g.grad, 2**-7),
            (grads[1][group], w_g.grad, 2**-18),
        ):
            assert torch.allclose(got, want, rtol=bits, atol=1e-5)


@on_each_device
def test_swiglu_is_quantised_in_one_go(device: str) -> None:
    layout = layout_of([100, 28], 128, 256).to(device)
    x, w = randn(256, 256, device=device, dtype=torch.bfloat16), randn(2, 48, 128, device=device)
    d = torch.empty(256, 48, dtype=torch.bfloat16, device=device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(swiglu_cast_to_fp8(x), per_block_cast_to_fp8(w), d, layout)
    assert torch.equal(functional.grouped_linear(x, w, layout, swiglu=True), d)


@on_each_device
def test_empty_groups(device: str) -> None:
    for groups, m, k, n in ((0, 128, 64, 32), (2, 0, 64, 32), (2, 128, 0, 32), (2, 128, 64, 0)):
        x, w = leaves(randn(m, k, device=device), randn(groups, n, k, device=device))
        y = functional.grouped_linear(x, w, torch.full((m,), -1, dtype=torch.int32, device=device))
        y.sum().backward()
        assert torch.equal(y, torch.zeros(m, n, device=device))
        assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(w.grad, torch.zeros_like(w))


def test_nothing_is_computed_for_groups_that_nobody_asked_for() -> None:
    layout = layout_of([100, 28], 128, 256)
    x, w = randn(256, 64, device="cpu"), randn(2, 48, 64, device="cpu")
    for by_x, by_w in ((False, False), (True, False), (False, True), (True, True)):
        given = x.clone().requires_grad_(by_x), w.clone().requires_grad_(by_w)
        with Calls() as calls:
            y = functional.grouped_linear(*given, layout)
            if y.requires_grad:
                y.sum().backward()
        assert calls.names == ["grouped_linear"] + ["grouped_linear_dgrad"] * by_x + ["grouped_linear_wgrad"] * by_w


@pytest.mark.gpu
@each_alignment
def test_groups_wait_for_nothing_and_are_captured(alignment: int) -> None:
    layout = layout_of([100, 0, 72], alignment, 1024).cuda()
    x, w = leaves(randn(1024, 256, device="cuda", dtype=torch.bfloat16), randn(3, 128, 256, device="cuda"))
    dy = randn(1024, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = functional.grouped_linear(x, w, layout)
        # A graph that is kept would tie the leaves to the stream that it was made on, which a capture may not wait for.
        return (y.detach(), *torch.autograd.grad(y, (x, w), dy))

    want = step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = layout_of([72, 100], alignment, 1024).cuda()
    for now in (layout.clone(), other):
        layout.copy_(now)
        for each in captured:
            each.fill_(torch.nan)
        graph.replay()
        for got, bits in zip(captured, step(), strict=True):
            assert torch.equal(got, bits)
    assert not torch.equal(want[0], captured[0])


@pytest.mark.parametrize("which", ["x", "weight", "bias", "scales", "layout"])
def test_operands_are_on_one_device(which: str) -> None:
    x, w, bias, layout = torch.ones(4, 32), torch.ones(8, 32), torch.ones(8), torch.zeros(4, dtype=torch.int32)
    values, scales = per_block_cast_to_fp8(w)
    call = {
        "x": lambda: functional.linear(x.to("meta"), w),
        "weight": lambda: functional.linear(x, w.to("meta")),
        "bias": lambda: functional.linear(x, w, bias.to("meta")),
        "scales": lambda: functional.linear(x, (values, scales.to("meta"))),
        "layout": lambda: functional.grouped_linear(x, w[None], layout.to("meta")),
    }[which]
    with pytest.raises(InvalidInputError, match="the operands are on cpu, meta, expected one device"):
        call()
    with pytest.raises(InvalidInputError, match=r"grouped_layout is a NoneType, expected int32 \[M\]"):
        functional.grouped_linear(x, w[None], None)  # type: ignore[arg-type]


GOOD = (torch.ones(4, 32), torch.ones(8, 32))
PAIR = per_block_cast_to_fp8(GOOD[1])


@pytest.mark.parametrize(
    "args, message",
    [
        ((3.0, GOOD[1]), r"x is a float, expected a tensor of BF16, FP16 or FP32: call \.float\(\)"),
        ((GOOD[0].double(), GOOD[1]), r"x is torch\.float64, expected a tensor of BF16, FP16 or FP32"),
        ((torch.ones(4, 31), GOOD[1]), r"x has shape \(4, 31\), expected \[\.\., 32\], as many columns as the weight"),
        ((torch.tensor(1.0), GOOD[1]), r"x has shape \(\), expected \[\.\., 32\]"),
        (
            (GOOD[0], GOOD[1].double()),
            r"weight is torch\.float64 of shape \(8, 32\), expected BF16, FP16 or FP32 \[N, K\]",
        ),
        ((GOOD[0], PAIR[0]), r"weight is torch\.float8_e4m3fn of shape .*: pass \(values, scales\)"),
        ((GOOD[0], GOOD[1][0]), r"weight is torch\.float32 of shape \(32,\), expected"),
        (
            (GOOD[0], [1, 2]),
            r"weight is a list, expected a float tensor \[N, K\] or a pair .*: call per_block_cast_to_fp8",
        ),
        (
            (GOOD[0], (PAIR[0], PAIR[1][:, :0])),
            r"torch\.float32 of shape \(1, 0\)\), expected \(E4M3 \[N, K\], FP32 with",
        ),
        ((GOOD[0], (GOOD[1], PAIR[1])), r"weight is \(torch\.float32 of shape \(8, 32\), .* expected \(E4M3 \[N, K\]"),
        (
            (*GOOD, torch.ones(7)),
            r"bias has shape \(7,\), expected \(8,\) for a weight of shape \(8, 32\): pass its own",
        ),
        ((*GOOD, 1.0), r"bias is a float, expected \(8,\)"),
    ],
)
def test_rejections(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        functional.linear(*args)


def test_rejections_of_groups() -> None:
    x, w, layout = torch.ones(128, 32), torch.ones(2, 8, 32), torch.zeros(128, dtype=torch.int32)
    for args, message in (
        ((x[None], w, layout), r"x has shape \(1, 128, 32\), expected \[M, K\]: put the rows of all groups one behind"),
        ((x, w[0], layout), r"weight is torch\.float32 of shape \(8, 32\), expected BF16, FP16 or FP32 \[G, N, K\]"),
        ((x, w, layout, True), r"x has shape \(128, 32\), expected \[\.\., 64\]"),
        ((x, w, layout.long()), r"grouped_layout is torch\.int64 of shape \(128,\).*expected torch\.int32"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            functional.grouped_linear(*args)
