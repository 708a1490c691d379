"""Casts to FP8: bits against a model in numpy, the groups at the edges, NaN and inf, and the way back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_gemm import quantize, utils
from deep_gemm.errors import InvalidInputError
from deep_gemm.layout import ceil_div

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
        assert scales.dtype == torch.float32 and scales.is_contiguous()
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
