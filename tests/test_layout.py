"""Alignment, and the M-major order of scales."""

from __future__ import annotations

import math

import pytest
import torch

from deep_gemm import layout
from deep_gemm.errors import InvalidInputError
from deep_gemm.layout import align, ceil_div, get_mn_major_tma_aligned_tensor, get_tma_aligned_size


def test_sizes() -> None:
    for x in range(40):
        for y in range(1, 20):
            assert ceil_div(x, y) == math.ceil(x / y)
            assert align(x, y) % y == 0 and x <= align(x, y) < x + y
    assert ceil_div(2**60 + 1, 2) == 2**59 + 1  # no rounding through floats
    for mn, size, want in (
        (7, 4, 8),
        (8, 4, 8),
        (4097, 4, 4100),
        (7, 1, 16),
        (7, 2, 8),
        (1, 8, 2),
        (3, 16, 3),
        (0, 4, 0),
    ):
        assert get_tma_aligned_size(mn, size) == want


@pytest.mark.parametrize(("x", "y"), [(-1, 4), (4, 0), (4, -2)])
def test_sizes_that_make_no_sense(x: int, y: int) -> None:
    for function in (ceil_div, align):
        with pytest.raises(InvalidInputError, match=rf"got sizes {x} and {y}, expected x >= 0 and y > 0"):
            function(x, y)


def test_elements_that_do_not_fill_16_bytes() -> None:
    for size in (0, 3, 32):
        with pytest.raises(InvalidInputError, match=f"elements of {size} bytes, expected 1, 2, 4, 8 or 16"):
            get_tma_aligned_size(8, size)


def strided(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The same random values in several layouts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wide = torch.full((*shape[:-2], 2 * shape[-2], shape[-1] + 3), math.nan)
    wide[..., ::2, 3:] = x
    permuted = x.movedim(0, -1).contiguous().movedim(-1, 0)  # vLLM's batches: the group has stride 1, or k has
    return {"contiguous": x, "transposed": x.mT.contiguous().mT, "wide": wide[..., ::2, 3:], "permuted": permuted}


@pytest.mark.parametrize("k", [1, 7, 56, 57])
@pytest.mark.parametrize("mn", [1, 4, 7, 128, 4097])
@pytest.mark.parametrize("groups", [(), (1,), (2,), (4,)], ids=str)
def test_mn_major(groups: tuple[int, ...], mn: int, k: int) -> None:
    for name, x in strided((*groups, mn, k)).items():
        got = get_mn_major_tma_aligned_tensor(x)
        padded = align(mn, 4)
        assert torch.equal(got, x), name
        assert got.stride() == (*[k * padded for _ in groups], 1, padded), name
        assert got.data_ptr() % 16 == 0
        assert got.untyped_storage().nbytes() - 4 * got.storage_offset() >= 4 * math.prod(groups) * k * padded
        assert get_mn_major_tma_aligned_tensor(got) is got


def test_vllm_s_batches_need_no_copy_where_they_fit() -> None:
    tokens, groups, blocks = 8, 3, 5
    x = torch.zeros(groups * blocks * tokens).as_strided((groups, tokens, blocks), (tokens * blocks, 1, tokens))
    assert get_mn_major_tma_aligned_tensor(x) is x


def test_a_base_off_16_bytes_is_copied() -> None:
    x = torch.arange(33.0)[1:].view(4, 8).T
    assert x.stride() == (1, 8) and x.data_ptr() % 16 == 4
    got = get_mn_major_tma_aligned_tensor(x)
    assert got is not x and got.data_ptr() % 16 == 0 and torch.equal(got, x)


def test_empty() -> None:
    for shape in ((0, 4), (4, 0), (2, 0, 4), (0, 4, 4)):
        assert get_mn_major_tma_aligned_tensor(torch.zeros(shape)).shape == shape


def test_rejections() -> None:
    for x in (
        torch.zeros(8),
        torch.zeros(2, 2, 2, 2),
        torch.zeros(8, 8, dtype=torch.int32),
        torch.zeros(8, 8).double(),
    ):
        with pytest.raises(
            InvalidInputError, match=r"got scales of .* expected torch.float32 and \[mn, k\] or \[G, mn, k\]"
        ):
            get_mn_major_tma_aligned_tensor(x)
    with pytest.raises(InvalidInputError, match=r"got scales of layout torch\.sparse_coo, expected torch\.strided"):
        get_mn_major_tma_aligned_tensor(torch.zeros(8, 8).to_sparse())


def test_the_first_name() -> None:
    assert layout.get_col_major_tma_aligned_tensor is get_mn_major_tma_aligned_tensor
