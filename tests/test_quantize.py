"""Casts to FP8: bits against a model in numpy, the groups at the edges, NaN and inf, the way back; and their kernels,
compiled, and run on a CPU (casts.cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import math
import random
import re
from types import SimpleNamespace
from typing import Any

import casts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deep_gemm
from deep_gemm import quantize, reference, utils
from deep_gemm.errors import InvalidInputError, LaunchError
from deep_gemm.layout import align, ceil_div, get_mn_major_tma_aligned_tensor
from deep_gemm.runtime import device as devices
from deep_gemm.runtime import driver, quantization, sass
from deep_gemm.runtime.compiler import obtain

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASTS = {
    "per_token": (quantize.per_token_cast_to_fp8, quantize.per_token_cast_back, 1, 128),
    "per_block": (quantize.per_block_cast_to_fp8, quantize.per_block_cast_back, 128, 128),
    "per_channel": (quantize.per_channel_cast_to_fp8, quantize.per_channel_cast_back, 128, 1),
}
each_cast = pytest.mark.parametrize("name", CASTS)
each_rounding_of_scales = pytest.mark.parametrize("use_ue8m0", [False, True], ids=["free", "ue8m0"])
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # codes 0 .. 126


def codes(values: torch.Tensor) -> np.ndarray:
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    return values.cpu().view(torch.uint8).numpy()


def model(x: np.ndarray, rows: int, columns: int, use_ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a 2-D array of finite FP32, group by group."""
    midpoints = (E4M3_VALUES[1:] + E4M3_VALUES[:-1]) / 2
    values = np.zeros(x.shape, dtype=np.uint8)
    scales = np.zeros((ceil_div(x.shape[0], rows), ceil_div(x.shape[1], columns)), dtype=np.float32)
    for i, j in np.ndindex(scales.shape):
        group = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = np.maximum(np.abs(x[group]).max(), np.float32(1e-4)) / np.float32(448)
        if use_ue8m0:
            significand, exponent = math.frexp(scale)
            scale = np.float32(math.ldexp(1.0, exponent - (significand == 0.5)))
        scaled = np.abs(x[group] / scale)
        code = np.searchsorted(midpoints, scaled)  # at a midpoint: the code below it
        code += (code % 2 == 1) & np.isin(scaled, midpoints)
        values[group] = code | np.signbit(x[group]) << 7
        scales[i, j] = scale
    return values, scales


def spread(m: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Many magnitudes, ties of E4M3 among them, and a group of zeros."""
    x = rng.normal(size=(m, k)) * 2.0 ** rng.integers(-12, 12, (m, k))
    x[rng.random(x.shape) < 0.2] = 17.0  # halfway between 16 and 18 where the scale is 1
    x[0, 0] = 448.0
    x[:, 128:256] *= np.arange(m)[:, None] % 3 == 0
    return x.astype(np.float32)


@each_cast
@each_rounding_of_scales
@pytest.mark.parametrize("device", DEVICES)
def test_bits(name: str, use_ue8m0: bool, device: str) -> None:
    cast, _, rows, columns = CASTS[name]
    rng = np.random.default_rng(1)
    for m, k in ((1, 1), (1, 128), (7, 129), (128, 128), (129, 384), (130, 576), (300, 7)):
        x = spread(m, k, rng)
        values, scales = cast(torch.from_numpy(x).to(device), use_ue8m0)
        want_values, want_scales = model(x, rows, columns, use_ue8m0)
        assert scales.dtype == torch.float32
        assert np.array_equal(scales.cpu().numpy(), want_scales), (m, k)
        assert np.array_equal(codes(values), want_values), (m, k)


def test_quotients_are_rounded_once() -> None:
    x = np.random.default_rng(3).uniform(1, 2, (2000, 8)).astype(np.float32)
    x[:, 1:] = x[:, :1] / np.float32(448) * np.float32([17, 19, 21, 23, 25, 27, 29])  # ties, or an ulp beside
    assert np.array_equal(codes(quantize.per_token_cast_to_fp8(torch.from_numpy(x))[0]), model(x, 1, 128, False)[0])


@each_cast
def test_bf16_strides_and_batches(name: str) -> None:
    cast = CASTS[name][0]
    x = torch.randn(3, 200, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = cast(x)
    transposed = cast(x.mT.contiguous().mT)
    assert torch.equal(scales, transposed[1]) and np.array_equal(codes(values), codes(transposed[0]))
    for i in range(3):
        one = cast(x[i].float())
        assert torch.equal(scales[i], one[1]) and np.array_equal(codes(values)[i], codes(one[0]))


@each_cast
@each_rounding_of_scales
def test_there_and_back(name: str, use_ue8m0: bool) -> None:
    cast, back, _, _ = CASTS[name]
    x = torch.from_numpy(spread(200, 300, np.random.default_rng(2)))
    values, scales = cast(x, use_ue8m0)
    y = back(values, scales)
    assert y.dtype == torch.float32 and y.shape == x.shape
    scale = back(torch.ones_like(x).to(torch.float8_e4m3fn), scales)
    # Half an ulp of E4M3: 2**-4 of a normal value, 2**-10 scales below; the rest is the division and the product.
    assert bool(((y - x).abs() <= (x.abs() * 2**-4).maximum(scale * 2**-10) * (1 + 2**-20) + x.abs() * 2**-22).all())
    again, scales_again = cast(y, use_ue8m0)
    if use_ue8m0:  # powers of two lose nothing the second time
        assert torch.equal(back(again, scales_again), y)


@each_cast
def test_granularity(name: str) -> None:
    cast, back, rows, columns = CASTS[name]
    x = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    values, scales = cast(x, gran_k=32)
    want_values, want_scales = model(x.numpy(), min(rows, 32), min(columns, 32), False)
    assert np.array_equal(codes(values), want_values) and np.array_equal(scales.numpy(), want_scales)
    assert torch.allclose(back(values, scales, gran_k=32), x, rtol=2**-4, atol=1e-2)


@each_cast
def test_empty(name: str) -> None:
    cast, back, rows, columns = CASTS[name]
    for m, k in ((0, 256), (5, 0), (0, 0)):
        values, scales = cast(torch.zeros(m, k))
        assert values.shape == (m, k) and scales.shape == (ceil_div(m, rows), ceil_div(k, columns))
        assert back(values, scales).shape == (m, k)


def test_zeros_get_a_scale_to_divide_by() -> None:
    values, scales = quantize.per_token_cast_to_fp8(torch.zeros(2, 256))
    assert not codes(values).any() and bool((scales == torch.tensor(1e-4) / torch.tensor(448.0)).all())


@each_rounding_of_scales
@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_spoil_their_group_and_no_other(use_ue8m0: bool, device: str) -> None:
    x = torch.ones(4, 256)
    x[0, 3], x[1, 3], x[2, 3] = math.nan, math.inf, -math.inf
    values, scales = quantize.per_token_cast_to_fp8(x.to(device), use_ue8m0)
    assert scales[0, 0].isnan() and scales[1:3, 0].isposinf().all() and scales[:, 1].isfinite().all()
    assert (codes(values)[0, :128] == 0x7F).all()
    assert (codes(values)[1:3, :128] == np.where(np.arange(128) == 3, 0x7F, 0)).all()
    back = quantize.per_token_cast_back(values, scales).cpu()
    assert back[:3, :128].isnan().all()
    assert torch.allclose(back[:3, 128:], x[:3, 128:], rtol=1e-6) and torch.allclose(back[3], x[3], rtol=1e-6)


@each_rounding_of_scales
def test_the_largest_value_does_not_overflow(use_ue8m0: bool) -> None:
    x = (
        torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
        * 2.0 ** torch.arange(-10, 10).repeat(1000)[:, None]
    )
    x[0] = torch.finfo(torch.float32).max
    values, _ = quantize.per_token_cast_to_fp8(x, use_ue8m0)
    assert (codes(values) <= 0x7E).all()
    assert use_ue8m0 or (codes(values)[x.numpy() > 1e-4] == 0x7E).all()


@given(st.integers(0, 0x7F800000) | st.integers(0, 254).map(lambda e: e << 23), st.integers(-1, 1), st.booleans())
@settings(max_examples=300, deadline=None)
def test_ceil_to_ue8m0(bits: int, offset: int, negative: bool) -> None:
    bits = min(max(bits + offset, 0), 0x7F800000)
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    got = quantize.ceil_to_ue8m0(-x if negative else x).item()
    if x.item() == 0 or x.item() > 2.0**127:
        assert got == (x.item() and math.inf)
    else:
        assert math.frexp(got)[0] == 0.5
        assert x.item() <= got and (got < 2 * x.item() or got == 2.0**-126)


def test_ceil_to_ue8m0_keeps_nan_and_shape() -> None:
    x = torch.tensor([[math.nan, 3.0], [-4.0, 5e-324]])
    assert torch.equal(quantize.ceil_to_ue8m0(x).nan_to_num(7.0), torch.tensor([[7.0, 4.0], [4.0, 0.0]]))


@each_cast
def test_rejections(name: str) -> None:
    cast, back, _, _ = CASTS[name]
    with pytest.raises(
        InvalidInputError, match=r"got torch.float32 of shape \(5,\), expected floating point \[.., M, K\]"
    ):
        cast(torch.zeros(5))
    with pytest.raises(InvalidInputError, match=r"got torch\.int32 of shape"):
        cast(torch.zeros(2, 128, dtype=torch.int32))
    with pytest.raises(InvalidInputError, match="gran_k is 0, expected a positive whole number"):
        cast(torch.zeros(2, 128), gran_k=0)
    values, scales = cast(torch.zeros(200, 300))
    with pytest.raises(InvalidInputError, match=r"scales have shape .* expected .* for values of shape \(200, 300\)"):
        back(values, scales[:, 1:])


def test_packed_scales_are_blackwell_s() -> None:
    for call in (
        lambda: quantize.per_token_cast_to_fp8(torch.zeros(4, 128), True, use_packed_ue8m0=True),
        lambda: utils.math.pack_ue8m0_to_int(torch.ones(4, 4)),
        lambda: utils.layout.get_mn_major_tma_aligned_packed_ue8m0_tensor(torch.ones(4, 4)),
    ):
        with pytest.raises(NotImplementedError, match="Blackwell"):
            call()


def test_utils_names_what_clients_import() -> None:
    assert utils.per_token_cast_to_fp8 is utils.math.per_token_cast_to_fp8 is quantize.per_token_cast_to_fp8
    assert all(hasattr(module, name) for module in (utils, utils.math, utils.layout) for name in module.__all__)


@pytest.mark.parametrize("x", [torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.float64), 3.0])
def test_ceil_to_ue8m0_takes_fp32_alone(x):
    with pytest.raises(InvalidInputError, match=r"got (torch\.\w+|a float), expected a tensor of torch\.float32"):
        quantize.ceil_to_ue8m0(x)


@pytest.mark.parametrize("gran_k", [0, -1, 1.5, None, True])
def test_group_sizes_are_checked(gran_k):
    x = torch.ones(8, 128)
    values, scales = quantize.per_token_cast_to_fp8(x)
    for call in (
        lambda: quantize.per_block_cast_to_fp8(x, False, gran_k),
        lambda: quantize.per_token_cast_back(values, scales, gran_k),
    ):
        with pytest.raises(InvalidInputError, match=f"gran_k is {gran_k}, expected a positive whole number"):
            call()


def test_a_group_may_be_larger_than_the_matrix():
    x = torch.randn(8, 128)
    values, scales = quantize.per_block_cast_to_fp8(x, gran_k=10**9)
    assert scales.shape == (1, 1)
    want, _ = quantize.per_block_cast_to_fp8(x)
    assert torch.equal(values.view(torch.uint8), want.view(torch.uint8))


def test_what_is_no_tensor_is_rejected():
    with pytest.raises(InvalidInputError, match=r"got a list, expected a torch\.Tensor"):
        quantize.per_token_cast_to_fp8([[1.0]])
    with pytest.raises(
        InvalidInputError, match=r"got layout torch\.sparse_coo, expected torch\.strided: call \.to_dense"
    ):
        quantize.per_token_cast_to_fp8(torch.zeros(8, 128).to_sparse())
    with pytest.raises(InvalidInputError, match="pass what the cast returned"):
        quantize.per_token_cast_back(torch.ones(3), torch.ones(1))


def test_weights_of_a_module_are_quantised_without_a_graph():
    values, scales = quantize.per_block_cast_to_fp8(torch.nn.Linear(128, 16).weight)
    assert not values.requires_grad and not scales.requires_grad


# ---- layouts of the outputs ----


@pytest.mark.parametrize("gran_k", [128, 32, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (5, 256), (2, 7, 300), (2, 3, 4, 129), (0, 256), (3, 0, 256), (5, 0)])
def test_scales_of_rows_are_m_major(shape: tuple[int, ...], gran_k: int) -> None:
    values, scales = quantize.per_token_cast_to_fp8(torch.zeros(shape), gran_k=gran_k)
    *batch, m, k = shape
    blocks, pitch = ceil_div(k, gran_k), align(m, 4)
    assert values.is_contiguous() and scales.shape == (*batch, m, blocks)
    assert scales.stride() == torch.empty(*batch, blocks, pitch).mT.stride()
    if scales.numel():
        assert scales.stride()[-2:] == (1, pitch)
        assert scales.dim() > 3 or get_mn_major_tma_aligned_tensor(scales) is scales


OUTPUTS = {
    "per_token": quantize.outputs_of_per_token,
    "per_block": quantize.outputs_of_per_block,
    "per_channel": quantize.outputs_of_per_channel,
    "swiglu": quantize.outputs_of_swiglu,
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 256), (2, 7, 300), (2, 3, 4, 130), (0, 256), (5, 0)])
def test_outputs_without_values(name: str, shape: tuple[int, ...]) -> None:
    want = casts.CASTS[name](torch.zeros(shape))
    got = OUTPUTS[name](torch.zeros(shape, device="meta", dtype=torch.bfloat16))
    for a, b in zip(got, want, strict=True):
        assert a.is_meta and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


# ---- SwiGLU ----


def test_silu_is_near() -> None:
    """Within 3 units of the last place around 0, and 2e-6 down to -87, where hardly anything is left."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-30, 34).repeat(2**14)
    x = torch.cat([x, torch.linspace(-100, 100, 2**18)])
    exact = x.double() / (1 + (-x.double()).exp())
    error = ((quantize._silu(x).double() - exact) / exact).abs()
    assert float(error[x.abs() < 8].max()) <= 6 * 2.0**-24
    assert float(error[x > 0].max()) <= 4 * 2.0**-24
    assert float(error[x > -87].max()) <= 2e-6
    assert bool((quantize._silu(x)[x <= -87] == quantize._silu(torch.tensor([-87.0]))).all())


def test_silu_of_what_is_special() -> None:
    x = torch.tensor([0.0, -0.0, math.inf, 1e30, 5e-324 * 2**1000, -88.0, -1e30, -math.inf, math.nan])
    got = quantize._silu(x)
    assert torch.equal(got[:5], torch.tensor([0.0, -0.0, math.inf, 1e30, 5e-324 * 2**999]))
    assert got[:5].signbit().tolist() == [False, True, False, False, False]
    assert bool(((got[5:8] < 0) & (got[5:8] > -2e-36)).all())
    assert got[8:].isnan().all()


@each_rounding_of_scales
def test_swiglu_is_a_cast_of_the_product(use_ue8m0: bool) -> None:
    x = casts.hard((3, 70, 600), torch.float32)
    product = quantize._silu(x[..., :300]) * x[..., 300:]
    want = quantize.per_token_cast_to_fp8(product, use_ue8m0)
    casts.check(quantize.swiglu_cast_to_fp8(x, use_ue8m0), want)
    assert torch.allclose(product[0, 0], torch.nn.functional.silu(x[0, 0, :300]) * x[0, 0, 300:], equal_nan=True)


def test_rows_that_are_not_real_change_nothing() -> None:
    x, counts = casts.hard((4, 9, 64), torch.bfloat16), torch.tensor([0, 9, 3, -2], dtype=torch.int32)
    got, want = quantize.swiglu_cast_to_fp8(x, masked_m=counts), quantize.swiglu_cast_to_fp8(x)
    casts.check(casts.counted(got, counts), casts.counted(want, counts))


INT, WANTED = torch.int32, "torch.int32 of shape (2,) on cpu"
REJECTED = {
    "got x of shape (4, 33), expected [.., M, 2 * I]: put gates and factors side by side":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(4, 33)),
    "got masked_m for x of shape (4, 32), expected [G, M, 2 * I]: add a group with x[None]":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(4, 32), masked_m=torch.zeros(4, dtype=INT)),
    f"masked_m is torch.int64 of shape (2,) on cpu, expected {WANTED}: pass the rows of each group":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(2, 4, 32), masked_m=torch.zeros(2, dtype=torch.int64)),
    f"masked_m is torch.int32 of shape (3,) on cpu, expected {WANTED}: pass the rows of each group":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(2, 4, 32), masked_m=torch.zeros(3, dtype=INT)),
    "masked_m is a list, expected a torch.Tensor of torch.int32: pass the rows of each group":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(2, 4, 32), masked_m=[1, 2]),
    "got torch.int64 of shape (4, 32), expected floating point [.., M, K]: call .float() or .view()":
        lambda: quantize.swiglu_cast_to_fp8(torch.zeros(4, 32, dtype=torch.int64)),
    "got x of shape (100, 32), expected [M, K] with M a multiple of 128: pad the rows of every group with zeros":
        lambda: quantize.transposed_cast_of_groups(torch.zeros(100, 32)),
    "got starts without sizes, expected both or neither: pass sizes":
        lambda: quantize.transposed_cast_of_groups(torch.zeros(128, 32), torch.zeros(1, dtype=INT)),
    f"sizes is torch.int32 of shape (1,) on cpu, expected {WANTED}: pass one number for every 128 rows":
        lambda: quantize.transposed_cast_of_groups(torch.zeros(256, 32), *(torch.zeros(i, dtype=INT) for i in (2, 1))),
}  # fmt: skip


@pytest.mark.parametrize("message", REJECTED)
def test_what_is_rejected(message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
        REJECTED[message]()


def test_it_is_a_public_name() -> None:
    assert deep_gemm.swiglu_cast_to_fp8 is quantize.swiglu_cast_to_fp8 and "swiglu_cast_to_fp8" in deep_gemm.__all__


# ---- groups of rows, transposed ----

GROUPS = [(0, 256), (256, 128), (640, 128)]  # first row and rows; in between are rows of no group
STARTS = torch.tensor([0, 0, 256, -1, 0, 640], dtype=INT)
SIZES = torch.tensor([256, 256, 128, 128, 0, 128], dtype=INT)


def check_groups(got: casts.Pair, x: torch.Tensor, use_ue8m0: bool) -> None:
    values, scales = got
    m, k = x.shape
    assert values.shape == (m * k,) and scales.shape == (k, m // 128) and scales.stride() == (1, align(k, 4))
    for start, size in GROUPS:
        want = quantize.per_token_cast_to_fp8(x[start : start + size].mT.cpu(), use_ue8m0)
        of_group = values[start * k : (start + size) * k].view(k, size)
        casts.check((of_group, scales[:, start // 128 : (start + size) // 128]), (want[0], want[1]), (start, size))


@each_rounding_of_scales
@pytest.mark.parametrize("k", [1, 7, 144])
def test_groups_of_rows(k: int, use_ue8m0: bool) -> None:
    x = casts.hard((768, k), torch.bfloat16)
    check_groups(quantize.transposed_cast_of_groups(x, STARTS, SIZES, use_ue8m0), x, use_ue8m0)
    values, scales = quantize.transposed_cast_of_groups(x, use_ue8m0=use_ue8m0)
    casts.check((values.view(k, 768), scales), quantize.per_token_cast_to_fp8(x.mT, use_ue8m0))
    got = quantize.outputs_of_groups(x.to("meta"), STARTS.to("meta"), SIZES.to("meta"))
    assert [(y.shape, y.stride()) for y in got] == [(y.shape, y.stride()) for y in (values, scales)]


def test_groups_are_an_operand_of_weight_gradients() -> None:
    ks, m, n = [256, 128], 24, 16
    x, y = torch.randn(384, m), torch.randn(384, n)
    starts, sizes = torch.tensor([0, 0, 256], dtype=INT), torch.tensor([256, 256, 128], dtype=INT)
    a, b = (quantize.transposed_cast_of_groups(z, starts, sizes) for z in (x, y))
    d = torch.empty(2, m, n)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, torch.tensor(ks, dtype=INT))
    for got, first, size in zip(d, (0, 256), ks, strict=True):
        want = x[first : first + size].T @ y[first : first + size]
        assert deep_gemm.calc_diff(got, want) < 1e-3


# ---- the kernels' arithmetic, in exact FMAs ----


def quotient(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`quotient` of kernels/exact.cuh, with the reciprocal and the divisor that `scale_of` gives it."""
    reciprocal = torch.ones_like(scale) / scale
    divisor = torch.where(scale.isfinite(), scale, torch.ones_like(scale))
    near = x * reciprocal
    return reference._fma(-reference._fma(near, divisor, -x), reciprocal, near)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def test_no_quotient_is_so_near_a_midpoint_that_its_error_shows() -> None:
    """Every significand of x and scale where the error could decide between two codes: docs/numerics.md counts them."""
    pairs: list[tuple[int, int]] = []
    for b, sign, zeros, exponent in itertools.product(range(16, 32), (-1, 1), (20, 21, 22), range(23, 28)):
        odd = b * 2**zeros + sign
        inverse = pow(odd, -1, 2**exponent)
        for k in range(-64, 65):
            scale = k * inverse % 2**exponent
            for s in range(scale, 2**24, 2**exponent):
                x = s * odd - k
                if s >= 2**23 and 2**22 <= x >> exponent < 2**24:
                    pairs.append((x >> exponent, s))
    assert len(pairs) > 3000
    x, scale = torch.tensor(pairs, dtype=torch.float32).T
    for e in (-8, 0, 8):  # the quotient's
        want = x * 2.0**e / scale
        assert torch.equal(quotient(x * 2.0**e, scale), want)
        assert not torch.equal(to_e4m3(x * 2.0**e * (torch.ones_like(scale) / scale)), to_e4m3(want)), "too easy"


def test_division_by_a_reciprocal() -> None:
    """Equal to the division, bit by bit, from half of E4M3's smallest on; below, E4M3 has nothing but zeros."""
    rng = np.random.default_rng(0)
    smallest, largest = 1e-4 / 448, 3.4028235e38 / 448
    exponents = rng.uniform(math.log2(smallest), math.log2(largest), 4000)
    scales = np.float32(2.0**exponents)[:, None]
    midpoints = (E4M3_VALUES[1:] + E4M3_VALUES[:-1]) / 2
    targets = np.concatenate([midpoints, E4M3_VALUES, rng.uniform(0, 448, 200), 2.0 ** rng.uniform(-24, 9, 200)])
    with np.errstate(over="ignore"):
        near = np.float32(scales.astype(np.float64) * targets)
    x = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))], axis=1)
    tiny = np.float32([0, 1e-45, 3e-42, 1.1754942e-38, 1.1754944e-38, 1e-36])
    x = np.concatenate([x, np.broadcast_to(tiny, (len(x), len(tiny)))], axis=1)
    x = np.minimum(x, np.float32(3.4028235e38))
    x = torch.from_numpy(np.concatenate([x, -x], axis=1))
    scale = torch.from_numpy(scales).expand_as(x)
    want, got = x / scale, quotient(x, scale)
    large = want.abs() >= 2.0**-11
    assert large.any() and torch.equal(got[large], want[large])
    small = got[~large]
    assert bool((small.abs() < 2.0**-10).all()) and torch.equal(small.signbit(), x[~large].signbit())


def test_division_where_a_group_is_spoilt() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 3e38, math.inf, -math.inf])
    by_infinity = quotient(x, torch.full_like(x, math.inf))
    assert torch.equal(by_infinity[:5], x[:5] * 0) and torch.equal(by_infinity[:5].signbit(), x[:5].signbit())
    assert by_infinity[5:].isnan().all() and quotient(x, torch.full_like(x, math.nan)).isnan().all()


def test_a_product_with_the_reciprocal_would_not_do() -> None:
    """Else the corrections were waste."""
    generator = torch.Generator().manual_seed(0)
    x, scale = (torch.rand(2**20, generator=generator) + 1 for _ in range(2))
    assert not torch.equal(x * (torch.ones_like(scale) / scale), x / scale)
    assert torch.equal(quotient(x, scale), x / scale)


# ---- the kernels ----


def test_the_kernels_compile_clean() -> None:
    cubin = obtain(quantization.source())
    assert (cubin.warnings, cubin.local_bytes) == ([], 0)
    most = {"token": 48, "gated": 80, "tile": 64, "transposed": 64}  # registers; 64 are 1024 threads an SM, 80 are 768
    for entry in quantization.ENTRIES:
        info, kind = sass.read(cubin.image, entry), entry.partition("_")[0]
        assert (info.local_bytes, info.local_loads, info.local_stores) == (0, 0, 0), entry
        assert info.registers <= most[kind], (entry, info.registers)
        elements = 16 if entry in ("token_fp32", "gated_fp32") else 32
        # A quotient has two FMAs, silu nine; a few are of scales. Anything else is a contraction, or not our division.
        of_element, of_scales = (11 if kind == "gated" else 2), 12
        assert elements * of_element < info.ffma <= elements * of_element + of_scales, (entry, info.ffma)
        assert info.instructions <= elements * (20 if kind != "gated" else 34) + 80, (entry, info.instructions)


@pytest.fixture(scope="module")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if casts.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("casts")
    casts.Emulator.build(folder)
    return folder


@pytest.fixture
def emulator(emulator_folder: Any, monkeypatch: pytest.MonkeyPatch) -> casts.Emulator:
    """All that a cast does on a GPU is done here, but by a CPU; and new memory is poisoned."""

    def poisoned(x: torch.Tensor, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        new = torch.empty(shape, dtype=dtype, device=x.device)
        new.view(torch.uint8).fill_(0x55) if new.numel() else None
        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return casts.Emulator(emulator_folder, monkeypatch)


@pytest.mark.parametrize("dtype", casts.DTYPES, ids=str)
@pytest.mark.parametrize("name", casts.CASTS)
def test_kernels_on_a_cpu(emulator: casts.Emulator, name: str, dtype: torch.dtype) -> None:
    cast = casts.CASTS[name]
    for seed, shape in enumerate(((1, 32), (7, 160), (144, 288), (2, 130, 1024), (3, 5, 512), (2, 2, 33, 64))):
        for order, x in casts.orders(casts.hard(shape, dtype, seed)):
            for use_ue8m0 in (False, True):
                before = len(emulator.launched)
                got = cast(x, use_ue8m0)
                assert len(emulator.launched) == before + 1
                casts.check(got, emulator.by_torch(lambda cast=cast, x=x, u=use_ue8m0: cast(x, u)), (shape, order))
    kinds = {entry.partition("_")[0] for entry in emulator.launched}
    assert kinds == {"per_token": {"token", "transposed"}, "swiglu": {"gated"}}.get(name, {"tile"})


@pytest.mark.parametrize("name", casts.CASTS)
def test_a_cast_like_one_before_is_launched_at_once(emulator: casts.Emulator, name: str) -> None:
    """With the bits of its own input, into memory of its own; in any order, and however much is forgotten."""
    cast, rng = casts.CASTS[name], random.Random(0)
    inputs = [casts.hard((2, 64, 256), dtype, seed) for dtype in casts.DTYPES for seed in range(2)]
    inputs += [x.mT for x in inputs[:2]] + [casts.hard((64, 512), torch.bfloat16, 9)]
    wants = [[emulator.by_torch(lambda x=x, u=u: cast(x, u)) for u in (False, True)] for x in inputs]
    kept = [cast(inputs[0], False)]
    for _ in range(60):
        i, powers = rng.randrange(len(inputs)), rng.random() < 0.3
        launched, at_once = len(emulator.launched), emulator.at_once
        got = cast(inputs[i], powers) if rng.random() < 0.5 else cast(x=inputs[i], use_ue8m0=powers)
        assert len(emulator.launched) == launched + 1
        casts.check(got, wants[i][powers], (i, powers, emulator.at_once > at_once))
        kept.append(got)
    assert emulator.at_once > 4
    assert len({values.data_ptr() for values, _ in kept}) == len(kept)


def test_other_rows_may_be_real_the_next_time(emulator: casts.Emulator) -> None:
    x = casts.hard((4, 9, 64), torch.bfloat16)
    for counts in ([0, 9, 3, -2], [1, 2, 3, 4], [9, 9, 9, 99]):
        masked_m = torch.tensor(counts, dtype=torch.int32)
        want = emulator.by_torch(lambda: quantize.swiglu_cast_to_fp8(x))
        got = quantize.swiglu_cast_to_fp8(x, masked_m=masked_m)
        casts.check(casts.counted(got, masked_m), casts.counted(want, masked_m))
    assert emulator.at_once == 2
    quantize.swiglu_cast_to_fp8(x, False, masked_m)
    assert emulator.at_once == 2, "who passes it by place is not known"
    with pytest.raises(InvalidInputError, match="masked_m is"):
        quantize.swiglu_cast_to_fp8(x, masked_m=masked_m.long())


def test_a_cast_is_taken_for_no_other(emulator: casts.Emulator) -> None:
    """By PyTorch after one by a kernel, of the same memory; with counts and without."""
    x, counts = casts.hard((4, 64, 256), torch.bfloat16), torch.full((4,), 64, dtype=torch.int32)
    other = x.view(128, 512)
    wants = [emulator.by_torch(lambda y=y: quantize.per_token_cast_to_fp8(y, False, 64)) for y in (x, other)]
    gated = emulator.by_torch(lambda: quantize.swiglu_cast_to_fp8(x))
    for _ in range(3):
        casts.check(quantize.swiglu_cast_to_fp8(x, masked_m=counts), gated)
        casts.check(quantize.swiglu_cast_to_fp8(x), gated)
        casts.check(quantize.swiglu_cast_to_fp8(x, masked_m=None), gated)
        for y, want in zip((x, other), wants, strict=True):
            for _ in range(2):
                casts.check(quantize.per_token_cast_to_fp8(y, False, 64), want)
    assert emulator.at_once >= 6


def test_signatures_hold_for_what_is_known(emulator: casts.Emulator) -> None:
    cast, x = quantize.per_token_cast_to_fp8, torch.ones(8, 256)
    cast(x), cast(x)
    for keywords in ({"masked_m": None}, {"x": x}, {"use": True}):
        with pytest.raises(TypeError):
            cast(x, **keywords)  # type: ignore[arg-type]
    powers = torch.tensor(True)
    for _ in range(2):
        cast(x, powers)  # type: ignore[arg-type]
    assert not any(isinstance(each, torch.Tensor) for key in quantization._thread.known for each in key)


@pytest.mark.parametrize("which", ["x", "masked_m", "starts"])
def test_freed_memory_is_not_read(which: str, emulator: casts.Emulator) -> None:
    x, numbers = torch.ones(2, 128, 256), torch.zeros(2, dtype=INT)
    blocks = torch.zeros(1, dtype=INT), torch.full((1,), 128, dtype=INT)
    call = {
        "x": lambda: quantize.per_token_cast_to_fp8(x),
        "masked_m": lambda: quantize.swiglu_cast_to_fp8(x, masked_m=numbers),
        "starts": lambda: quantize.transposed_cast_of_groups(x[0], *blocks),
    }[which]
    call(), call()
    {"x": x, "masked_m": numbers, "starts": blocks[0]}[which].untyped_storage().resize_(0)
    with pytest.raises(InvalidInputError, match="has no memory, expected one that holds values"):
        call()


def test_what_is_unlike_is_for_the_check(emulator: casts.Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    cast, x = quantize.per_token_cast_to_fp8, torch.ones(8, 256)
    cast(x), cast(x), cast(x, False, 128), cast(x, False, 128)
    assert emulator.at_once == 2
    for arguments in ((x, False, 128.0), (x, False, "128"), (x.int(),), (x.to_sparse(),), (None,), (3,), (x, [0])):
        before = emulator.at_once
        with contextlib.suppress(InvalidInputError, TypeError, RuntimeError):
            cast(*arguments)
        assert emulator.at_once == before, arguments
    wide = torch.ones(8, 264)
    for other in (wide[:, :256], wide.view(-1)[1:2049].view(8, 256), x.half(), x.double(), x.T.contiguous().T, x[None]):
        before = emulator.at_once
        casts.check(cast(other), emulator.by_torch(lambda other=other: cast(other)))
        assert emulator.at_once == before
    monkeypatch.setattr(quantization, "MAX_KNOWN", 3)
    for rows in range(1, 20):
        cast(torch.ones(rows, 256))
    assert len(quantization._thread.known) <= 7


@pytest.mark.parametrize("dtype", casts.DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", casts.CASTS)
def test_every_bit_pattern_on_a_cpu(emulator: casts.Emulator, name: str, dtype: torch.dtype) -> None:
    cast = casts.CASTS[name]
    for order, x in casts.every_pattern(dtype):
        casts.check(cast(x), emulator.by_torch(lambda x=x: cast(x)), order)
    assert len(emulator.launched) == 5


@pytest.mark.parametrize("groups", [1, 3, 32, 70])
def test_counted_rows_on_a_cpu(emulator: casts.Emulator, groups: int) -> None:
    rng = np.random.default_rng(groups)
    for m, width in ((1, 64), (40, 288), (9, 2048)):
        x = casts.hard((groups, m, width), torch.bfloat16)
        counts = torch.from_numpy(rng.choice([0, 0, 1, m // 2, m, m + 5, -3], groups).astype(np.int32))
        for use_ue8m0 in (False, True):
            got = quantize.swiglu_cast_to_fp8(x, use_ue8m0, counts)
            want = emulator.by_torch(lambda x=x, u=use_ue8m0: quantize.swiglu_cast_to_fp8(x, u))
            casts.check(casts.counted(got, counts), casts.counted(want, counts), (m, width, counts))
            left = torch.arange(m)[:, None] >= counts[:, None, None]
            assert bool((casts.bits(got[0]) == 0x55).logical_or(~left).all()), "a row that is not real was written"
            assert bool((casts.bits(got[1]) == 0x55555555).logical_or(~left).all())
    assert set(emulator.launched) == {"gated_bf16"}


@each_rounding_of_scales
def test_groups_of_rows_on_a_cpu(emulator: casts.Emulator, use_ue8m0: bool) -> None:
    for dtype in casts.DTYPES:
        x = casts.hard((768, 144), dtype)
        got = quantize.transposed_cast_of_groups(x, STARTS, SIZES, use_ue8m0)
        emulator.enabled = False
        check_groups(got, x, use_ue8m0)
        emulator.enabled = True
        assert bool((casts.bits(got[0])[384 * 144 : 640 * 144] == 0x55).all()), "rows of no group were written"
    assert emulator.launched == [f"transposed_{name}" for name in quantization.TYPES.values()]


def test_numbers_that_make_no_groups_write_nothing(emulator: casts.Emulator) -> None:
    x = casts.hard((256, 16), torch.bfloat16)
    for starts, sizes in (
        ([-128, 128], [128, 256]),
        ([2**31 - 1] * 2, [2**31 - 1] * 2),
        ([0, 0], [-1, 128]),
        ([-1, -1], [0, 0]),
    ):
        numbers = (torch.tensor(y, dtype=INT) for y in (starts, sizes))
        values, scales = quantize.transposed_cast_of_groups(x, *numbers)
        assert bool((casts.bits(values) == 0x55).all()) and bool((casts.bits(scales) == 0x55555555).all())


def test_what_the_kernels_do_not_take(emulator: casts.Emulator) -> None:
    for x, gran_k in (
        (torch.randn(8, 128, dtype=torch.float64), 128),
        (torch.randn(8, 128), 64),
        (torch.randn(8, 120), 128),
    ):
        quantize.per_token_cast_to_fp8(x, gran_k=gran_k)
        quantize.per_block_cast_to_fp8(x, gran_k=gran_k)
    quantize.swiglu_cast_to_fp8(torch.randn(8, 48))  # half of it is no multiple of 16
    quantize.transposed_cast_of_groups(torch.randn(128, 8))
    assert emulator.launched == []


def test_a_view_that_negates_its_memory(emulator: casts.Emulator) -> None:
    x = torch.randn(8, 128, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    casts.check(quantize.per_token_cast_to_fp8(x), emulator.by_torch(lambda: quantize.per_token_cast_to_fp8(x)))


# ---- launches ----


def test_structures_have_the_sizes_of_the_kernel() -> None:
    assert ctypes.sizeof(quantization._Args) == 104
    assert quantization._Args.input_row.offset == 64


WALKS = {
    # kind, shape, strides, bytes of an element; grid; groups side by side in a tile, scales in a line
    "rows": (("token", (1, 8192, 7168), (0, 7168, 1), 2), (7 * 1024, 1, 1), 8, 8192),
    "rows of four": (("token", (2, 131, 1536), (131 * 1536, 1536, 1), 4), (3 * 17, 2, 1), 4, 132),
    "one group": (("token", (1, 131, 16), (0, 16, 1), 2), (3, 1, 1), 1, 132),
    "gated": (("gated", (1, 131, 4096), (0, 4096, 1), 2), (2 * 17, 1, 1), 8, 132),
    "gated and counted": (("gated", (32, 4096, 4096), (2**24, 4096, 1), 2, False, 132), (132 * 8, 1, 1), 8, 4096),
    "few that are counted": (("gated", (2, 4, 256), (1024, 256, 1), 2, False, 132), (2, 1, 1), 1, 4),
    "blocks": (("tile", (1, 7168, 18432), (0, 18432, 1), 2, True), (56 * 144, 1, 1), 1, 144),
    "columns": (("tile", (3, 129, 144), (129 * 144, 144, 1), 4), (4, 3, 1), 1, 144),
    "transposed": (("transposed", (1, 256, 144), (0, 144, 1), 2), (4, 1, 1), 1, 144),
    "many groups": (("token", (70000, 1, 128), (128, 128, 1), 2), (1, 65535, 2), 1, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", WALKS)
def test_walks(name: str) -> None:
    arguments, grid, side_by_side, line = WALKS[name]
    walk = quantization.walk_of(*arguments)
    args = quantization._Args.from_buffer_copy(walk.args)
    assert walk.grid == grid and (1 << args.tile_groups_log2, args.scales_line) == (side_by_side, line)
    assert walk.threads == (256 if arguments[0] in ("token", "gated") else 512)
    assert max(walk.grid[0] / 2**31, walk.grid[1] / 2**16, walk.grid[2] / 2**16) < 1


def test_scales_are_where_the_kernel_writes_them() -> None:
    for batches, m, k in ((1, 131, 272), (3, 5, 2048)):
        x = torch.zeros(batches, m, k)
        for kind, of_blocks, (_, scales), line in (
            ("token", False, quantize.outputs_of_per_token(x), -1),
            ("tile", True, quantize.outputs_of_per_block(x), -2),
            ("tile", False, quantize.outputs_of_per_channel(x), -2),
        ):
            args = quantization._Args.from_buffer_copy(
                quantization.walk_of(kind, x.shape, x.stride(), 4, of_blocks).args
            )
            assert (args.scales_batch, args.scales_line) == (scales.stride(0), scales.stride(line)), kind


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.zeros(2, 8, 32), True),
        (torch.zeros(2, 8, 40)[..., :32], True),
        (torch.zeros(2, 8, 32).half(), True),
        (torch.zeros(8, 32).expand(2, 8, 32), True),
        (torch.zeros(2, 8, 36)[..., 4:], True),
        (torch.zeros(2, 8, 33)[..., :32], False),
        (torch.zeros(2, 8, 36)[..., 1:33], False),
        (torch.zeros(2, 32, 8).mT, False),
        (torch.zeros(2, 8, 24), False),
        (torch.zeros(2, 8, 32).double(), False),
    ],
)
def test_what_the_kernels_read_where_it_lies(x: torch.Tensor, fits: bool) -> None:
    assert quantization.fits(x) is fits


def test_a_refusal_of_the_driver_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = importlib.import_module("cuda.bindings.driver")
    notes = SimpleNamespace(
        cuLaunchKernel=lambda *arguments: (cuda.CUresult(1),),
        cuCtxGetCurrent=lambda: (0, 1),
        cuGetErrorName=lambda code: (0, b"CUDA_ERROR_INVALID_VALUE"),
        cuGetErrorString=lambda code: (0, b"invalid argument"),
    )
    for module in (quantization, driver):
        monkeypatch.setattr(module, "driver", lambda: notes)
    monkeypatch.setattr(quantization, "_kernel", lambda index, entry: entry)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    x = torch.zeros(1, 8, 128)
    with pytest.raises(LaunchError, match=r"^launching a cast to FP8: CUDA_ERROR_INVALID_VALUE: invalid argument$"):
        quantization.cast("token", x, *quantize.outputs_of_per_token(x), False)


def test_another_gpu_than_hopper_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=SimpleNamespace(index=0))
    for capability, offered in (((9, 0), True), ((10, 0), False), ((8, 9), False)):
        monkeypatch.setattr(devices, "current", lambda index, c=capability: SimpleNamespace(capability=c))
        assert quantization.is_offered(x) is offered  # type: ignore[arg-type]
        quantization._kernel.cache_clear()
        if not offered:
            assert quantization.prepare(0, "token_fp32") is None
    quantization._kernel.cache_clear()
