"""Alignment, the M-major order of scales, and what their kernel is told. No GPU."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deep_gemm import layout
from deep_gemm.errors import InvalidInputError, LaunchError
from deep_gemm.layout import (
    align,
    ceil_div,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
    transform_sf_into_required_layout,
)
from deep_gemm.runtime import device, driver, sass, transpose
from deep_gemm.runtime.compiler import obtain


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


@pytest.mark.parametrize(("x", "y"), [(-1, 4), (4, 0), (4, -2), (5.5, 2), ("a", 2), (True, 2)])
def test_sizes_that_make_no_sense(x: Any, y: Any) -> None:
    for function in (ceil_div, align):
        with pytest.raises(
            InvalidInputError, match=rf"got sizes {x!r} and {y!r}, expected whole numbers, x >= 0 and y > 0"
        ):
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


PACKED = "^packed UE8M0 scales are an operand of Blackwell's tensor cores; Hopper reads FP32 scales$"


def test_packed_scales_are_not_offered() -> None:
    x = torch.zeros(8, 8)
    with pytest.raises(NotImplementedError, match=PACKED):
        layout.get_mn_major_tma_aligned_packed_ue8m0_tensor(x)
    with pytest.raises(NotImplementedError, match=PACKED):
        layout.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(x, torch.zeros(2), [128, 128])


@pytest.mark.parametrize(
    ("recipe", "is_sfa"), [((1, 128), None), ([1, 128], False), ((1, 128, 128), True), ((1, 1, 128), None)]
)
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_scales_per_row_become_m_major(groups: int | None, recipe: tuple[int, ...], is_sfa: bool | None) -> None:
    x = torch.randn(*([groups] if groups else []), 7, 5)
    for disable in (False, True):
        got = transform_sf_into_required_layout(x, 7, 513, recipe, groups, is_sfa, disable)
        assert torch.equal(got, x) and got.stride()[-2:] == (1, 8)
        assert transform_sf_into_required_layout(got, 7, 513, recipe, groups, is_sfa, disable) is got


@pytest.mark.parametrize(("recipe", "is_sfa"), [((128, 128), None), ((1, 128, 128), False), ((128, 128, 128), None)])
@pytest.mark.parametrize("groups", [None, 3])
def test_scales_per_block_stay(groups: int | None, recipe: tuple[int, ...], is_sfa: bool | None) -> None:
    x = torch.randn(*([groups] if groups else []), 5, 3)
    for sf in (x, x.mT.contiguous().mT):
        assert transform_sf_into_required_layout(sf, 576, 384, recipe, num_groups=groups, is_sfa=is_sfa) is sf


def test_powers_of_two_stay_fp32() -> None:
    x = torch.ldexp(torch.ones(9, 6), torch.arange(-27, 27).view(9, 6))
    assert torch.equal(transform_sf_into_required_layout(x, 9, 768, (1, 128, 128), is_sfa=True), x)


@pytest.mark.parametrize(
    ("shape", "recipe", "options", "message"),
    [
        (
            (7, 4), (1, 128), {},
            "sf has shape (7, 4), expected (8, 4) for mn 8, k 512, num_groups None and granularity (1, 128): "
            "pass the size of the values that sf belongs to",
        ),
        (
            (2, 8, 4), (1, 128), {"num_groups": 3},
            "sf has shape (2, 8, 4), expected (3, 8, 4) for mn 8, k 512, num_groups 3 and granularity (1, 128): "
            "pass the size of the values that sf belongs to",
        ),
        (
            (8, 4), (1, 128, 128), {"is_sfa": False},
            "sf has shape (8, 4), expected (1, 4) for mn 8, k 512, num_groups None and granularity (128, 128): "
            "pass the size of the values that sf belongs to",
        ),
        (
            (8, 4), (1, 128, 128), {},
            "recipe is (1, 128, 128) and is_sfa None, expected a bool where m and n differ: "
            "pass is_sfa=True for the scales of a, False for those of b",
        ),
        (
            (8, 4), (1, 32), {},
            "recipe (1, 32) has granularity (1, 32), expected (1, 128) or (128, 128): "
            "take scales from per_token_cast_to_fp8 or per_block_cast_to_fp8",
        ),
        (
            (8, 4), (1, 64, 128), {"is_sfa": False},
            "recipe (1, 64, 128) has granularity (64, 128), expected (1, 128) or (128, 128): "
            "take scales from per_token_cast_to_fp8 or per_block_cast_to_fp8",
        ),
        (
            (8, 4), (128,), {},
            "recipe is (128,), expected (gran_mn, gran_k) or (gran_m, gran_n, gran_k): pass (1, 128) or (128, 128)",
        ),
        (
            (8, 4), 128, {},
            "recipe is 128, expected (gran_mn, gran_k) or (gran_m, gran_n, gran_k): pass (1, 128) or (128, 128)",
        ),
    ],
)  # fmt: skip
def test_rejected_transformations(shape: Any, recipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
        transform_sf_into_required_layout(torch.zeros(shape), 8, 512, recipe, **options)


def test_rejected_scales() -> None:
    with pytest.raises(
        InvalidInputError,
        match=r"^sf has dtype torch.int32, expected torch.float32: packed UE8M0 scales are for Blackwell, "
        r"pass FP32 scales$",
    ):
        transform_sf_into_required_layout(torch.zeros(8, 4, dtype=torch.int32), 8, 512, (1, 128))
    with pytest.raises(InvalidInputError, match=r"^got a list, expected scales, a torch.Tensor of torch.float32$"):
        transform_sf_into_required_layout([[1.0]], 1, 128, (1, 128))  # type: ignore[arg-type]


@pytest.fixture
def alignment_restored() -> Iterator[None]:
    yield
    layout.set_mk_alignment_for_contiguous_layout(128)


@pytest.mark.usefixtures("alignment_restored")
def test_alignment_of_contiguous_layouts() -> None:
    assert layout.get_mk_alignment_for_contiguous_layout() == 128
    for alignment in (64, 192, 65536, 128):
        layout.set_mk_alignment_for_contiguous_layout(alignment)
        assert layout.get_mk_alignment_for_contiguous_layout() == alignment
        assert layout.get_m_alignment_for_contiguous_layout() == alignment


@pytest.mark.parametrize("alignment", [0, -64, 32, 100, 65600, 64.0, True, None, "64"])
def test_alignments_that_fit_no_tile(alignment: Any) -> None:
    message = (
        f"alignment is {alignment!r}, expected a multiple of 64 from 64 to 65536: "
        "pass what get_theoretical_mk_alignment_for_contiguous_layout() gives"
    )
    with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
        layout.set_mk_alignment_for_contiguous_layout(alignment)
    assert layout.get_mk_alignment_for_contiguous_layout() == 128


@pytest.mark.usefixtures("alignment_restored")
def test_whole_numbers_of_numpy() -> None:
    whole: Any = np.int64
    layout.set_mk_alignment_for_contiguous_layout(whole(192))
    assert type(layout.get_mk_alignment_for_contiguous_layout()) is int
    x = torch.rand(2, 300, 3)
    got = layout.transform_sf_into_required_layout(x, whole(300), whole(384), (whole(1), whole(128)), whole(2))
    assert torch.equal(got, x)


def test_the_alignment_worth_having() -> None:
    theoretical = layout.get_theoretical_mk_alignment_for_contiguous_layout
    assert [theoretical(m) for m in (1, 64, 65, 4096)] == [64, 64, 128, 128]
    assert theoretical() == theoretical(None) == 128
    assert theoretical(expected_m=8) == 64
    with pytest.raises(TypeError):
        theoretical(8, 8)  # type: ignore[call-arg]
    assert list(inspect.signature(theoretical).parameters) == ["expected_m"]


def test_the_kernel_compiles_clean() -> None:
    cubin = obtain(transpose.source())
    info = sass.read(cubin.image, transpose.ENTRY)
    assert (cubin.warnings, cubin.local_bytes) == ([], 0)
    assert (info.local_bytes, info.local_loads, info.local_stores) == (0, 0, 0)
    assert info.registers <= 48  # 5 blocks an SM
    assert info.shared_bytes == 4 * (transpose.ELEMENTS + 32)


WALKS = {
    # name: shape, strides of the input; grid, tile_rows, along_rows; rows, columns, batches
    "row-major": ((4097, 57), (57, 1), (2 * 33, 1, 1), 32, 1, (57, 4097, 1)),
    "few rows": ((4097, 7), (7, 1), (9, 1, 1), 8, 1, (7, 4097, 1)),
    "m-major": ((4097, 57), (1, 4097), (4 * 17, 1, 1), 16, 0, (57, 4097, 1)),
    "one row": ((4097, 1), (57, 1), (2, 1, 1), 1, 1, (1, 4097, 1)),
    "one element": ((1, 1), (1, 1), (1, 1, 1), 1, 1, (1, 1, 1)),
    "groups": ((4, 128, 56), (128 * 56, 56, 1), (2, 4, 1), 32, 1, (56, 128, 4)),
    "groups innermost": ((4, 128, 56), (1, 56 * 4, 4), (1, 56, 1), 4, 1, (4, 128, 56)),
    "the same for all groups": ((4, 128, 56), (0, 56, 1), (2, 4, 1), 32, 1, (56, 128, 4)),
    "the same for all rows": ((128, 56), (0, 1), (2, 1, 1), 32, 1, (56, 128, 1)),
    "the same for all of k": ((128, 56), (1, 0), (4, 1, 1), 16, 0, (56, 128, 1)),
    "many groups": ((65536, 1, 9), (9, 9, 1), (1, 65535, 2), 16, 1, (9, 1, 65536)),
    "past 2^31": ((2**26, 64), (64, 1), (2**20, 1, 1), 32, 1, (64, 2**26, 1)),
}


@pytest.mark.parametrize("name", WALKS)
def test_walks(name: str) -> None:
    shape, strides, grid, tile_rows, along_rows, (rows, columns, batches) = WALKS[name]
    pitch = align(shape[-2], 4)
    walk = transpose.walk_of(shape, strides, (shape[-1] * pitch, 1, pitch)[-len(shape) :])
    args = transpose._Args.from_buffer_copy(walk.args)
    assert walk.grid == grid
    assert (args.tile_rows, args.along_rows) == (tile_rows, along_rows)
    assert (args.rows, args.columns, args.batches) == (rows, columns, batches)
    tiles = args.row_tiles * -(-columns // (transpose.ELEMENTS // tile_rows)) * batches
    assert math.prod(grid) >= tiles and args.row_tiles * tile_rows >= rows


def test_structures_have_the_sizes_of_the_kernel() -> None:
    assert ctypes.sizeof(transpose._Args) == 88
    assert transpose._Args.batches.offset == 72


class Notes:
    """Stands for cuda.bindings.driver: its functions write down what they are given."""

    def __init__(self) -> None:
        self.cuda = importlib.import_module("cuda.bindings.driver")
        self.launched: list[SimpleNamespace] = []
        self.error = 0

    def cuLaunchKernel(self, kernel, grid_x, grid_y, grid_z, x, y, z, smem, stream, parameters, extra) -> Any:
        args = transpose._Args.from_address(ctypes.c_void_p.from_address(parameters).value or 0)
        copy = transpose._Args.from_buffer_copy(args)
        grid, block = (grid_x, grid_y, grid_z), (x, y, z)
        self.launched.append(SimpleNamespace(kernel=kernel, grid=grid, block=block, stream=stream, args=copy))
        return (self.cuda.CUresult(self.error),)

    def cuCtxGetCurrent(self) -> Any:
        return 0, 1

    def cuGetErrorName(self, code: Any) -> Any:
        return 0, b"CUDA_ERROR_INVALID_VALUE"

    def cuGetErrorString(self, code: Any) -> Any:
        return 0, b"invalid argument"


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    for module in (transpose, driver):
        monkeypatch.setattr(module, "driver", lambda: notes)
    monkeypatch.setattr(transpose, "_kernel", lambda index: "kernel")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index that CPU tensors have
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return notes


def test_one_launch(notes: Notes) -> None:
    x, out = torch.zeros(3, 130, 57), torch.zeros(3, 57, 132).mT[:, :130]
    assert transpose.to_mn_major(x, out) is out
    (launched,) = notes.launched
    args = launched.args
    assert (launched.kernel, launched.stream) == ("kernel", 77)
    assert (launched.grid, launched.block) == ((4, 3, 1), (transpose.THREADS, 1, 1))
    assert (args.input, args.output) == (x.data_ptr(), out.data_ptr())
    assert (args.input_batch, args.input_row, args.input_column) == (130 * 57, 1, 57)
    assert (args.output_batch, args.output_row, args.row_tiles) == (57 * 132, 132, 2)


def test_no_launch_for_nothing(notes: Notes) -> None:
    transpose.to_mn_major(torch.zeros(0, 4), torch.zeros(4, 0).mT)
    assert notes.launched == []


def test_a_refusal_of_the_driver_is_an_error_by_name(notes: Notes) -> None:
    notes.error = 1
    message = "^launching the transposition of scales: CUDA_ERROR_INVALID_VALUE: invalid argument$"
    with pytest.raises(LaunchError, match=message):
        transpose.to_mn_major(torch.zeros(8, 4), torch.zeros(4, 8).mT)


def test_another_gpu_than_hopper_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(device, "current", lambda index: SimpleNamespace(capability=(10, 0)))
    x, out = torch.randn(7, 4), torch.zeros(4, 8).mT[:7]
    assert torch.equal(transpose.to_mn_major(x, out), x)
    transpose._kernel.cache_clear()


@pytest.mark.parametrize(("name", "value"), [("mn", torch.zeros(2)), ("k", -1), ("num_groups", "2")])
def test_sizes_of_scales_that_are_none(name: str, value: object) -> None:
    sizes = {"mn": 8, "k": 256, "num_groups": None, name: value}
    got = value if isinstance(value, int) else f"a {type(value).__name__}"
    with pytest.raises(InvalidInputError, match=f"^{name} is {got}, expected a size: pass that of the values"):
        layout.transform_sf_into_required_layout(torch.zeros(8, 2), recipe=(1, 128), **sizes)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"^recipe is "):
        recipe = (torch.zeros(2), torch.zeros(2))
        layout.transform_sf_into_required_layout(torch.zeros(8, 2), 8, 256, recipe)  # type: ignore[arg-type]
