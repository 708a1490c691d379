"""The same multiplications in plain torch, on any device: the CPU backend, and (exact=True) Hopper's result to the bit.

The model, where it comes from and what is inferred: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InvalidInputError
from .layout import align, ceil_div, is_whole
from .problem import Kind, Operands, Problem

Floats: TypeAlias = NDArray[np.float32]

BLOCK = 128  # one scale per so many columns of K; b has one per so many rows as well
STEP = 32  # K of one wgmma instruction
_TILE = (512, 1024)  # rows and columns of the result at a time, so that memory is bounded
_EXACT_CPU_TILE = (64, 128)  # 32 times as many products at a time: 1 MiB, which stays in cache
_NAN = 0x7FFFFFFF  # the one NaN that the GPU makes
_FRACTION_BITS = 13  # what the tensor core keeps of every term, and of the sum
_E4M3_SMALLEST_NORMAL = 2.0**-6  # subnormals share its exponent


def fp8_gemm_nt(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    *,
    exact: bool = False,
    split: int = 1,
) -> torch.Tensor:
    """a @ b.T with scales, before the rounding to BF16: [M, N] FP32, a new tensor.

    a: [M, K] E4M3. a_scales: [M, ceil(K / 128)] FP32. b: [N, K] E4M3. b_scales: [ceil(N / 128), ceil(K / 128)] FP32.
    Any strides, any K. exact: bit for bit Hopper's result, some thirty times slower; else FP32 matrix multiplications.
    split: into how many parts the plan divides K (`Plan.split`). Each is added up from 0, then one after the other.
    """
    return fp8_gemm_nt_per_column_scales(a, a_scales, b, _per_column(b_scales, b), exact=exact, split=split)


def fp8_gemm_nt_per_column_scales(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    *,
    exact: bool = False,
    split: int = 1,
) -> torch.Tensor:
    """fp8_gemm_nt with b_scales [N, ceil(K / 128)], a row per row of b: for rows picked out of a larger b."""
    ends = _part_ends(a.shape[1], split)[:-1]
    result = torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    tile = _EXACT_CPU_TILE if exact and a.device.type == "cpu" else _TILE
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):  # as on the GPU, neither has a say
        for rows, columns in _tiles(result, tile):
            total, before = torch.zeros_like(result[rows, columns]), None
            pairs = _k_blocks(a[rows], a_scales[rows], b[columns], b_scales[columns])
            for block, (x, y, scale_x, scale_y) in enumerate(pairs):
                if exact:
                    total = _fma(scale_x * scale_y, _tensor_core_block(x, y), total)
                else:
                    total.addcmul_(scale_x * scale_y, x @ y.T)
                if block in ends:
                    before = total if before is None else before + total
                    total = torch.zeros_like(total)
            result[rows, columns] = total if before is None else before + total
        return _with_one_nan(result)


@torch.no_grad()
def run(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    d: torch.Tensor,
    *,
    exact: bool = False,
    split: int = 1,
) -> None:
    """Writes fp8_gemm_nt(...), rounded to BF16, into d [M, N]."""
    d.copy_(to_bf16(fp8_gemm_nt(a, a_scales, b, b_scales, exact=exact, split=split)))


@torch.no_grad()
def multiply(problem: Problem, o: Operands, *, exact: bool = False, split: int = 1) -> None:
    """Writes into o.d what the kernel writes there, for every kind of problem; the other rows of d stay as they are.

    split: into how many parts the plan divides K, which is 1 but for dense problems of few rows.
    """
    row_scales = fp8_gemm_nt_per_column_scales if problem.column_scales else fp8_gemm_nt
    if problem.column_scales:
        for d, c, a, a_scales, b, b_scales in _column_scaled(problem, o):
            total = row_scales(a, a_scales, b, b_scales, exact=exact)
            d.copy_(total if c is None else _with_one_nan(c + total))
        return
    for group, rows in _rows_of_groups(problem, o.layout):
        a, d, a_scales = (x[group] if x.dim() == 3 else x for x in (o.a, o.d, o.a_scales))
        b, b_scales = (x[group] if x.dim() == 3 else x for x in (o.b, o.b_scales))
        picked = a.view(torch.uint8)[rows].view(a.dtype)
        d[rows] = to_bf16(row_scales(picked, a_scales[rows], b, b_scales, exact=exact, split=split))
    if o.clear_padding:
        o.d[_padding(problem, o.layout)] = 0


def _rows_of_groups(problem: Problem, layout: torch.Tensor | None) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Every group, and which rows are its own."""
    if layout is None:
        yield 0, slice(None)
    elif problem.kind == Kind.CONTIGUOUS:
        yield from ((group, (layout == group).nonzero()[:, 0]) for group in range(problem.groups))
    elif problem.kind == Kind.MASKED:
        counts = layout.clamp(0, problem.m).tolist()
        yield from ((group, slice(count)) for group, count in enumerate(counts))
    else:
        yield from ((group, slice(start, end)) for group, (start, end) in enumerate(_ranges(problem, layout)))


def _padding(problem: Problem, layout: torch.Tensor | None) -> torch.Tensor:
    """The rows that are padding, and become zeros."""
    assert layout is not None
    if problem.kind == Kind.CONTIGUOUS:
        return ((layout < 0) | (layout >= problem.groups)).nonzero()[:, 0]
    gaps = [range(end, min(align(end, problem.alignment), problem.m)) for end in layout.clamp(0, problem.m).tolist()]
    return torch.tensor([row for gap in gaps for row in gap], dtype=torch.int64, device=layout.device)


def _ranges(problem: Problem, layout: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First and last row, or column along K, of every group. Whatever layout holds, they lie within the tensors."""
    size = problem.k if problem.kind in (Kind.K_GROUPED, Kind.K_ENDS) else problem.m
    end = 0
    for number in layout.clamp(0, size).tolist():
        if problem.kind == Kind.K_GROUPED:
            start, end = min(end, size), min(end + number // BLOCK * BLOCK, size)
            yield start, end
        else:
            start, end = align(end, problem.alignment), number
            yield start, max(start, end)


def _column_scaled(
    problem: Problem, o: Operands
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """d, c, a, its scales, b, its scales of every multiplication; where K is grouped, of every group's."""
    if o.layout is None:
        yield o.d, o.c, o.a, o.a_scales, o.b, o.b_scales
        return
    for group, (start, end) in enumerate(_ranges(problem, o.layout)):
        width, blocks = align(end - start, BLOCK), slice(start // BLOCK, ceil_div(end, BLOCK))
        a, b = (
            x[start * rows : (start + width) * rows].view(rows, width)[:, : end - start]
            for x, rows in ((o.a, problem.m), (o.b, problem.n))
        )
        c = None if o.c is None else o.c[group]
        yield o.d[group], c, a, o.a_scales[:, blocks], b, o.b_scales[:, blocks]


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """FP32 -> BF16 as Hopper's cvt.rn.bf16x2.f32: to nearest, ties to even, every NaN becomes 0x7FFF."""
    result = x.to(torch.bfloat16)
    result.view(torch.int16).masked_fill_(x.isnan(), 0x7FFF)
    return result


@overload
def tensor_core_k32(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor: ...
@overload
def tensor_core_k32(a: Floats, b: Floats, c: Floats | None = None) -> Floats: ...
def tensor_core_k32(a: Any, b: Any, c: Any = None) -> Any:
    """One wgmma K=32 step for n elements of a result: c + sum(a * b) as the tensor core computes it.

    a, b: [n, 32] FP32 holding E4M3 values. c: [n], any FP32; None is 0. Result: [n] FP32. numpy arrays or tensors.
    Raises: InvalidInputError for other shapes, or values that E4M3 does not have.
    """
    if isinstance(a, np.ndarray):
        a, b = torch.from_numpy(np.array(a)), torch.from_numpy(np.array(b))
        return tensor_core_k32(a, b, None if c is None else torch.from_numpy(np.array(c))).numpy()
    c = a.new_zeros(len(a)) if c is None else c
    if a.dim() != 2 or a.shape[1] != STEP or a.shape != b.shape or c.shape != a.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (a, b, c))
        raise InvalidInputError(f"a, b and c have shapes {shapes}, expected [n, {STEP}], [n, {STEP}] and [n]")
    if not all(x.dtype == torch.float32 for x in (a, b, c)) or not all(_is_e4m3(x) for x in (a, b)):
        raise InvalidInputError(
            "a, b and c are not FP32, or a or b is not E4M3: round with x.to(torch.float8_e4m3fn).float()"
        )
    a, b = a.T, b.T
    products = a * b
    result = _k32_step(a, b, _e4m3_power(a), _e4m3_power(b), c)
    result = torch.where((products == 0).all(0), _keep_fraction_bits(c), result)
    plain_sum = products.sum(0) + c  # cannot overflow: inf only from an inf in c
    return _with_one_nan(torch.where(plain_sum.isfinite(), result, plain_sum))


def truth_and_bound(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    *,
    exact: bool = False,
    split: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The multiplication in float64, and how far fp8_gemm_nt with the same options may be from it: both [M, N] float64.

    The bound is derived in docs/numerics.md. It holds for finite operands and results.
    """
    b_scales = _per_column(b_scales, b)
    truth = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    bound = torch.zeros_like(truth)
    unit = 2.0**-24 * (1 + 2.0**-5)  # FP32's unit roundoff; 1/32 pays for second-order terms and float64's rounding
    ends = _part_ends(a.shape[1], split)
    for rows, columns in _tiles(truth, _TILE):
        value, error = torch.zeros_like(truth[rows, columns]), torch.zeros_like(truth[rows, columns])  # of a part of K
        pairs = _k_blocks(a[rows], a_scales[rows], b[columns], b_scales[columns])
        for block, (x, y, scale_x, scale_y) in enumerate(pairs):
            partial, slack = (_tensor_core_slack if exact else _fp32_slack)(x, y)
            scale = scale_x.double() * scale_y.double()
            reach = partial.abs() + slack
            value += scale * partial
            error += scale.abs() * (slack + 2 * unit * reach) + 2.0**-150 * (reach + 2)
            error += unit * (value.abs() + error)
            if block in ends:
                truth[rows, columns] += value
                bound[rows, columns] += error
                if block != ends[0]:
                    bound[rows, columns] += unit * (truth[rows, columns].abs() + bound[rows, columns])
                value.zero_()
                error.zero_()
    return truth, bound


def _part_ends(k: int, split: int) -> list[int]:
    """The last K block of every part. Raises: InvalidInputError for what is no number of parts."""
    if not (is_whole(split) and split >= 1):
        raise InvalidInputError(
            f"split is {split!r}, expected a whole number from 1 on: that of the plan, gemm.plan_of"
        )
    blocks = ceil_div(k, BLOCK)
    return [blocks * part // split - 1 for part in range(1, split + 1)]


def bf16_bound(truth: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """How far to_bf16(x) may be from truth where x may be `bound` away from it."""
    return bound + 2.0**-8 * (truth.abs() + bound) + 2.0**-134


def _is_e4m3(x: torch.Tensor) -> bool:
    return bool(((x.to(torch.float8_e4m3fn).float() == x) | x.isnan()).all())


def _per_column(b_scales: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return b_scales.repeat_interleave(BLOCK, 0)[: b.shape[0]]


def _tiles(result: torch.Tensor, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    (m, n), (tile_m, tile_n) = result.shape, tile
    for j in range(0, n, tile_n):
        for i in range(0, m, tile_m):
            yield slice(i, i + tile_m), slice(j, j + tile_n)


def _k_blocks(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per 128 columns of K (the last may be fewer): a [m, 128] and b [n, 128] in FP32, their scales [m, 1] and [n]."""
    for block, k in enumerate(range(0, a.shape[1], BLOCK)):
        part = slice(k, k + BLOCK)
        yield a[:, part].float(), b[:, part].float(), a_scales[:, block, None], b_scales[:, block]


def _tensor_core_block(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Four chained steps: a [m, up to 128], b [n, as a] FP32 -> [m, n]. Zeros take no part: a tail needs no filling."""
    a, b = a.T.contiguous()[:, :, None], b.T.contiguous()[:, None, :]
    a_power, b_power = _e4m3_power(a), _e4m3_power(b)
    c = a.new_zeros(a.shape[1], b.shape[2])
    for k in range(0, len(a), STEP):
        part = slice(k, k + STEP)
        c = _k32_step(a[part], b[part], a_power[part], b_power[part], c)
    return c


def _k32_step(
    a: torch.Tensor, b: torch.Tensor, a_power: torch.Tensor, b_power: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Dimension 0 is K; a and b broadcast against each other to [up to 32, *c.shape]. All operations are exact in FP32.

    The largest exponent decides `last_bit`, the weight of the last bit that every term keeps. In units of it terms are
    integers below 2**15, and their sum one below 2**21. A nonzero product has an exponent of at least -12. Where there
    is none, c passes unchanged: if it came from earlier steps, it is a multiple of 2**-18, as all products are.
    """
    top = torch.maximum((a_power * b_power).amax(0), _power(c)).clamp_min_(2.0**-12)
    last_bit = top * 2.0**-_FRACTION_BITS
    total = (a * b).div_(last_bit, rounding_mode="trunc").sum(0)
    total += torch.div(c, last_bit, rounding_mode="trunc")
    return _keep_fraction_bits(total.mul_(last_bit))


def _power(x: torch.Tensor) -> torch.Tensor:
    """2**exponent of normal FP32 numbers; 0 for 0 and subnormals, inf for inf and NaN."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _e4m3_power(x: torch.Tensor) -> torch.Tensor:
    """2**exponent of E4M3 values held in FP32; 0 for 0."""
    return _power(x).clamp_min_(_E4M3_SMALLEST_NORMAL).mul_(x != 0)


def _keep_fraction_bits(x: torch.Tensor) -> torch.Tensor:
    """FP32 truncated toward zero at 13 of its 23 fraction bits; -0 becomes +0."""
    return (x.view(torch.int32) & -(1 << (23 - _FRACTION_BITS))).view(torch.float32).add_(0.0)


def _fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x * y + z of FP32 tensors, rounded once. Which NaN comes out is not defined.

    The product is exact in float64. The sum is rounded to odd (the last bit tells of what was cut off), so that the
    second rounding, to FP32, sees which side of a tie it is on. Source: Boldo and Melquiond, Emulation of a FMA and
    correctly rounded sums, IEEE Transactions on Computers 57(4), 2008.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)  # Knuth's TwoSum, exact; NaN if total is not finite
    bits = total.view(torch.int64)
    even_and_inexact = (error.abs() > 0) & (bits & 1 == 0)
    outward = (error > 0) == (total > 0)
    bits += torch.where(outward, 1, -1) * even_and_inexact
    return total.float()


def _with_one_nan(x: torch.Tensor) -> torch.Tensor:
    x.view(torch.int32).masked_fill_(x.isnan(), _NAN)
    return x


def _fp32_slack(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a @ b.T over up to 128 of K in float64 (exact), and a bound on the error of an FP32 sum in any order."""
    x, y = a.double(), b.double()
    return x @ y.T, BLOCK * 2.0**-24 * (x.abs() @ y.abs().T)


def _tensor_core_slack(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a @ b.T over up to 128 of K in float64 (exact), and a bound on the error of the tensor core's chained steps."""
    partial = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    slack = torch.zeros_like(partial)
    for k in range(0, a.shape[1], STEP):
        x, y = a[:, k : k + STEP], b[:, k : k + STEP]
        top_of_products = _e4m3_power(x).amax(1, keepdim=True) * _e4m3_power(y).amax(1)
        top = torch.maximum(top_of_products.double(), partial.abs() + slack)
        slack += STEP * 2.0**-_FRACTION_BITS * top
        partial += x.double() @ y.double().T
        slack += 2.0**-_FRACTION_BITS * (partial.abs() + slack)
    return partial, slack
