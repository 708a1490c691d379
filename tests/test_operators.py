"""The operators of torch.ops.deep_gemm: what they give, that PyTorch takes them for sound, compiles and exports them.

Everything on the CPU, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import library
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import deep_gemm
from deep_gemm import gemm, quantize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
M, N, K, GROUPS = 256, 136, 384, 2


class Case(NamedTuple):
    """A call: of `call(a, b, d, *rest)`, whose operator takes the pairs apart. flop: 2 * M * N * K of all groups."""

    call: Callable[..., None]
    a: tuple[torch.Tensor, torch.Tensor]
    b: tuple[torch.Tensor, torch.Tensor]
    d: torch.Tensor
    rest: tuple[Any, ...]
    flop: int

    @property
    def name(self) -> str:
        return self.call.__name__

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.deep_gemm, self.name)

    def copy(self) -> torch.Tensor:
        return self.d.clone(memory_format=torch.preserve_format)

    def expected(self) -> torch.Tensor:
        d = self.copy()
        self.call(self.a, self.b, d, *self.rest)
        return d


def quantised(device: str, *shape: int, block: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return (deep_gemm.per_block_cast_to_fp8 if block else deep_gemm.per_token_cast_to_fp8)(x, False)


def transposed(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].mT, pair[1].mT


def made(name: str, device: str) -> Case:
    a, b, d = quantised(device, M, K), quantised(device, N, K, block=True, seed=1), torch.zeros(M, N, device=device)
    if name.startswith("fp8_gemm"):
        if name.endswith("added"):
            b, c = quantised(device, N, K, seed=1), torch.randn(M, N).to(device)
            return Case(deep_gemm.fp8_gemm_nt, a, b, d, (c, (1, 1, 128)), 2 * M * N * K)
        form = name[-2:]
        a, b = transposed(a) if form[0] == "t" else a, transposed(b) if form[1] == "n" else b
        return Case(getattr(deep_gemm, name), a, b, d.bfloat16(), (), 2 * M * N * K)
    if name.startswith("k_grouped"):
        ks = [128, 256]
        scales = [quantised(device, rows, K)[1] for rows in (M, N)]
        flat = [
            torch.cat([quantised(device, rows, k, seed=k)[0].view(torch.uint8).flatten() for k in ks])
            for rows in (M, N)
        ]
        pairs = [(x.view(torch.float8_e4m3fn), y) for x, y in zip(flat, scales, strict=True)]
        layout = torch.tensor(ks, dtype=torch.int32, device=device)
        zeros = torch.zeros(GROUPS, M, N, device=device)
        return Case(deep_gemm.k_grouped_fp8_gemm_nt_contiguous, *pairs, zeros, (ks, layout), 2 * M * N * K)
    b = quantised(device, GROUPS, N, K, block=True, seed=1)
    if name.endswith("masked"):
        a = quantised(device, GROUPS, M, K)
        counts = torch.tensor([M, M], dtype=torch.int32, device=device)  # so that all of d is written
        zeros = torch.zeros(GROUPS, M, N, dtype=torch.bfloat16, device=device)
        return Case(deep_gemm.m_grouped_fp8_gemm_nt_masked, a, b, zeros, (counts, 100), GROUPS * 2 * 100 * N * K)
    b = transposed(b) if "_nn_" in name else b
    layout = torch.arange(M, device=device).div(128, rounding_mode="floor").int()
    layout[100:128] = -1
    return Case(getattr(deep_gemm, name), a, b, d.bfloat16(), (layout,), 2 * M * N * K)


NAMES = (
    *(f"fp8_gemm_{form}" for form in ("nt", "nn", "tn", "tt")),
    "fp8_gemm_nt_added",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "k_grouped_fp8_gemm_nt_contiguous",
)
each_case = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def fp8_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's check of schemas compares by allclose, which FP8 does not have: compare the bits instead."""
    theirs = torch.allclose

    def allclose(x: torch.Tensor, y: torch.Tensor, **tolerance: Any) -> bool:
        if x.dtype == torch.float8_e4m3fn:
            return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        return theirs(x, y, **tolerance)

    monkeypatch.setattr(torch, "allclose", allclose)


CASTS: dict[str, tuple[Any, ...]] = {
    "per_token_cast_to_fp8": (True,),
    "per_block_cast_to_fp8": (False, 64),
    "per_channel_cast_to_fp8": (),
    "swiglu_cast_to_fp8": (False,),
    "transposed_cast_of_groups": (),
}
each_cast = pytest.mark.parametrize("name", CASTS)


def cast_case(name: str, device: str) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """A cast, its operator, and what both take."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    return getattr(quantize, name), getattr(torch.ops.deep_gemm, name), (x, *CASTS[name])


def equal(got: Any, want: Any) -> bool:
    """Values, which are FP8, and scales, in the same order of memory."""
    (values, scales), (other, other_scales) = got, want
    same = torch.equal(values.view(torch.uint8), other.view(torch.uint8)) and torch.equal(scales, other_scales)
    return same and (values.stride(), scales.stride()) == (other.stride(), other_scales.stride())


@each_device
@each_cast
def test_casts_are_operators(name: str, device: str) -> None:
    cast, operator, args = cast_case(name, device)
    want = cast(*args)
    assert equal(operator(*args), want)
    library.opcheck(operator.default, args)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *rest: cast(x * 1, *rest), fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    assert equal(compiled(*args), want)
    for _ in range(2):
        graph = make_fx(lambda x: cast(x, *args[1:]))(args[0])
        assert f"deep_gemm.{name}.default" in str(graph.graph) and equal(graph(args[0]), want)


@each_cast
def test_casts_have_no_gradients(name: str) -> None:
    cast, _, (x, *rest) = cast_case(name, "cpu")
    x.requires_grad_()
    compiled = torch.compile(lambda x: cast(x, *rest), fullgraph=True, backend="aot_eager")
    for values, scales in (cast(x, *rest), compiled(x)):
        assert not values.requires_grad and not scales.requires_grad


def test_masked_casts_compile() -> None:
    x, counts = torch.randn(3, 8, 256), torch.tensor([0, 8, 3], dtype=torch.int32)

    def cast(x: torch.Tensor, counts: torch.Tensor) -> Any:
        return deep_gemm.swiglu_cast_to_fp8(x, masked_m=counts)

    got, want = torch.compile(cast, fullgraph=True, backend="aot_eager")(x, counts), cast(x, counts)
    for group, count in enumerate(counts.tolist()):
        assert equal([y[group, :count] for y in got], [y[group, :count] for y in want])


def test_every_multiplication_is_an_operator():
    public = {name for name in gemm.__dict__ if "fp8_gemm_" in name and not name.startswith(("_", "gemm_"))}
    assert public == {name for name in NAMES if not name.endswith("added")}
    for name in public:
        assert getattr(torch.ops.deep_gemm, name).overloads() == ["default", "out"]


@each_device
@each_case
def test_results(name: str, device: str) -> None:
    case = made(name, device)
    want = case.expected()
    assert bool(want.any())
    assert torch.equal(case.operator(*case.a, *case.b, *case.rest), want)
    d = case.copy()
    assert case.operator.out(*case.a, *case.b, *case.rest, d=d) is None
    assert torch.equal(d, want)


@each_device
@each_case
def test_operators_are_sound(name: str, device: str) -> None:
    """Schema, fake kernels, autograd and functionalisation, by PyTorch's own check."""
    case = made(name, device)
    library.opcheck(case.operator.default, (*case.a, *case.b, *case.rest))
    library.opcheck(case.operator.out, (*case.a, *case.b, *case.rest), {"d": case.copy()})


def test_the_check_of_schemas_sees_what_is_changed() -> None:
    """Even in FP8."""
    mine = library.Library("deep_gemm_test", "FRAGMENT")
    mine.define("spoils(Tensor a) -> Tensor")

    def spoils(a: torch.Tensor) -> torch.Tensor:
        a.view(torch.uint8).fill_(1)
        return a.float()

    mine.impl("spoils", spoils, "CompositeExplicitAutograd")
    library.register_fake("deep_gemm_test::spoils", lambda a: a.new_empty(a.shape, dtype=torch.float32), lib=mine)
    with pytest.raises(Exception, match="mutat"):
        library.opcheck(
            torch.ops.deep_gemm_test.spoils.default, (quantised("cpu", 16, 16)[0],), test_utils="test_schema"
        )


@each_device
@each_case
def test_calls_compile_into_one_graph(name: str, device: str) -> None:
    """The public functions, as they are written, with all of their surroundings."""
    case = made(name, device)

    def block(a: Any, b: Any, d: torch.Tensor, *rest: Any) -> torch.Tensor:
        d = d * 1
        case.call(a, b, d, *rest)
        return d + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    want = case.expected() + 1
    for _ in range(2):
        assert torch.equal(compiled(case.a, case.b, case.copy(), *case.rest), want)


def test_a_varying_m_compiles_once() -> None:
    b, compilations = quantised("cpu", N, K, block=True), []

    def count(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph

    def block(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        d = values.new_empty(values.shape[0], N, dtype=torch.bfloat16)
        deep_gemm.fp8_gemm_nt((values, scales), b, d, disable_ue8m0_cast=True)
        return d

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=count, dynamic=True)
    for m in (64, 100, 36, 200):
        values, scales = quantised("cpu", m, K)
        want = torch.empty(m, N, dtype=torch.bfloat16)
        deep_gemm.fp8_gemm_nt((values, scales), b, want)
        assert torch.equal(compiled(values, scales.contiguous()), want)
    assert len(compilations) == 1


class Layer(torch.nn.Module):
    """As clients write it: buffers, an allocation and a call."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("weight", case.b[0])
        self.register_buffer("scales", case.b[1])

    def forward(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        d = torch.zeros_like(self.case.d)
        self.case.call((values, scales), (self.weight, self.scales), d, *self.case.rest)
        return d


@each_device
@pytest.mark.parametrize("strict", [False, True])
@each_case
def test_calls_are_exported(name: str, strict: bool, device: str) -> None:
    case = made(name, device)
    exported = torch.export.export(Layer(case), case.a, strict=strict)
    assert f"deep_gemm.{case.name}.out" in str(exported.graph)
    assert torch.equal(exported.module()(*case.a), case.expected())


@each_device
@each_case
def test_calls_are_traced(name: str, device: str) -> None:
    """Also those that were made while something was traced, and as operators, before."""
    case = made(name, device)
    case.expected()

    def function(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        d = torch.zeros_like(case.d)
        case.call((values, scales), case.b, d, *case.rest)
        return d

    for mode in ("real", "fake", "real"):
        early = mode == "real"
        graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True, pre_dispatch=early)(*case.a)
        assert f"deep_gemm.{case.name}.out" in str(graph.graph), mode
        assert torch.equal(graph(*case.a), case.expected())


@each_device
@each_case
def test_flop_are_counted(name: str, device: str) -> None:
    """Of plain calls, those that this thread has made before as well, and of operators."""
    case = made(name, device)
    case.expected()
    want = case.expected()
    d = case.copy()
    with FlopCounterMode(display=False) as counter:
        case.call(case.a, case.b, d, *case.rest)
        assert counter.get_total_flops() == case.flop
        result = case.operator(*case.a, *case.b, *case.rest)
    assert counter.get_total_flops() == 2 * case.flop
    assert torch.equal(d, want) and torch.equal(result, want)


@each_cast
def test_casts_of_batches_by_vmap(name: str) -> None:
    cast, _, (x, *rest) = cast_case(name, "cpu")
    batch = torch.stack([x, 2 * x])
    got = torch.vmap(lambda x: cast(x, *rest))(batch)
    for i, each in enumerate(batch):
        want = cast(each, *rest)
        assert torch.equal(got[0][i].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1][i], want[1])


def test_what_is_wrong_is_rejected_within_modes_as_outside() -> None:
    case = made("fp8_gemm_nt", "cpu")
    for arguments, options in (
        (((*case.a, case.a[0]), case.b, case.d), {}),
        ((None, case.b, case.d), {}),
        ((case.a, case.b, case.d), {"compiled_dims": "xyz"}),
        ((case.a, case.b, case.d), {"recipe": (1, 2, 3)}),
    ):
        for watch in (FlopCounterMode(display=False), nullcontext()):
            with watch, pytest.raises(deep_gemm.errors.InvalidInputError, match="expected"):
                deep_gemm.fp8_gemm_nt(*arguments, **options)  # type: ignore[arg-type]


@each_case
def test_input_is_rejected_within_modes(name: str) -> None:
    case = made(name, "cpu")
    for watch in (FlopCounterMode(display=False), torch.inference_mode()):
        with watch, pytest.raises(deep_gemm.errors.InvalidInputError, match="expected"):
            case.call(case.a, case.b, case.d.half(), *case.rest)
    case.call(case.a, case.b, case.copy(), *case.rest)


@each_case
def test_operands_are_on_one_device(name: str) -> None:
    case = made(name, "cpu")
    for pairs in ((case.a[0].to("meta"), case.a[1], *case.b), (*case.a, case.b[0], case.b[1].to("meta"))):
        for call in (
            lambda pairs=pairs: case.operator(*pairs, *case.rest),
            lambda pairs=pairs: case.operator.out(*pairs, *case.rest, d=case.copy()),
        ):
            with pytest.raises(deep_gemm.errors.InvalidInputError, match="are on cpu, meta, expected one device"):
                call()


def test_fake_tensors_need_no_memory() -> None:
    with torch._subclasses.FakeTensorMode():
        a = torch.empty(10**6, 7168, dtype=torch.float8_e4m3fn), torch.empty(10**6, 56)
        b = torch.empty(10**6, 7168, dtype=torch.float8_e4m3fn), torch.empty(7813, 56)
        d = torch.ops.deep_gemm.fp8_gemm_nt(*a, *b)
        assert (d.shape, d.dtype) == ((10**6, 10**6), torch.bfloat16)
        deep_gemm.fp8_gemm_nt(a, b, d)
