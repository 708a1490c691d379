"""Copies scales to where they are adjacent along M: one launch of kernels/layout.cu, whatever the strides."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import device
from .compiler import Source, cubin_for
from .driver import bind_context, check, driver, load

ENTRY = "to_mn_major"
THREADS = 256
ELEMENTS = 4096  # of a tile, whatever its shape
MAX_ROWS = 32  # of a tile that is read along rows, one for each thread of a warp
WIDE_ROWS = 16  # of a tile that is read along columns
MAX_GRID_Y = 65535


class _Args(ctypes.Structure):
    """`struct Args` of kernels/layout.cu."""

    _fields_ = [
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("input_batch", ctypes.c_int64),
        ("input_row", ctypes.c_int64),
        ("input_column", ctypes.c_int64),
        ("output_batch", ctypes.c_int64),
        ("output_row", ctypes.c_int64),
        ("batches", ctypes.c_uint32),
        ("row_tiles", ctypes.c_uint32),
        ("tile_rows", ctypes.c_uint32),
        ("along_rows", ctypes.c_uint32),
    ]


def to_mn_major(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copies x to out on the current stream of their device, and returns out.

    x: [mn, k] or [G, mn, k] FP32, CUDA, any strides. out: the same shape and device, stride(-2) == 1.
    Raises: CompileError, LaunchError.
    """
    index = x.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return to_mn_major(x, out)
    kernel = prepare(index) if x.numel() else None
    if kernel is None:
        return out.copy_(x)
    walk = walk_of(x.shape, x.stride(), out.stride())
    args = _Args.from_buffer_copy(walk.args)
    args.input, args.output = x.data_ptr(), out.data_ptr()
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
    stream = torch._C._cuda_getCurrentRawStream(index)  # pyright: ignore
    bind_context()
    launched = driver().cuLaunchKernel(kernel, *walk.grid, THREADS, 1, 1, 0, stream, ctypes.addressof(parameters), 0)
    check(launched, "launching the transposition of scales")
    return out


class Walk(NamedTuple):
    """A launch with all decided but the addresses. args: the bytes of an _Args."""

    grid: tuple[int, int, int]
    args: bytes


@lru_cache(maxsize=1024)
def walk_of(shape: tuple[int, ...], strides: tuple[int, ...], out_strides: tuple[int, ...]) -> Walk:
    """How the kernel walks a tensor of that shape, which is not empty.

    Columns are along mn, rows along whichever of G and k is closer together in the input, the other makes batches.
    """
    groups = (shape[0], strides[0], out_strides[0]) if len(shape) == 3 else (1, 0, 0)
    columns, column = shape[-2], strides[-2]
    (batches, batch, out_batch), (rows, row, out_row) = sorted(
        (groups, (shape[-1], strides[-1], out_strides[-1])), key=lambda axis: _distance(*axis[:2]), reverse=True
    )
    # So few rows are read a sector of 32 bytes at a time either way, and then fill a tile.
    along_rows = rows <= 4 or _distance(rows, row) < _distance(columns, column)
    tile_rows = min(1 << (rows - 1).bit_length(), MAX_ROWS) if along_rows else WIDE_ROWS
    row_tiles, column_tiles = -(-rows // tile_rows), -(-columns * tile_rows // ELEMENTS)
    grid_y = min(batches, MAX_GRID_Y)
    args = _Args(
        rows=rows,
        columns=columns,
        input_batch=batch,
        input_row=row,
        input_column=column,
        output_batch=out_batch,
        output_row=out_row,
        batches=batches,
        row_tiles=row_tiles,
        tile_rows=tile_rows,
        along_rows=along_rows,
    )
    return Walk((row_tiles * column_tiles, grid_y, -(-batches // grid_y)), bytes(args))


def _distance(size: int, stride: int) -> float:
    """From one element of an axis to the next in memory; without end where there is no other."""
    return stride if size > 1 and stride else math.inf


@cache
def source() -> Source:
    """The kernel, ready to be compiled."""
    folder = Path(__file__).parents[1] / "kernels"
    constants = {"THREADS": THREADS, "ELEMENTS": ELEMENTS, "WIDE_ROWS": WIDE_ROWS}
    tile = "".join(f"constexpr int {name} = {value};\n" for name, value in constants.items())
    base = (folder / "ptx" / "base.cuh").read_text()
    return Source("layout.cu", (folder / "layout.cu").read_text(), (("tile.cuh", tile), ("ptx/base.cuh", base)))


_lock = threading.Lock()


def prepare(index: int) -> Any:
    """The kernel, compiled and loaded at the device's first use of it; None unless the device is a Hopper GPU."""
    with _lock:
        return _kernel(index)


def _forget() -> None:
    """In a child process, which has none of its parent's contexts, nor whoever holds a lock."""
    global _lock
    _lock = threading.Lock()
    _kernel.cache_clear()


os.register_at_fork(after_in_child=_forget)


@cache
def _kernel(index: int) -> Any:
    if device.current(index).capability != device.HOPPER:
        return None
    return driver().CUfunction(int(load(cubin_for(source()), ENTRY, "layout.cu")))
