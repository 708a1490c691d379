"""Layouts: sizes that round up, and the order in which the copy engine (TMA) wants the scales of `a`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch

from .errors import InvalidInputError
from .runtime.transpose import to_mn_major

_MIN_ALIGNMENT, _MAX_ALIGNMENT = 64, 2**16  # the smallest tile's rows
_PACKED = "packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales"
_TMA_BYTES = 16  # base addresses and strides of a tensor map are multiples of 16 bytes (CUDA driver API)


def is_whole(x: object) -> bool:
    """Whether x is a whole number. NumPy's are, too: clients compute hints with them."""
    return type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool))  # the former is fast


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up. Raises: InvalidInputError unless both are whole, x >= 0 and y > 0."""
    if not (is_whole(x) and is_whole(y)) or x < 0 or y <= 0:
        raise InvalidInputError(
            f"got sizes {x!r} and {y!r}, expected whole numbers, x >= 0 and y > 0: check the shape that they come from"
        )
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The smallest multiple of y that is at least x. Raises: InvalidInputError unless x >= 0 and y > 0."""
    return ceil_div(x, y) * y


def get_tma_aligned_size(mn: int, element_bytes: int) -> int:
    """mn elements of element_bytes each, rounded up so that rows of that many elements are multiples of 16 bytes.

    Raises: InvalidInputError for a negative mn, or elements that do not fill 16 bytes evenly.
    Source: the strides of cuTensorMapEncodeTiled, CUDA driver API.
    """
    if element_bytes not in (1, 2, 4, 8, 16):
        raise InvalidInputError(
            f"got elements of {element_bytes} bytes, expected 1, 2, 4, 8 or 16: pass x.element_size()"
        )
    return align(mn, _TMA_BYTES // element_bytes)


def get_mn_major_tma_aligned_tensor(x: torch.Tensor) -> torch.Tensor:
    """The same values in the order that the kernel reads scales in.

    Args:
        x: FP32 [mn, k] or [G, mn, k], any strides; k counts scales.

    Returns: FP32 of the same shape, stride(-2) == 1, stride(-1) == align(mn, 4), groups one behind the other, base on
    16 bytes: x itself where it is so already, else a new tensor (padding not set), written on the current stream of x's
    device.
    Raises: InvalidInputError for another dtype or number of dimensions.
    """
    _check_scales(x)
    mn, k = x.shape[-2:]
    padded = get_tma_aligned_size(mn, x.element_size())
    strides = (k * padded, 1, padded)[-x.dim() :]
    if x.stride() == strides and x.data_ptr() % _TMA_BYTES == 0:
        return x
    result = x.new_empty((*x.shape[:-2], k, padded)).mT[..., :mn, :]
    return to_mn_major(x, result) if x.is_cuda else result.copy_(x)


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor  # the first release's name


def transform_sf_into_required_layout(
    sf: torch.Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
) -> torch.Tensor:
    """Scales as the GEMMs of this GPU want them; on Hopper they stay FP32, powers of two (UE8M0) or not.

    Args:
        sf: FP32 [mn, ceil(k / 128)] or [ceil(mn / 128), ceil(k / 128)], with num_groups before them unless that is
            None; any strides.
        mn, k: rows and columns of the values that sf belongs to.
        recipe: elements that share a scale, (along mn, along k), or (along m, along n, along k) of a GEMM.
        num_groups: of grouped operands; None: of dense ones.
        is_sfa: with three elements of recipe, whether sf belongs to a (m) or b (n); None where m and n are alike.
        disable_ue8m0_cast: without effect, for nothing is cast on Hopper.

    Returns: with one scale per (1, 128) what `get_mn_major_tma_aligned_tensor` makes of it, per (128, 128) sf itself.
    Raises: InvalidInputError for another dtype, shape or recipe.
    """
    if getattr(sf, "dtype", None) == torch.int32:
        raise InvalidInputError(
            "sf has dtype torch.int32, expected torch.float32: packed UE8M0 scales are for Blackwell, pass FP32 scales"
        )
    _check_scales(sf)
    for name, size in (("mn", mn), ("k", k), ("num_groups", 0 if num_groups is None else num_groups)):
        if not is_whole(size) or size < 0:
            got = size if is_whole(size) else f"a {type(size).__name__}"
            raise InvalidInputError(f"{name} is {got}, expected a size: pass that of the values that sf belongs to")
    granularity = _granularity(recipe, is_sfa)
    leading = () if num_groups is None else (num_groups,)
    want = (*leading, ceil_div(mn, granularity[0]), ceil_div(k, granularity[1]))
    if sf.shape != want:
        raise InvalidInputError(
            f"sf has shape {tuple(sf.shape)}, expected {want} for mn {mn}, k {k}, num_groups {num_groups} and "
            f"granularity {granularity}: pass the size of the values that sf belongs to"
        )
    return get_mn_major_tma_aligned_tensor(sf) if granularity[0] == 1 else sf


def _granularity(recipe: Sequence[int], is_sfa: bool | None) -> tuple[int, int]:
    """What a recipe says of one operand: elements that share a scale along mn and along k."""
    got = tuple(recipe) if isinstance(recipe, Sequence) else recipe
    if not isinstance(got, tuple) or len(got) not in (2, 3) or not all(map(is_whole, got)):
        raise InvalidInputError(
            f"recipe is {got}, expected (gran_mn, gran_k) or (gran_m, gran_n, gran_k): pass (1, 128) or (128, 128)"
        )
    if len(got) == 3 and is_sfa is None and got[0] != got[1]:
        raise InvalidInputError(
            f"recipe is {got} and is_sfa None, expected a bool where m and n differ: "
            "pass is_sfa=True for the scales of a, False for those of b"
        )
    granularity = (got[1] if len(got) == 3 and is_sfa is False else got[0], got[-1])
    if granularity not in ((1, 128), (128, 128)):
        raise InvalidInputError(
            f"recipe {got} has granularity {granularity}, expected (1, 128) or (128, 128): "
            "take scales from per_token_cast_to_fp8 or per_block_cast_to_fp8"
        )
    return granularity


def get_mn_major_tma_aligned_packed_ue8m0_tensor(x: torch.Tensor) -> torch.Tensor:
    """Not offered. Raises: NotImplementedError."""
    raise NotImplementedError(_PACKED)


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: torch.Tensor, ks_tensor: torch.Tensor, ks: Sequence[int]
) -> torch.Tensor:
    """Not offered. Raises: NotImplementedError."""
    raise NotImplementedError(_PACKED)


_mk_alignment = 128


def set_mk_alignment_for_contiguous_layout(alignment: int) -> None:
    """Groups of contiguous layouts are padded to a multiple of `alignment` rows (columns of K in k-grouped GEMMs).

    Raises: InvalidInputError unless it is a multiple of 64 from 64 to 65536.
    """
    global _mk_alignment
    _mk_alignment = alignment_of_groups(alignment)


def alignment_of_groups(alignment: int) -> int:
    """What groups may be padded to, checked. Raises: InvalidInputError."""
    if not (is_whole(alignment) and alignment % _MIN_ALIGNMENT == 0 and 0 < alignment <= _MAX_ALIGNMENT):
        raise InvalidInputError(
            f"alignment is {alignment!r}, expected a multiple of {_MIN_ALIGNMENT} from {_MIN_ALIGNMENT} to "
            f"{_MAX_ALIGNMENT}: pass what get_theoretical_mk_alignment_for_contiguous_layout() gives"
        )
    return int(alignment)


def get_mk_alignment_for_contiguous_layout() -> int:
    """What the rows of each group of a contiguous layout are padded to a multiple of: as set, else 128."""
    return _mk_alignment


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout  # the first release's name


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The smallest alignment worth having where about expected_m rows of a group are meant: 64 up to 64, else 128."""
    return 64 if expected_m is not None and expected_m <= 64 else 128


def _check_scales(x: torch.Tensor) -> None:
    """Raises InvalidInputError unless x is [mn, k] or [G, mn, k] FP32, strided."""
    if not isinstance(x, torch.Tensor):
        raise InvalidInputError(f"got a {type(x).__name__}, expected scales, a torch.Tensor of torch.float32")
    if x.dtype != torch.float32 or x.dim() not in (2, 3):
        raise InvalidInputError(
            f"got scales of {x.dtype} with shape {tuple(x.shape)}, expected torch.float32 and [mn, k] or [G, mn, k]: "
            "take them from per_token_cast_to_fp8(x)"
        )
    if x.layout != torch.strided:
        raise InvalidInputError(f"got scales of layout {x.layout}, expected torch.strided: call .to_dense()")
    if x.is_neg():
        raise InvalidInputError("got a view that negates its memory, expected the scales: call .resolve_neg()")
