"""Casts to E4M3 with fine-grained FP32 scales, and back: x is about value * scale.

    cast         one scale per           x           scales                              used for
    per_token    1 row x 128 columns     [.., M, K]  [.., M, ceil(K / 128)]              activations
    per_block    128 rows x 128 columns  [.., N, K]  [.., ceil(N / 128), ceil(K / 128)]  weights
    per_channel  128 rows x 1 column     [.., M, K]  [.., ceil(M / 128), K]              weight gradients

scale = amax / 448 with amax at least 1e-4 (448 is the largest E4M3 value); UE8M0 rounds the scale up to a power of two.
Only operations that are the same on every device are used, so a CPU, PyTorch on a GPU, and the kernels that cast on a
Hopper GPU (BF16, FP16 and FP32, with K a multiple of 16 and groups of 128) give the same bits. See docs/numerics.md.

Values are contiguous. Scales of rows (per_token, swiglu) are M-major, as `layout.get_mn_major_tma_aligned_tensor` makes
them: stride(-2) is 1, stride(-1) is M rounded up to 4, batches lie one behind the other. Others are contiguous. The
functions outputs_of_... check operands as the casts do and make their outputs, empty, also of meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch.compiler import is_dynamo_compiling

from .errors import InvalidInputError
from .layout import ceil_div, is_whole
from .reference import _fma  # pyright: ignore[reportPrivateUsage]
from .runtime import quantization
from .runtime.guard import watched
from .runtime.quantization import E4M3_MAX, EXP2, LIMIT, LOG2_E, SHIFT, SMALLEST_AMAX

_GROUP = 128
_NAN_CODE, _NAN = 0x7F, 0x7FFFFFFF  # of E4M3, of FP32
_PIECE = 2**16  # elements that the CPU gates at once, in its cache

Pair = tuple[torch.Tensor, torch.Tensor]
P = ParamSpec("P")

_PLAIN = (bool, int, str)  # types of options, and of their names


def _operator(function: Callable[P, Pair]) -> Callable[P, Pair]:
    """Makes a call its operator (operators.py) where PyTorch traces or watches. Gradients stop here.

    A call like one before goes straight to its kernel, if it has no tensors but x and masked_m.
    """
    name = function.__name__

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> Pair:
        x: Any = args[0] if args else keywords.get("x")
        if not is_dynamo_compiling():
            key, counts = _key(name, args, keywords)
            made = None if key is None else quantization.again(key, x, counts)
            if made is not None:
                return made
            if not watched(x):
                quantization.nothing_cast()
                with torch.no_grad():
                    values, scales = function(*args, **keywords)
                if key is not None:
                    quantization.remember(key, x, counts, values, scales)
                return values, scales
        with torch.no_grad():
            return getattr(torch.ops.deep_gemm, name)(*args, **keywords)

    return call


def _key(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, torch.Tensor | None]:
    """What tells a cast from others (None: it cannot be told, or is for the check), and masked_m."""
    x: Any = args[0] if args else keywords.get("x")
    by_counts = name == "swiglu_cast_to_fp8"
    counts: Any = keywords.get("masked_m") if by_counts else None
    if not isinstance(x, torch.Tensor) or not (counts is None or isinstance(counts, torch.Tensor)):
        return None, None
    options: list[Any] = list(args[1:])
    for option, value in keywords.items():
        if not ((option == "x" and not args) or (option == "masked_m" and by_counts)):
            options += option, value
    if not all(type(option) in _PLAIN for option in options):
        return None, None
    return (name, x.shape, x.dtype, counts is None, *((option, type(option)) for option in options)), counts


@_operator
def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> Pair:
    """Activations: one scale for gran_k elements of a row.

    Args:
        x: [.., M, K], any float dtype, any strides. A transposed view (x.mT) is read along its memory.
        use_ue8m0: scales are powers of two.
        gran_k: elements that share a scale; 128 is what the multiplications take.
        use_packed_ue8m0: taken for compatibility; not offered.

    Returns: values [.., M, K] E4M3, contiguous; scales [.., M, ceil(K / gran_k)] FP32, M-major.
    Raises: InvalidInputError; NotImplementedError for packed scales.
    """
    if use_packed_ue8m0:
        raise NotImplementedError(
            "packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales"
        )
    values, scales = outputs_of_per_token(x, gran_k)
    if gran_k == _GROUP and _is_offered(x):
        rows = _batches(x)
        if rows.stride(-1) != 1 and rows.shape[-2] % 16 == 0 and quantization.fits(rows.mT):
            quantization.cast("transposed", rows.mT, values, scales, use_ue8m0)
        else:
            quantization.cast("token", _readable(rows), values, scales, use_ue8m0)
        return values, scales
    return _copied(_cast(x, 1, gran_k, use_ue8m0), values, scales)


@_operator
def per_block_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> Pair:
    """Weights: one scale for gran_k x gran_k elements.

    Args:
        x: [.., N, K], any float dtype, any strides.
        use_ue8m0: scales are powers of two.
        gran_k: rows and columns that share a scale; 128 is what the multiplications take.

    Returns: values [.., N, K] E4M3 and scales [.., ceil(N / gran_k), ceil(K / gran_k)] FP32, contiguous.
    Raises: InvalidInputError.
    """
    values, scales = outputs_of_per_block(x, gran_k)
    if gran_k == _GROUP and _is_offered(x):
        quantization.cast("tile", _readable(_batches(x)), values, scales, use_ue8m0, of_blocks=True)
        return values, scales
    return _cast(x, gran_k, gran_k, use_ue8m0)


@_operator
def per_channel_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128) -> Pair:
    """Operands of weight gradients before they are transposed: one scale for gran_k elements of a column.

    Args:
        x: [.., M, K], any float dtype, any strides.
        use_ue8m0: scales are powers of two.
        gran_k: elements that share a scale; 128 is what the multiplications take.

    Returns: values [.., M, K] E4M3 and scales [.., ceil(M / gran_k), K] FP32, contiguous.
    Raises: InvalidInputError.
    """
    values, scales = outputs_of_per_channel(x, gran_k)
    if gran_k == _GROUP and _is_offered(x):
        quantization.cast("tile", _readable(_batches(x)), values, scales, use_ue8m0)
        return values, scales
    return _cast(x, gran_k, 1, use_ue8m0)


@_operator
def swiglu_cast_to_fp8(x: torch.Tensor, use_ue8m0: bool = False, masked_m: torch.Tensor | None = None) -> Pair:
    """silu(x[.., :I]) * x[.., I:] in FP32, cast as per_token_cast_to_fp8 does: the input of an expert's second layer.

    Args:
        x: [.., M, 2 * I], any float dtype: gates, and then what they let through.
        use_ue8m0: scales are powers of two.
        masked_m: int32 [G] on x's device, for x [G, M, 2 * I]: how many rows of each group are real. The others are
            not read, and their values and scales not set. None: all are real.

    Returns: values [.., M, I] E4M3, contiguous; scales [.., M, ceil(I / 128)] FP32, M-major.

    silu(g) = g / (1 + exp(-g)), within 2e-6 of it where g is above -87; from there down it is -1.4e-36. See
    docs/numerics.md. Raises: InvalidInputError.
    """
    values, scales = outputs_of_swiglu(x, masked_m)
    if x.shape[-1] % 32 == 0 and _is_offered(x):
        counts = None if masked_m is None else masked_m.contiguous()
        quantization.cast("gated", _readable(_batches(x)), values, scales, use_ue8m0, counts=counts)
        return values, scales
    return _copied(_cast(_gated(x), 1, _GROUP, use_ue8m0), values, scales)


@_operator
def transposed_cast_of_groups(
    x: torch.Tensor,
    starts: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    use_ue8m0: bool = False,
) -> Pair:
    """An operand of k_grouped_fp8_gemm_nt_contiguous out of rows of groups, one scale per 128 rows and 1 column.

    Args:
        x: [M, K], any float dtype, M a multiple of 128: the rows of every group, from a multiple of 128 on.
        starts, sizes: int32 [M / 128] on x's device, for every 128 rows: the first row of their group, and how many
            rows it has, both multiples of 128. Rows with a size of 0, or outside their group, are in none: they are
            left out, and their part of the outputs is not set. None: one group of all rows.
        use_ue8m0: scales are powers of two.

    Returns: values [M * K] E4M3: for every group its [K, rows], contiguous, from element start * K on; scales
    [K, M / 128] FP32, M-major (stride(0) is 1). Nothing waits for the device. Raises: InvalidInputError.
    """
    values, scales = outputs_of_groups(x, starts, sizes)
    m, k = x.shape
    if starts is not None and sizes is not None:
        starts, sizes = starts.contiguous(), sizes.contiguous()
    if k % 16 == 0 and _is_offered(x.mT):
        rows = _readable(_batches(x))
        quantization.cast("transposed", rows, values, scales, use_ue8m0, starts=starts, sizes=sizes)
        return values, scales
    by_column, of_columns = _cast(x.mT, 1, _GROUP, use_ue8m0)
    scales.copy_(of_columns)
    if starts is None or sizes is None:
        return by_column.view(-1), scales
    row = torch.arange(m, device=x.device)
    first = row - row % _GROUP
    start, size = (y.long().repeat_interleave(_GROUP) for y in (starts, sizes))
    inside = (start >= 0) & (start <= first) & (start + size >= first + _GROUP) & (start + size <= m)
    at = start * k + row - start + torch.arange(k, device=x.device)[:, None] * size
    at = at.where(inside, m * k)  # one place behind the others
    flat = values.new_empty(m * k + 1).view(torch.uint8)
    flat.scatter_(0, at.view(-1), by_column.view(torch.uint8).view(-1))
    return flat[:-1].view(values.dtype), scales


def outputs_of_per_token(x: torch.Tensor, gran_k: int = 128) -> Pair:
    """What per_token_cast_to_fp8 returns, not set. Raises: InvalidInputError."""
    _check(x, gran_k)
    *batch, m, k = x.shape
    return _empty(x, (*batch, m, k)), _empty_m_major(x, (*batch, m, _over(k, gran_k)))


def outputs_of_per_block(x: torch.Tensor, gran_k: int = 128) -> Pair:
    """What per_block_cast_to_fp8 returns, not set. Raises: InvalidInputError."""
    _check(x, gran_k)
    *batch, n, k = x.shape
    scales = x.new_empty((*batch, _over(n, gran_k), _over(k, gran_k)), dtype=torch.float32)
    return _empty(x, (*batch, n, k)), scales


def outputs_of_per_channel(x: torch.Tensor, gran_k: int = 128) -> Pair:
    """What per_channel_cast_to_fp8 returns, not set. Raises: InvalidInputError."""
    _check(x, gran_k)
    *batch, m, k = x.shape
    return _empty(x, (*batch, m, k)), x.new_empty((*batch, _over(m, gran_k), k), dtype=torch.float32)


def outputs_of_swiglu(x: torch.Tensor, masked_m: torch.Tensor | None = None) -> Pair:
    """What swiglu_cast_to_fp8 returns, not set. Raises: InvalidInputError."""
    _check(x, _GROUP)
    *batch, m, width = x.shape
    if width % 2:
        raise InvalidInputError(
            f"got x of shape {tuple(x.shape)}, expected [.., M, 2 * I]: put gates and factors side by side"
        )
    if masked_m is not None:
        if x.dim() != 3:
            raise InvalidInputError(
                f"got masked_m for x of shape {tuple(x.shape)}, expected [G, M, 2 * I]: add a group with x[None]"
            )
        _check_numbers("masked_m", masked_m, (x.shape[0],), x, "pass the rows of each group")
    return _empty(x, (*batch, m, width // 2)), _empty_m_major(x, (*batch, m, _over(width // 2, _GROUP)))


def outputs_of_groups(x: torch.Tensor, starts: torch.Tensor | None = None, sizes: torch.Tensor | None = None) -> Pair:
    """What transposed_cast_of_groups returns, not set. Raises: InvalidInputError."""
    _check(x, _GROUP)
    if x.dim() != 2 or x.shape[0] % _GROUP:
        raise InvalidInputError(
            f"got x of shape {tuple(x.shape)}, expected [M, K] with M a multiple of {_GROUP}: "
            "pad the rows of every group with zeros"
        )
    m, k = x.shape
    if (starts is None) != (sizes is None):
        got, missing = ("sizes", "starts") if starts is None else ("starts", "sizes")
        raise InvalidInputError(f"got {got} without {missing}, expected both or neither: pass {missing}")
    for name, numbers in (("starts", starts), ("sizes", sizes)):
        if numbers is not None:
            _check_numbers(name, numbers, (m // _GROUP,), x, f"pass one number for every {_GROUP} rows")
    return _empty(x, (m * k,)), _empty_m_major(x, (k, m // _GROUP))


def per_token_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, [.., M, K]: the inverse of per_token_cast_to_fp8.

    Args:
        values: [.., M, K] E4M3.
        scales: [.., M, ceil(K / gran_k)] FP32.
        gran_k: as in the cast.

    Raises: InvalidInputError.
    """
    return _cast_back(values, scales, 1, gran_k)


def per_block_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, [.., N, K]: for what per_block_cast_to_fp8 gave, or a checkpoint's weight_scale_inv.

    Args:
        values: [.., N, K] E4M3.
        scales: [.., ceil(N / gran_k), ceil(K / gran_k)] FP32.
        gran_k: as in the cast.

    Raises: InvalidInputError.
    """
    return _cast_back(values, scales, gran_k, gran_k)


def per_channel_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, [.., M, K]: the inverse of per_channel_cast_to_fp8.

    Args:
        values: [.., M, K] E4M3.
        scales: [.., ceil(M / gran_k), K] FP32.
        gran_k: as in the cast.

    Raises: InvalidInputError.
    """
    return _cast_back(values, scales, gran_k, 1)


def ceil_to_ue8m0(x: torch.Tensor) -> torch.Tensor:
    """|x| [any shape] FP32, rounded up to a power of two, from 2**-126; above 2**127 it is inf. 0, inf and NaN stay.

    Raises: InvalidInputError for another dtype, and what is no tensor.
    """
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise InvalidInputError(f"got {got}, expected a tensor of torch.float32: call .float()")
    bits = x.abs().view(torch.int32)
    return torch.where(x.isnan(), x, ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32))


def pack_ue8m0_to_int(x: torch.Tensor) -> torch.Tensor:
    """Not offered. Raises: NotImplementedError."""
    raise NotImplementedError(
        "packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales"
    )


def _over(size: int, group: int) -> int:
    """size / group, rounded up. Sizes may be symbols of torch.compile's."""
    return -(-size // group)


def _empty(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.float8_e4m3fn)


def _empty_m_major(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    *batch, m, blocks = shape
    return x.new_empty((*batch, blocks, _over(m, 4) * 4), dtype=torch.float32).mT[..., :m, :]


def _copied(pair: Pair, values: torch.Tensor, scales: torch.Tensor) -> Pair:
    """The values of a pair, and its scales in the order of the outputs."""
    return pair[0], scales.copy_(pair[1])


def _is_offered(x: torch.Tensor) -> bool:
    """Whether a kernel casts x, maybe a copy of it."""
    return x.is_cuda and x.numel() > 0 and x.shape[-1] % 16 == 0 and quantization.is_offered(x)


def _batches(x: torch.Tensor) -> torch.Tensor:
    """x [.., M, K] as [G, M, K], copied if it must be."""
    x = x.resolve_neg()
    return x[None] if x.dim() == 2 else x.flatten(0, -3)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy that the kernels can read."""
    return x if quantization.fits(x) else x.clone(memory_format=torch.contiguous_format)


def _cast(x: torch.Tensor, rows: int, columns: int, use_ue8m0: bool) -> Pair:
    """One scale per rows x columns of the last two dimensions; groups at the edges are smaller. By PyTorch."""
    *batch, m, k = x.shape
    rows, columns = min(rows, max(m, 1)), min(columns, max(k, 1))  # a group is no larger than x
    blocks_m, blocks_k = ceil_div(m, rows), ceil_div(k, columns)
    padded = torch.nn.functional.pad(x.float(), (0, blocks_k * columns - k, 0, blocks_m * rows - m))
    groups = padded.reshape(*batch, blocks_m, rows, blocks_k, columns)
    amax = groups.abs().amax((-3, -1), keepdim=True).clamp_min(SMALLEST_AMAX)
    # A tensor as divisor: torch on CUDA multiplies by the reciprocal of a Python number, which differs in the last bit.
    scales = amax / torch.full_like(amax, E4M3_MAX)
    scales = ceil_to_ue8m0(scales) if use_ue8m0 else scales
    scales.view(torch.int32).masked_fill_(scales.isnan(), _NAN)  # which NaN comes out depends on the device
    scaled = (groups / scales).clamp(-E4M3_MAX, E4M3_MAX)
    values = scaled.to(torch.float8_e4m3fn)
    values.view(torch.uint8).masked_fill_(scaled.isnan(), _NAN_CODE)
    return values.view(padded.shape)[..., :m, :k].contiguous(), scales.view(*batch, blocks_m, blocks_k)


def _gated(x: torch.Tensor) -> torch.Tensor:
    """silu(x[.., :I]) * x[.., I:] in FP32. On a CPU a few rows at a time."""
    *batch, width = x.shape
    half = width // 2
    if not x.is_cpu or not x.numel():
        return _silu(x[..., :half].float()) * x[..., half:].float()
    rows = x.reshape(-1, width).split(max(1, _PIECE // width))
    return torch.cat([_silu(some[:, :half].float()) * some[:, half:].float() for some in rows]).view(*batch, half)


def _silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)) of FP32, as kernels/exact.cuh computes it."""

    def number(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    factor = x.clamp_min(-LIMIT)
    z = factor.clamp_max(LIMIT)
    n = _fma(z, number(-LOG2_E), number(SHIFT)) - SHIFT
    f = _fma(z, number(-LOG2_E), -n)
    p = number(EXP2[0])
    for term in EXP2[1:]:
        p = _fma(p, f, number(term))
    exponent = n.nan_to_num().int() << 23
    exponential = (p.view(torch.int32) + exponent).view(torch.float32)
    return factor * (torch.ones_like(x) / (exponential + 1)).where(~x.isnan(), x)


def _check(x: torch.Tensor, gran_k: int) -> None:
    _check_groups(gran_k)
    if not isinstance(x, torch.Tensor):
        raise InvalidInputError(f"got a {type(x).__name__}, expected a torch.Tensor: call torch.as_tensor()")
    if x.layout != torch.strided:
        raise InvalidInputError(f"got layout {x.layout}, expected torch.strided: call .to_dense()")
    if x.dim() < 2 or not x.is_floating_point():
        raise InvalidInputError(
            f"got {x.dtype} of shape {tuple(x.shape)}, expected floating point [.., M, K]: call .float() or .view()"
        )


def _check_numbers(name: str, numbers: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor, remedy: str) -> None:
    if not isinstance(numbers, torch.Tensor):
        raise InvalidInputError(
            f"{name} is a {type(numbers).__name__}, expected a torch.Tensor of torch.int32: {remedy}"
        )
    if numbers.dtype != torch.int32 or numbers.shape != shape or numbers.device != x.device:
        raise InvalidInputError(
            f"{name} is {numbers.dtype} of shape {tuple(numbers.shape)} on {numbers.device}, expected torch.int32 of "
            f"shape {shape} on {x.device}: {remedy}"
        )


def _check_groups(*sizes: int) -> None:
    for size in sizes:
        if not is_whole(size) or size < 1:
            raise InvalidInputError(f"gran_k is {size!r}, expected a positive whole number: 128 is what the GEMMs take")


def _cast_back(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    _check_groups(rows, columns)
    if not (isinstance(values, torch.Tensor) and isinstance(scales, torch.Tensor)) or values.dim() < 2:
        raise InvalidInputError("expected values [.., M, K] and scales, both torch.Tensor: pass what the cast returned")
    *batch, m, k = values.shape
    want = (*batch, ceil_div(m, rows), ceil_div(k, columns))
    if scales.shape != want:
        raise InvalidInputError(
            f"scales have shape {tuple(scales.shape)}, expected {want} for values of shape {tuple(values.shape)} and "
            f"one scale per {rows}x{columns}: use the inverse of the cast that made them"
        )
    by_row = scales.repeat_interleave(rows, -2)[..., :m, :]
    return values.float() * by_row.repeat_interleave(columns, -1)[..., :k]
