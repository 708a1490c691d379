"""The reference against what an H100 computed, against a second model in exact arithmetic, and against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deep_gemm import reference
from deep_gemm.errors import InvalidInputError
from deep_gemm.layout import ceil_div
from deep_gemm.quantize import per_block_cast_to_fp8, per_token_cast_to_fp8
from deep_gemm.testing import calc_diff, count_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VECTORS = Path(__file__).parent / "data" / "h100_e4m3_k32.npz"
NAN = 0x7FFFFFFF
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# A second model: integers and fractions, one element at a time, with the knobs of plausible wrong models.


def significand_and_exponent(x: float, smallest_exponent: int) -> tuple[Fraction, int]:
    exponent = max(math.frexp(x)[1] - 1, smallest_exponent)
    return Fraction(x) / Fraction(2) ** exponent, exponent


def truncate(x: Fraction, exponent: int, bits: int, floor: bool = False) -> Fraction:
    """x cut at the weight 2**(exponent - bits)."""
    last_bit = Fraction(2) ** (exponent - bits)
    return (math.floor if floor else math.trunc)(x / last_bit) * last_bit


def k32_model(
    a: np.ndarray,
    b: np.ndarray,
    c: float = 0.0,
    *,
    bits: int = 13,
    result_bits: int = 13,
    floor: bool = False,
    normalised: bool = False,
    group: int = 32,
) -> float:
    for i in range(0, len(a), group):
        terms: list[tuple[Fraction, int]] = []
        for x, y in zip(a[i : i + group].tolist(), b[i : i + group].tolist(), strict=True):
            exponent = significand_and_exponent(x, -6)[1] + significand_and_exponent(y, -6)[1]
            if normalised and x * y:
                exponent = math.frexp(x * y)[1] - 1
            terms.append((Fraction(x) * Fraction(y), exponent))
        terms.append((Fraction(c), significand_and_exponent(c, -126)[1]))
        top = max((exponent for value, exponent in terms if value), default=0)
        total = sum((truncate(value, top, bits, floor) for value, _ in terms), Fraction(0))
        c = float(truncate(total, significand_and_exponent(float(total), -126)[1], result_bits, floor))
    return c


def rounded_to_fp32(x: Fraction) -> float:
    """To nearest, ties to even, with subnormals and overflow."""
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    last_bit = Fraction(2) ** (max(exponent, -126) - 23)
    value = round(x / last_bit) * last_bit  # Fraction's round: ties to even
    return math.copysign(float(abs(value)) if abs(value) < 2**128 else math.inf, x)


def fma_model(x: float, y: float, z: float) -> float:
    if not all(map(math.isfinite, (x, y, z))) or x * y + z == 0:
        return x * y + z
    return rounded_to_fp32(Fraction(x) * Fraction(y) + Fraction(z))


# Operands


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bits of FP32, BF16 or E4M3 values; torch and numpy alike."""
    if isinstance(x, torch.Tensor):
        x = x.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).numpy()
    return x.view(f"uint{8 * x.itemsize}")


def random_e4m3(shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Every code but NaN, alike often."""
    codes = rng.integers(0, 127, shape, dtype=np.uint8) | rng.integers(0, 2, shape, dtype=np.uint8) << 7
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def random_scales(shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(np.exp(rng.normal(0, 2, shape)).astype(np.float32))


def codes(m: int, n: int, k: int, rng: np.random.Generator) -> Operands:
    blocks = ceil_div(k, 128)
    a_scales, b_scales = random_scales((m, blocks), rng), random_scales((ceil_div(n, 128), blocks), rng)
    return random_e4m3((m, k), rng), a_scales, random_e4m3((n, k), rng), b_scales


def normal(m: int, n: int, k: int, rng: np.random.Generator) -> Operands:
    a, b = (torch.from_numpy(rng.normal(size=(x, k)).astype(np.float32)) for x in (m, n))
    return *per_token_cast_to_fp8(a), *per_block_cast_to_fp8(b)


def cancelling(m: int, n: int, k: int, rng: np.random.Generator) -> Operands:
    """Neighbouring products cancel, but for what the tensor core cuts off."""
    a, a_scales, b, b_scales = codes(m, n, k, rng)
    a, b = a.float(), b.float()
    a[:, 1::2], b[:, 1::2] = -a[:, ::2], b[:, ::2]
    return a.to(torch.float8_e4m3fn), a_scales, b.to(torch.float8_e4m3fn), b_scales


def dequantised(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """a [M, K] and b [N, K] in float64, scales included."""
    a_scales, b_scales = (x.double().repeat_interleave(128, 1)[:, : a.shape[1]] for x in (a_scales, b_scales))
    return a.double() * a_scales, b.double() * b_scales.repeat_interleave(128, 0)[: len(b)]


def moved(operands: Operands, device: str) -> Operands:
    a, a_scales, b, b_scales = operands
    return a.to(device), a_scales.to(device), b.to(device), b_scales.to(device)


# One step of the tensor core


def test_an_h100_agrees_with_every_vector() -> None:
    with np.load(VECTORS) as data:
        a, b, d = data["a"], data["b"], data["d"]
    assert len(d) == 1000
    assert np.count_nonzero(bits(reference.tensor_core_k32(a, b)) != bits(d)) == 0
    of_tensors = reference.tensor_core_k32(torch.from_numpy(a), torch.from_numpy(b))
    assert np.array_equal(bits(of_tensors), bits(d))


def disagreements(**model: Any) -> int:
    """How many of the H100's results the second model, so changed, does not give."""
    with np.load(VECTORS) as data:
        results = [k32_model(a, b, **model) for a, b in zip(data["a"], data["b"], strict=True)]
        return np.count_nonzero(bits(np.array(results, dtype=np.float32)) != bits(data["d"]))


def test_an_h100_agrees_with_the_second_model() -> None:
    assert disagreements() == 0


WRONG_MODELS = [{"bits": 12}, {"bits": 14}, {"result_bits": 23}, {"floor": True}, {"normalised": True}, {"group": 16}]


@pytest.mark.parametrize("wrong", WRONG_MODELS, ids=str)
def test_an_h100_disagrees_with_other_models(wrong: dict[str, Any]) -> None:
    assert disagreements(**wrong) > 50


@pytest.mark.parametrize("device", DEVICES)
def test_step_with_any_accumulator(device: str) -> None:
    rng = np.random.default_rng(1)
    n = 3000
    a, b = (random_e4m3((n, 32), rng).float().numpy() for _ in "ab")
    a[rng.random(a.shape) < 0.7] = 0  # from dense rows to rows of nothing but zeros
    a[n // 2 :] *= rng.random(n - n // 2)[:, None] < 0.5
    a[-500:, 0], a[-500:, 1:] = rng.integers(1, 8, 500) * 2.0**-9, 0  # a subnormal decides the largest exponent
    b[-250:, 0] = rng.integers(1, 8, 250) * 2.0**-9
    any_bits = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    near = (rng.normal(size=n) * 2.0 ** rng.integers(-30, 30, n)).astype(np.float32)
    special = np.array([0x0, 0x1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x33800000], dtype=np.uint32).view(np.float32)
    c = np.where(rng.random(n) < 0.3, any_bits, near)
    c[-500:] = a[-500:, 0] * b[-500:, 0] * rng.normal(size=500)
    c[: 2 * len(special)] = np.concatenate([special, -special])
    c[n // 2 : n // 2 + 2 * len(special)] = np.concatenate([special, -special])
    c[~np.isfinite(c)] = 0
    got = reference.tensor_core_k32(*(torch.from_numpy(x).to(device) for x in (a, b, c)))
    want = np.array([k32_model(*x) for x in zip(a, b, c.tolist(), strict=True)], dtype=np.float32)
    assert np.array_equal(bits(got), bits(want))


@pytest.mark.parametrize("device", DEVICES)
def test_step_with_nan_inf_and_signed_zero(device: str) -> None:
    one, zero = torch.zeros(1, 32, device=device), torch.zeros(1, 32, device=device)
    one[0, 5] = 1.0

    def step(a: torch.Tensor, c: float | torch.Tensor | None) -> int:
        c = None if c is None else torch.as_tensor(c, dtype=torch.float32).reshape(1).to(device)
        return int(bits(reference.tensor_core_k32(a, one, c))[0])

    assert step(zero, None) == step(-zero, -0.0) == step(zero, 0.0) == 0  # +0
    assert step(one, -1.0) == 0
    assert step(one, math.inf) == step(zero, math.inf) == 0x7F800000
    assert step(one, -math.inf) == step(zero, -math.inf) == 0xFF800000
    signalling = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    assert step(one, math.nan) == step(zero, -math.nan) == step(zero, signalling) == NAN
    nan = one * math.nan
    assert step(nan, None) == step(nan, math.inf) == step(nan, 1.0) == NAN
    assert step((one - 1) * math.nan, None) == NAN  # also where b is 0


def test_step_rejects_what_it_cannot_compute() -> None:
    x = torch.zeros(2, 32)
    with pytest.raises(InvalidInputError, match=r"shapes \(2, 31\), \(2, 32\), \(2,\), expected \[n, 32\]"):
        reference.tensor_core_k32(x[:, 1:], x)
    with pytest.raises(InvalidInputError, match=r"\(1,\), expected"):
        reference.tensor_core_k32(x, x, x[:1, 0])
    for wrong in (x + 0.3, x + 500, x + math.inf, x.double()):
        with pytest.raises(InvalidInputError, match="not E4M3: round with"):
            reference.tensor_core_k32(wrong, x)


# Promotion


@pytest.mark.parametrize("device", DEVICES)
def test_fma_rounds_once(device: str) -> None:
    rng = np.random.default_rng(2)
    special = [0x0, 0x1, 0x3, 0x7FFFFF, 0x800000, 0x800001, 0x1FFFFFFF, 0x33800000, 0x337FFFFF, 0x34000001]
    special += [0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FFFFFFF, 0x4B800000, 0x4B800001, 0x7F7FFFFF, 0x7F800000]
    special = np.array(special, dtype=np.uint32).view(np.float32)
    grid = np.array(list(itertools.product(*[np.concatenate([special, -special])] * 3)), dtype=np.float32).T
    patterns = rng.integers(0, 2**32, (3, 20000), dtype=np.uint32).view(np.float32)
    patterns[:, ~np.isfinite(patterns).all(0)] = 1.0
    near = rng.integers(0, 2**23, (3, 20000), dtype=np.uint32).view(np.float32)  # subnormal: only their bits are used
    near = (near.view(np.uint32) | 0x3F800000).view(np.float32) * rng.choice([-1, 1], near.shape).astype(np.float32)
    near[0] *= 2.0 ** rng.integers(-50, 50, near.shape[1])
    ties = near.copy()  # z + half an ulp of z * (1 - j * j * 2**-46): so near to a tie that float64 sees one
    j = rng.integers(1, 1000, near.shape[1]) * 2.0**-23
    ties[0], ties[1] = np.copysign(2.0**-24 * (1 + j), near[0]), 1 - j
    low = near * np.array([[2.0**-70], [2.0**-70], [2.0**-130]], dtype=np.float32)  # subnormal results
    x, y, z = np.concatenate([grid, patterns, near, ties, low], axis=1)
    got = reference._fma(*(torch.from_numpy(v.copy()).to(device) for v in (x, y, z))).cpu().numpy()
    with np.errstate(all="ignore"):
        want = np.array([fma_model(*v) for v in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)], dtype=np.float32)
        naive = (x.astype(np.float64) * y + z).astype(np.float32)
    same = (bits(got) == bits(want)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), (x[~same][:5], y[~same][:5], z[~same][:5])
    assert np.count_nonzero(bits(naive) != bits(want)) > 100  # the data would notice double rounding


@pytest.mark.parametrize("device", DEVICES)
def test_to_bf16_is_the_gpu_s(device: str) -> None:
    rng = np.random.default_rng(3)
    high = np.arange(2**16, dtype=np.uint32) << 16
    x = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = np.concatenate([x, rng.integers(0, 2**32, 100000, dtype=np.uint32)])
    rounded = (x.astype(np.uint64) + 0x7FFF + (x >> 16 & 1)) >> 16
    want = np.where(x & NAN > 0x7F800000, 0x7FFF, rounded).astype(np.uint16)
    got = reference.to_bf16(torch.from_numpy(x.view(np.float32)).to(device))
    assert np.array_equal(bits(got), want)


def test_exact_gemm_against_the_second_model() -> None:
    rng = np.random.default_rng(4)
    m, n, k = 5, 136, 272  # a last block of 16, b across two rows of scales
    a, a_scales, b, b_scales = codes(m, n, k, rng)
    a_scales[1] = torch.tensor([1e-38, 3e-42, 1e-30])  # products with b's scales are subnormal
    a_scales[2] *= 1e37
    got = bits(reference.fp8_gemm_nt(a, a_scales, b, b_scales, exact=True))
    x, y = a.float().numpy(), b.float().numpy()
    for i, j in itertools.product(range(m), (0, 77, 127, 128, 135)):
        final = 0.0
        for block in range(3):
            acc = 0.0
            for step in range(block * 128, min(block * 128 + 128, k), 32):
                acc = k32_model(x[i, step : step + 32], y[j, step : step + 32], acc)
            s = rounded_to_fp32(Fraction(a_scales[i, block].item()) * Fraction(b_scales[j // 128, block].item()))
            final = fma_model(s, acc, final)
        assert got[i, j] == bits(np.array(final, dtype=np.float32)), (i, j)


# The whole multiplication


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("data", [normal, codes, cancelling], ids=lambda f: f.__name__)
def test_every_element_within_the_derived_bound(data: Callable[..., Operands], exact: bool, device: str) -> None:
    rng = np.random.default_rng(5)
    shapes = [(1, 8, 16), (7, 136, 144), (65, 576, 192), (128, 200, 1152), (33, 130, 7296), (600, 1040, 128)]
    for m, n, k in shapes:
        operands = moved(data(m, n, k, rng), device)
        for split in (2, 3, 8):
            split_truth, split_bound = reference.truth_and_bound(*operands, exact=exact, split=min(split, -(-k // 128)))
            split_result = reference.fp8_gemm_nt(*operands, exact=exact, split=min(split, -(-k // 128)))
            assert bool(((split_result.double() - split_truth).abs() <= split_bound).all()), (m, n, k, split)
        truth, bound = reference.truth_and_bound(*operands, exact=exact)
        a, b = dequantised(*operands)
        assert bool(((truth - a @ b.T).abs() <= 1e-12 * (a.abs() @ b.abs().T)).all())
        result = reference.fp8_gemm_nt(*operands, exact=exact)
        assert result.shape == (m, n)
        assert bool(((result.double() - truth).abs() <= bound).all()), (m, n, k)

        guarded = torch.full((m + 2, n), math.nan, dtype=torch.bfloat16, device=device)
        reference.run(*operands, guarded[1:-1], exact=exact)
        assert bool(guarded[0].isnan().all()) and bool(guarded[-1].isnan().all())
        assert np.array_equal(bits(guarded[1:-1]), bits(reference.to_bf16(result)))
        error = (guarded[1:-1].double() - truth).abs()
        assert bool((error <= reference.bf16_bound(truth, bound)).all()), (m, n, k)


def test_the_bounds_notice_small_faults() -> None:
    a, a_scales, b, b_scales = normal(64, 256, 7168, np.random.default_rng(6))
    truth, bound = reference.truth_and_bound(a, a_scales, b, b_scales)
    typical = truth.square().mean().sqrt().item()
    assert bound.max() < 1e-3 * typical
    assert reference.truth_and_bound(a, a_scales, b, b_scales, exact=True)[1].max() < 0.3 * typical
    without_tail = reference.fp8_gemm_nt(a[:, :-16], a_scales, b[:, :-16], b_scales)
    assert ((without_tail.double() - truth).abs() > bound).double().mean() > 0.9
    neighbour = reference.fp8_gemm_nt(a, a_scales, b, b_scales.flip(0))
    assert ((neighbour.double() - truth).abs() > bound).double().mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_exact_bits_depend_on_nothing_but_the_row_and_the_column(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    a, a_scales, b, b_scales = moved(codes(150, 300, 400, rng), device)
    whole = bits(reference.fp8_gemm_nt(a, a_scales, b, b_scales, exact=True))
    for tile in ((1, 300), (150, 7), (1000, 1000)):
        monkeypatch.setattr(reference, "_TILE", tile)
        monkeypatch.setattr(reference, "_EXACT_CPU_TILE", tile)
        assert np.array_equal(bits(reference.fp8_gemm_nt(a, a_scales, b, b_scales, exact=True)), whole)
    for m in (1, 63, 149):
        assert np.array_equal(bits(reference.fp8_gemm_nt(a[:m], a_scales[:m], b, b_scales, exact=True)), whole[:m])


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_rows_and_columns_picked_out_of_a_larger_problem(exact: bool) -> None:
    a, a_scales, b, b_scales = codes(70, 400, 272, np.random.default_rng(8))
    whole = reference.fp8_gemm_nt(a, a_scales, b, b_scales, exact=exact)
    rows, columns = torch.tensor([69, 0, 3, 64]), torch.tensor([399, 127, 128, 5])
    picked = reference.fp8_gemm_nt_per_column_scales(
        a.view(torch.uint8)[rows].view(a.dtype),
        a_scales[rows],
        b.view(torch.uint8)[columns].view(b.dtype),
        b_scales[columns // 128],
        exact=exact,
    )
    want = whole[rows][:, columns]
    assert torch.equal(picked, want) if exact else (picked - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_any_strides(exact: bool) -> None:
    a, a_scales, b, b_scales = codes(37, 260, 300, np.random.default_rng(9))
    want = bits(reference.fp8_gemm_nt(a, a_scales, b, b_scales, exact=exact))
    wide = torch.full((37, 9), math.nan)
    wide[:, 1:9:3] = a_scales
    padded = torch.zeros(260, 512, dtype=torch.uint8).view(b.dtype)
    padded[:, :300] = b
    got = reference.fp8_gemm_nt(a.T.clone().T, wide[:, 1:9:3], padded[:, :300], b_scales.T.contiguous().T, exact=exact)
    assert np.array_equal(bits(got), want)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_empty_problems(exact: bool) -> None:
    for m, n, k in ((0, 8, 128), (3, 0, 128), (0, 0, 16), (3, 8, 0)):
        result = reference.fp8_gemm_nt(*codes(m, n, k, np.random.default_rng(0)), exact=exact)
        assert torch.equal(result, torch.zeros(m, n))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_nan_and_inf_go_where_they_belong(exact: bool, device: str) -> None:
    a, a_scales, b, b_scales = codes(6, 256, 384, np.random.default_rng(10))
    b_scales += 1
    a.view(torch.uint8)[1, 200] = 0xFF  # -NaN
    a_scales[2, 1] = math.nan
    a_scales[3, 2] = math.inf  # times a sum that is not 0
    a_scales[4, 0], a[4, :128] = math.inf, 0  # inf * 0
    b_scales[1, 0] = -math.inf
    b[128, :128] = 0
    operands = moved((a, a_scales, b, b_scales), device)
    got = reference.fp8_gemm_nt(*operands, exact=exact).cpu()
    nan = got.isnan()
    assert set(bits(got)[nan.numpy()]) == {NAN}
    assert nan[[1, 2, 4]].all() and nan[:, 128].all()
    assert not nan[[0, 5]][:, :128].any() and got[3, :128].isinf().all()
    assert got[0, 129:].isinf().all()  # a sum of exactly 0 is not in this data
    d = torch.zeros(6, 256, dtype=torch.bfloat16, device=device)
    reference.run(*operands, d, exact=exact)
    assert set(bits(d)[nan.numpy()]) == {0x7FFF}


@pytest.mark.gpu
def test_a_gpu_gives_the_same_exact_bits() -> None:
    operands = codes(300, 1500, 1000, np.random.default_rng(11))
    want = bits(reference.fp8_gemm_nt(*operands, exact=True))
    assert np.array_equal(bits(reference.fp8_gemm_nt(*moved(operands, "cuda"), exact=True)), want)


# deep_gemm.testing


def test_calc_diff_is_not_a_check() -> None:
    x = torch.randn(4096, 2112, generator=torch.Generator().manual_seed(0))
    assert calc_diff(x, x) == 0
    assert calc_diff(x, -x) == pytest.approx(2)
    y = x.clone()
    y[:128, :128] = 0  # a whole tile is gone
    assert 0.0005 < calc_diff(x, y) < 0.001
    y[0, 0] = math.nan
    assert math.isnan(calc_diff(x, y))
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0


def test_count_bytes() -> None:
    x, y = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.float8_e4m3fn)
    assert count_bytes(x, None, (y, [x, (None,)])) == 30 + 7 + 30
    assert count_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [False, True])
def test_autocast_changes_nothing(dtype: torch.dtype, exact: bool):
    a = per_token_cast_to_fp8(torch.randn(16, 512))
    b = per_block_cast_to_fp8(torch.randn(24, 512))
    want = reference.fp8_gemm_nt(*a, *b, exact=exact)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(reference.fp8_gemm_nt(*a, *b, exact=exact), want)
        again = per_block_cast_to_fp8(torch.nn.Parameter(torch.randn(24, 512)))
    assert not again[1].requires_grad
