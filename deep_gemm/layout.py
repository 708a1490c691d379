"""Layouts: sizes that round up, and the order in which the copy engine (TMA) wants the scales of `a`."""

from __future__ import annotations

import torch

from .errors import InvalidInputError

_TMA_BYTES = 16  # base addresses and strides of a tensor map are multiples of 16 bytes (CUDA driver API)


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up. Raises: InvalidInputError unless x >= 0 and y > 0."""
    if x < 0 or y <= 0:
        raise InvalidInputError(
            f"got sizes {x} and {y}, expected x >= 0 and y > 0: check the shape that they come from"
        )
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The smallest multiple of y that is at least x. Raises: InvalidInputError unless x >= 0 and y > 0."""
    return ceil_div(x, y) * y


def get_tma_aligned_size(mn: int, element_bytes: int) -> int:
    """mn elements, rounded up so that rows of that many elements are multiples of 16 bytes.

    Raises: InvalidInputError for a negative mn, or elements that do not fill 16 bytes evenly.
    """
    if element_bytes not in (1, 2, 4, 8, 16):
        raise InvalidInputError(
            f"got elements of {element_bytes} bytes, expected 1, 2, 4, 8 or 16: pass x.element_size()"
        )
    return align(mn, _TMA_BYTES // element_bytes)


def get_mn_major_tma_aligned_tensor(x: torch.Tensor) -> torch.Tensor:
    """The same values in the order that the kernel reads scales in.

    x: [mn, k] or [G, mn, k] FP32, any strides. Result: the same shape, stride(-2) == 1, stride(-1) == align(mn, 4),
    groups one behind the other, base on 16 bytes: x itself where it is so already, else a new tensor (padding not set).
    Raises: InvalidInputError for another dtype or number of dimensions.
    """
    if not isinstance(x, torch.Tensor):
        raise InvalidInputError(f"got a {type(x).__name__}, expected scales, a torch.Tensor of torch.float32")
    if x.dtype != torch.float32 or x.dim() not in (2, 3):
        raise InvalidInputError(
            f"got scales of {x.dtype} with shape {tuple(x.shape)}, expected torch.float32 and [mn, k] or [G, mn, k]: "
            "take them from per_token_cast_to_fp8(x)"
        )
    if x.layout != torch.strided:
        raise InvalidInputError(f"got scales of layout {x.layout}, expected torch.strided: call .to_dense()")
    mn, k = x.shape[-2:]
    padded = get_tma_aligned_size(mn, x.element_size())
    strides = (k * padded, 1, padded)[-x.dim() :]
    if x.stride() == strides and x.data_ptr() % _TMA_BYTES == 0:
        return x
    result = x.new_empty((*x.shape[:-2], k, padded)).mT[..., :mn, :]
    return result.copy_(x)


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor  # the first release's name


def get_mn_major_tma_aligned_packed_ue8m0_tensor(x: torch.Tensor) -> torch.Tensor:
    """Not offered. Raises: NotImplementedError."""
    raise NotImplementedError(
        "packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales"
    )
