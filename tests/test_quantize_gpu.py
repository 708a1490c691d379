"""The kernels that cast, on a GPU: the bits of the CPU for all strides, types and values; streams, graphs, sizes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import captured
import casts
import pytest
import sanitizer
import torch
from test_quantize import GROUPS, SIZES, STARTS, check_groups

from deep_gemm import quantize
from deep_gemm.quantize import (
    per_block_cast_to_fp8,
    per_channel_cast_to_fp8,
    per_token_cast_to_fp8,
    swiglu_cast_to_fp8,
    transposed_cast_of_groups,
)
from deep_gemm.runtime import driver, quantization
from deep_gemm.runtime.compiler import obtain

pytestmark = pytest.mark.gpu
each_cast = pytest.mark.parametrize("name", casts.CASTS)
each_dtype = pytest.mark.parametrize("dtype", casts.DTYPES, ids=str)
SHAPES = [
    (1, 32), (1, 7168), (7, 160), (128, 128), (129, 384), (144, 288), (300, 2048), (64, 1536), (2, 130, 1024),
    (3, 5, 512), (33, 1, 96), (2, 2, 33, 64), (1000, 64), (17, 18432),
]  # fmt: skip


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were launched. New memory is poisoned, so that what a kernel leaves out shows.

    No cast goes straight to its kernel: tests/test_host_gpu.py is about those.
    """
    kinds: list[str] = []
    cast = quantization.cast

    def noted(kind: str, *arguments: Any, **keywords: Any) -> None:
        kinds.append(kind)
        cast(kind, *arguments, **keywords)

    def new_empty(x: torch.Tensor, shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        new = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
        if new.numel():
            new.view(torch.uint8).fill_(0x55)
        return new

    monkeypatch.setattr(quantization, "cast", noted)
    monkeypatch.setattr(quantization, "again", lambda key, x, counts: None)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return kinds


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides, from a multiple of 16 bytes on as they are; what lies between them is NaN."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    first = x.storage_offset() % 16
    memory = torch.full((size + first,), math.nan, dtype=x.dtype, device="cuda")
    return memory.as_strided(x.shape, x.stride(), first).copy_(x)


def test_the_kernels_compile_clean_with_the_compiler_of_this_machine() -> None:
    cubin = obtain(quantization.source())
    assert (cubin.warnings, cubin.local_bytes) == ([], 0)


@each_dtype
@each_cast
def test_every_shape_and_order(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    cast = casts.CASTS[name]
    for seed, shape in enumerate(SHAPES):
        for order, x in casts.orders(casts.hard(shape, dtype, seed)):
            for use_ue8m0 in (False, True):
                before = len(launched)
                casts.check(cast(on_gpu(x), use_ue8m0), cast(x, use_ue8m0), (shape, order, use_ue8m0))
                assert len(launched) == before + 1, (shape, order)
    assert set(launched) == {"per_token": {"token", "transposed"}, "swiglu": {"gated"}}.get(name, {"tile"})


@pytest.mark.parametrize("dtype", casts.DTYPES[:2], ids=str)
@each_cast
def test_every_bit_pattern(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    cast = casts.CASTS[name]
    for order, x in casts.every_pattern(dtype):
        for use_ue8m0 in (False, True):
            casts.check(cast(x.cuda(), use_ue8m0), cast(x, use_ue8m0), order)
    assert len(launched) == 10


@each_cast
def test_bit_patterns_of_fp32(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31 - 1, (512, 4096), dtype=torch.int32, generator=generator).view(
        torch.float32
    )
    alike = torch.randint(0, 2**25, (512, 4096), dtype=torch.int32, generator=generator)  # four binades in a row
    alike += torch.arange(0, 2**31 - 2**26, 2**22, dtype=torch.int32)[torch.arange(512) % 480, None]
    for x in (anything.view(torch.float32), alike.view(torch.float32)):
        for use_ue8m0 in (False, True):
            casts.check(casts.CASTS[name](x.cuda(), use_ue8m0), casts.CASTS[name](x, use_ue8m0))


@each_cast
def test_torch_on_this_gpu_has_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another GPU gets."""
    x = casts.hard((300, 2048), torch.bfloat16)
    monkeypatch.setattr(quantize, "_is_offered", lambda x: False)
    for use_ue8m0 in (False, True):
        casts.check(casts.CASTS[name](x.cuda(), use_ue8m0), casts.CASTS[name](x, use_ue8m0))


@pytest.mark.parametrize("name", ["per_token", "per_block", "per_channel"])
def test_what_is_left_to_torch(name: str, launched: list[str]) -> None:
    cast = casts.CASTS[name]
    for x, gran_k in (
        (torch.randn(70, 256, dtype=torch.float64), 128),
        (torch.randn(70, 250), 128),
        (torch.randn(70, 256), 32),
        (torch.zeros(0, 256), 128),
        (torch.zeros(3, 70, 0), 128),
    ):
        casts.check(cast(x.cuda(), gran_k=gran_k), cast(x, gran_k=gran_k), (x.shape, gran_k))
    assert launched == []


@pytest.mark.parametrize("groups", [1, 3, 32, 33, 257])
def test_counted_rows(groups: int) -> None:
    for seed, (m, width) in enumerate(((1, 64), (100, 288), (1025, 2048), (130, 4096))):
        if groups * m * width > 2**26:
            continue
        x = casts.hard((groups, m, width), torch.bfloat16, seed)
        choices = torch.tensor([0, 0, 1, m // 2, m, m + 5, -3], dtype=torch.int32)
        counts = choices[torch.randint(0, 7, (groups,), generator=torch.Generator().manual_seed(seed))]
        want = swiglu_cast_to_fp8(x)
        got = swiglu_cast_to_fp8(x.cuda(), masked_m=counts.cuda())
        casts.check(casts.counted(got, counts), casts.counted(want, counts), (m, width))
        left = torch.arange(m)[:, None] >= counts[:, None, None]
        assert bool((casts.bits(got[0]) == 0x55).logical_or(~left).all()), "a row that is not real was written"
        assert bool((casts.bits(got[1]) == 0x55555555).logical_or(~left).all())


@each_dtype
def test_groups_of_rows(dtype: torch.dtype, launched: list[str]) -> None:
    for k in (16, 144, 2048):
        x = casts.hard((768, k), dtype)
        for use_ue8m0 in (False, True):
            got = transposed_cast_of_groups(x.cuda(), STARTS.cuda(), SIZES.cuda(), use_ue8m0)
            check_groups(got, x, use_ue8m0)
            end, start = GROUPS[1][0] + GROUPS[1][1], GROUPS[2][0]
            assert bool((casts.bits(got[0])[end * k : start * k] == 0x55).all()), "rows of no group were written"
            casts.check(
                transposed_cast_of_groups(x.cuda(), use_ue8m0=use_ue8m0),
                transposed_cast_of_groups(x, use_ue8m0=use_ue8m0),
            )
    assert set(launched) == {"transposed"}


def test_groups_of_rows_by_torch() -> None:
    x = casts.hard((768, 24), torch.bfloat16)
    check_groups(transposed_cast_of_groups(x.cuda(), STARTS.cuda(), SIZES.cuda()), x, False)


# ---- arithmetic ----

ARITHMETIC = """
#include "exact.cuh"
#define I (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x)
extern "C" __global__ void reciprocals(const float* x, float* out) { out[I] = reciprocal(x[I]); }
extern "C" __global__ void silus(const float* x, float* out) { out[I] = silu(x[I]); }
extern "C" __global__ void scales(const float* x, float* out) { out[I] = scale_of(x[I], false).value; }
extern "C" __global__ void powers(const float* x, float* out) { out[I] = scale_of(x[I], true).value; }
extern "C" __global__ void quotients(const float* x, float* out) {
    const Scale scale = scale_of(out[I], false);
    out[I] = divide(x[I], scale.divisor, scale.reciprocal);
}
"""


def computed(entry: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What exact.cuh makes of every element."""
    source = replace(quantization.source(), name="arithmetic.cu", text=ARITHMETIC)
    kernel = driver.driver().CUfunction(int(driver.load(obtain(source).image, entry, "arithmetic")))
    out = torch.empty_like(x) if out is None else out
    pointers = [ctypes.c_uint64(y.data_ptr()) for y in (x, out)]
    parameters = (ctypes.c_void_p * 2)(*(ctypes.addressof(y) for y in pointers))
    stream = torch.cuda.current_stream().cuda_stream
    grid = x.numel() // 256
    launched = driver.driver().cuLaunchKernel(kernel, grid, 1, 1, 256, 1, 1, 0, stream, ctypes.addressof(parameters), 0)
    driver.check(launched, "launching arithmetic")
    torch.cuda.synchronize()
    return out


def floats(first: int, count: int, step: int = 1) -> torch.Tensor:
    """By their bits."""
    return torch.arange(first, first + count * step, step, dtype=torch.int64, device="cuda").int().view(torch.float32)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    wrong = got.view(torch.int32) != want.view(torch.int32)
    assert not bool(wrong.any()), (int(wrong.sum()), got[wrong][:3].tolist(), want[wrong][:3].tolist())


def test_the_reciprocal_of_every_significand() -> None:
    for exponent in (-126, -23, -1, 0, 1, 20, 120, 125):
        x = floats((exponent + 127) << 23, 2**23)
        same(computed("reciprocals", x), torch.ones_like(x) / x)


def test_the_scale_of_every_amax() -> None:
    smallest = torch.full((), quantize.SMALLEST_AMAX, device="cuda")
    for start in range(0, 2**31, 2**27):
        x = floats(start, 2**27)
        want = torch.maximum(x, smallest) / torch.full_like(x, quantize.E4M3_MAX)
        want.view(torch.int32).masked_fill_(want.isnan(), 0x7FFFFFFF)
        same(computed("scales", x), want)
        powers = quantize.ceil_to_ue8m0(want)
        same(computed("powers", x), powers)


def test_quotients_that_e4m3_can_tell_apart() -> None:
    """Random ones and midpoints, of scales over the whole range."""
    generator = torch.Generator("cuda").manual_seed(0)
    for midpoints in (False, True):
        for _ in range(8):
            amax = floats(0x38D1B717, 2**24, 68)  # 1e-4 up to the largest, nearly
            scale = amax / torch.full_like(amax, quantize.E4M3_MAX)
            share = torch.rand(2**24, device="cuda", generator=generator)
            if midpoints:
                codes = (share * 126).to(torch.uint8)
                values = codes.view(torch.float8_e4m3fn).double() + (codes + 1).view(torch.float8_e4m3fn).double()
                x = (scale.double() * values / 2).float()
                x = (x.view(torch.int32) + torch.randint(-1, 2, x.shape, device="cuda", generator=generator)).int()
                x = x.view(torch.float32)
            else:
                x = amax * share
            want = x / scale
            got = computed("quotients", x, amax.clone())
            large = want.abs() >= 2.0**-11
            same(got[large], want[large])
            assert bool((got[~large].abs() < 2.0**-10).all())


def test_silu_of_many() -> None:
    for start in (0, -(2**31)):
        for part in range(4):
            x = floats(start + part * 2**29 + part, 2**25, 16)
            want = quantize._silu(x)
            got = computed("silus", x)
            number = ~want.isnan()
            same(got[number], want[number])
            assert bool(got[~number].isnan().all())


# ---- sizes, streams, graphs, devices ----


def test_tensors_past_2_31() -> None:
    rows, k = 2**18 + 5, 8192 + 32
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda").normal_()
    parts = [(0, 256), (2**17, 2**17 + 128), (rows // 128 * 128 - 128, rows)]  # rows; the last ends past 2^31
    values, scales = per_token_cast_to_fp8(x)
    for start, end in parts:
        want = per_token_cast_to_fp8(x[start:end])
        assert torch.equal(values[start:end].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scales[start:end], want[1])
    values, scales = per_block_cast_to_fp8(x)
    for start, end in parts:
        want = per_block_cast_to_fp8(x[start:end])
        assert torch.equal(values[start:end].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scales[start // 128 : -(-end // 128)], want[1])
    del values, scales
    values, scales = swiglu_cast_to_fp8(x)
    for start, end in parts:
        want = swiglu_cast_to_fp8(x[start:end])
        assert torch.equal(values[start:end].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scales[start:end], want[1])
    x = x[: 2**18]  # rows are columns now, a multiple of 16
    del values, scales
    values, scales = per_token_cast_to_fp8(x.mT)
    for start, end in ((0, 128), (k - 128, k)):
        want = per_token_cast_to_fp8(x[:, start:end].contiguous().mT)
        assert torch.equal(values[start:end].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scales[start:end], want[1])


def test_many_batches() -> None:
    x = casts.hard((70000, 2, 64), torch.bfloat16)  # more than a grid has along y
    for name, cast in casts.CASTS.items():
        casts.check(cast(x.cuda()), cast(x), name)


CALLS: dict[str, Callable[[torch.Tensor], casts.Pair]] = {
    **casts.CASTS,
    "transposed": lambda x: per_token_cast_to_fp8(x.mT),
    "groups": transposed_cast_of_groups,
    "counted": lambda x: swiglu_cast_to_fp8(
        x[None], masked_m=torch.full((1,), len(x), dtype=torch.int32, device=x.device)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_stream_is_the_current_one(name: str) -> None:
    x = torch.randn(4096, 512, dtype=torch.bfloat16, device="cuda")
    want = CALLS[name](x)
    y = torch.zeros_like(x)
    CALLS[name](y)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # an earlier cast, or one on another stream, would find zeros
        y.copy_(x)
        got = CALLS[name](y)
        torch.cuda.current_stream().synchronize()
    casts.check(got, want)


def test_threads_and_streams() -> None:
    xs = [torch.randn(100 + i, 512, device="cuda") for i in range(8)]
    wants = [per_token_cast_to_fp8(x.cpu()) for x in xs]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                casts.check(per_token_cast_to_fp8(xs[i]), wants[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.parametrize("name", CALLS)
def test_graph_replays_with_new_contents(name: str) -> None:
    x = torch.zeros(1024, 512, dtype=torch.bfloat16, device="cuda")
    CALLS[name](x)
    counts = torch.zeros(1, dtype=torch.int32, device="cuda")
    call = CALLS[name] if name != "counted" else lambda x: swiglu_cast_to_fp8(x[None], masked_m=counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(x)
    for rows in (1024, 100):
        x.normal_()
        counts.fill_(rows)
        graph.replay()
        want = call(x)
        casts.check(*((got, want) if name != "counted" else (casts.counted(pair, counts) for pair in (got, want))))
        assert name != "counted" or bool(casts.counted(got, counts)[0].view(torch.uint8)[0, rows - 1].any())


FIRST_CALL_CAPTURED = """
import torch, deep_gemm
x, graph = torch.rand(300, 256, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    values, scales = deep_gemm.per_token_cast_to_fp8(x)
graph.replay()
want = deep_gemm.per_token_cast_to_fp8(x.cpu())
assert torch.equal(values.cpu().view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(scales.cpu(), want[1])
print("ran")
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
def test_first_call_inside_a_capture(loading: str, tmp_path: Path) -> None:
    """Compiled, loaded and launched for the first time in a new process while a CUDA graph is captured."""
    captured.check(FIRST_CALL_CAPTURED, loading, tmp_path)


def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(1024, 512, dtype=torch.bfloat16, device="cuda")
    for call in CALLS.values():
        call(x)
    counts = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, call in CALLS.items():
            if name != "counted":
                call(x)
        swiglu_cast_to_fp8(x[None], masked_m=counts)
        transposed_cast_of_groups(x[:, :24], *(torch.empty(8, dtype=torch.int32, device="cuda") for _ in range(2)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(300, 256)
    assert torch.cuda.current_device() == 0
    casts.check(per_token_cast_to_fp8(x.to("cuda:1")), per_token_cast_to_fp8(x))
    casts.check(per_channel_cast_to_fp8(x.to("cuda:1")), per_channel_cast_to_fp8(x))
    assert torch.cuda.current_device() == 0


SANITIZED = """
import torch, deep_gemm
from deep_gemm.quantize import transposed_cast_of_groups
for shape in ((1, 32), (130, 160), (2, 70, 2048)):
    x = torch.rand(shape, dtype=torch.bfloat16).cuda()
    for cast in (deep_gemm.per_token_cast_to_fp8, deep_gemm.per_block_cast_to_fp8, deep_gemm.per_channel_cast_to_fp8,
                 deep_gemm.swiglu_cast_to_fp8):
        cast(x)
    deep_gemm.per_token_cast_to_fp8(torch.rand(160, 144, dtype=torch.bfloat16).cuda().mT)
counts = torch.tensor([0, 3, 70], dtype=torch.int32).cuda()
deep_gemm.swiglu_cast_to_fp8(torch.rand(3, 70, 512, dtype=torch.bfloat16).cuda(), masked_m=counts)
numbers = torch.tensor([[0, 0, 256], [256, 256, 128]], dtype=torch.int32).cuda()
transposed_cast_of_groups(torch.rand(384, 144, dtype=torch.bfloat16).cuda(), *numbers)
torch.cuda.synchronize()
print("ran")
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
@pytest.mark.parametrize("kind", ["token", "gated", "tile", "transposed"])
def test_compute_sanitizer(tool: str, kind: str) -> None:
    sanitizer.check(tool, SANITIZED, f"{kind}_bf16")
