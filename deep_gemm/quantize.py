"""Casts to E4M3 with fine-grained FP32 scales, and back: x is about value * scale.

    cast         one scale per           x           scales                              used for
    per_token    1 row x 128 columns     [.., M, K]  [.., M, ceil(K / 128)]              activations
    per_block    128 rows x 128 columns  [.., N, K]  [.., ceil(N / 128), ceil(K / 128)]  weights
    per_channel  128 rows x 1 column     [.., M, K]  [.., ceil(M / 128), K]              weight gradients

scale = amax / 448 with amax at least 1e-4 (448 is the largest E4M3 value); UE8M0 rounds the scale up to a power of two.
Only correctly rounded operations are used, so a CPU and a GPU give the same bits. See docs/numerics.md.
"""

from __future__ import annotations

import torch

from .errors import InvalidInputError
from .layout import ceil_div, is_whole

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # DeepSeek's: a group of zeros gets a scale to divide by
_NAN_CODE = 0x7F


def per_token_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [.., M, K], any float dtype -> values [.., M, K] E4M3, scales [.., M, ceil(K / gran_k)] FP32.

    Raises: InvalidInputError; NotImplementedError for packed scales.
    """
    if use_packed_ue8m0:
        raise NotImplementedError(
            "packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales"
        )
    return _cast(x, 1, gran_k, use_ue8m0)


def per_block_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [.., N, K], any float dtype -> values [.., N, K] E4M3, scales [.., ceil(N / gran_k), ceil(K / gran_k)] FP32.

    Raises: InvalidInputError.
    """
    return _cast(x, gran_k, gran_k, use_ue8m0)


def per_channel_cast_to_fp8(
    x: torch.Tensor, use_ue8m0: bool = False, gran_k: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [.., M, K], any float dtype -> values [.., M, K] E4M3, scales [.., ceil(M / gran_k), K] FP32.

    Raises: InvalidInputError.
    """
    return _cast(x, gran_k, 1, use_ue8m0)


def per_token_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, for what per_token_cast_to_fp8 gave. Raises: InvalidInputError."""
    return _cast_back(values, scales, 1, gran_k)


def per_block_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, for what per_block_cast_to_fp8 gave, or a checkpoint with weight_scale_inv.

    Raises: InvalidInputError.
    """
    return _cast_back(values, scales, gran_k, gran_k)


def per_channel_cast_back(values: torch.Tensor, scales: torch.Tensor, gran_k: int = 128) -> torch.Tensor:
    """values * scales in FP32, for what per_channel_cast_to_fp8 gave. Raises: InvalidInputError."""
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


@torch.no_grad()
def _cast(x: torch.Tensor, rows: int, columns: int, use_ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per rows x columns of the last two dimensions; groups at the edges are smaller."""
    _check_groups(rows, columns)
    if not isinstance(x, torch.Tensor):
        raise InvalidInputError(f"got a {type(x).__name__}, expected a torch.Tensor: call torch.as_tensor()")
    if x.layout != torch.strided:
        raise InvalidInputError(f"got layout {x.layout}, expected torch.strided: call .to_dense()")
    if x.dim() < 2 or not x.is_floating_point():
        raise InvalidInputError(
            f"got {x.dtype} of shape {tuple(x.shape)}, expected floating point [.., M, K]: call .float() or .view()"
        )
    *batch, m, k = x.shape
    rows, columns = min(rows, max(m, 1)), min(columns, max(k, 1))  # a group is no larger than x
    blocks_m, blocks_k = ceil_div(m, rows), ceil_div(k, columns)
    padded = torch.nn.functional.pad(x.float(), (0, blocks_k * columns - k, 0, blocks_m * rows - m))
    groups = padded.reshape(*batch, blocks_m, rows, blocks_k, columns)
    amax = groups.abs().amax((-3, -1), keepdim=True).clamp_min(SMALLEST_AMAX)
    # A tensor as divisor: torch on CUDA multiplies by the reciprocal of a Python number, which differs in the last bit.
    scales = amax / torch.full_like(amax, E4M3_MAX)
    scales = ceil_to_ue8m0(scales) if use_ue8m0 else scales
    scaled = (groups / scales).clamp(-E4M3_MAX, E4M3_MAX)
    values = scaled.to(torch.float8_e4m3fn)
    values.view(torch.uint8).masked_fill_(scaled.isnan(), _NAN_CODE)  # the sign of a NaN depends on the device
    return values.view(padded.shape)[..., :m, :k].contiguous(), scales.view(*batch, blocks_m, blocks_k)


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
