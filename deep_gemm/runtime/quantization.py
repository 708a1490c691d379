"""Casts to FP8 on the GPU: one launch of a kernel of kernels/quantize.cu.

    kind        one scale per                    what is cast                      values leave as
    token       128 of a row                     x                                 rows
    gated       128 of a row                     silu(first half) * second half    rows
    tile        128 x 128, or 128 of a column    x                                 rows
    transposed  128 of a column                  x                                 columns

Rows and columns are those of memory: elements of a row are adjacent.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InvalidInputError
from . import device
from .compiler import Source, cubin_for
from .driver import bind_context, check, driver, load
from .guard import guard, modes_at_work

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # DeepSeek's: a group of zeros gets a scale to divide by
GROUP = 128

# exp(-x) = 2**n * p(f), n + f = -x / ln 2: n is rounded by adding SHIFT. EXP2 is p, 2**f for f from -0.5 to 0.5,
# highest power first: minimax, off by 1.6 * 2**-24 at most. LIMIT: from there on x and -x are taken for it.
LOG2_E = float.fromhex("0x1.715476p+0")
SHIFT = 1.5 * 2.0**23
LIMIT = 87.0
EXP2 = tuple(
    map(float.fromhex, ("0x1.5bd97ap-10", "0x1.3ce8b2p-7", "0x1.c6b6dap-5", "0x1.ebf9c2p-3", "0x1.62e42ap-1", "0x1p+0"))
)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ENTRIES = tuple(f"{kind}_{name}" for kind in ("token", "gated", "tile", "transposed") for name in TYPES.values())
ROW_THREADS, TILE_THREADS = 256, 512
STEPS_OF_16_BITS = 2  # groups that a lane of "token" and "gated" has, one below the other; else 1
BLOCKS_OF_COUNTED = 8  # of threads for each SM, where the device alone knows how many rows there are
_ROWS_AT_ONCE = ROW_THREADS // 8  # of 128 elements: eight lanes have a group
_MOST_SIDE_BY_SIDE = 3  # log2
_BYTES = 16  # that a thread loads at once
_MAX_GRID_Y = 65535
MAX_KNOWN = 1024  # calls of each thread


class _Args(ctypes.Structure):
    """`struct Args` of kernels/quantize.cu."""

    _fields_ = [
        ("input", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
        ("counts", ctypes.c_uint64),
        ("starts", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64),
        ("input_batch", ctypes.c_int64),
        ("scales_batch", ctypes.c_int64),
        ("input_row", ctypes.c_uint32),
        ("scales_line", ctypes.c_uint32),
        ("batches", ctypes.c_uint32),
        ("rows", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        ("row_tiles", ctypes.c_uint32),
        ("column_tiles", ctypes.c_uint32),
        ("tile_groups_log2", ctypes.c_uint32),
        ("of_blocks", ctypes.c_uint32),
        ("use_ue8m0", ctypes.c_uint32),
    ]


def fits(x: torch.Tensor) -> bool:
    """Whether the kernels read x [G, rows, columns] where it lies."""
    size = x.element_size()
    (batches, rows, columns), (batch, row, column) = x.shape, x.stride()
    return (
        x.dtype in TYPES
        and columns % 16 == 0
        and column == 1
        and (rows == 1 or (row * size % _BYTES == 0 and row * size < 2**32))
        and (batches == 1 or batch * size % _BYTES == 0)
        and x.data_ptr() % _BYTES == 0
        and max(x.shape) < 2**31
    )


def is_offered(x: torch.Tensor) -> bool:
    """Whether x is on a GPU that the kernels run on, and of a type that they cast."""
    return x.is_cuda and x.dtype in TYPES and device.current(x.device.index).capability == device.HOPPER


def cast(
    kind: str,
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    use_ue8m0: bool,
    *,
    of_blocks: bool = False,
    counts: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> None:
    """Casts x on the current stream of its device. Nothing is allocated, and nobody waits.

    Args:
        kind: "token", "gated", "tile" or "transposed".
        x: [G, rows, columns], which `fits`, and is not empty.
        values: E4M3, contiguous. scales: FP32, in the order of the kind's groups, rows of "transposed" padded to 4.
        of_blocks: with "tile", 128 x 128 elements share a scale, else 128 of a column.
        counts: with "gated", int32 [G]: rows of every batch that are cast.
        starts, sizes: with "transposed" and G = 1, int32 [rows / 128]: of the group of every 128 rows.

    Raises: InvalidInputError for freed memory; CompileError, LaunchError, MissingKernelError.
    """
    for tensor in (x, counts, starts, sizes):
        if tensor is not None and tensor.numel() and not tensor.data_ptr():
            raise InvalidInputError(
                f"a tensor of shape {tuple(tensor.shape)} has no memory, expected one that holds values: "
                "its storage was freed"
            )
    index = x.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return cast(
                kind, x, values, scales, use_ue8m0, of_blocks=of_blocks, counts=counts, starts=starts, sizes=sizes
            )
    num_sms = 0 if counts is None else device.current(index).num_sms
    walk = walk_of(kind, x.shape, x.stride(), x.element_size(), of_blocks, num_sms)
    bind_context()
    caster = _Caster(walk, prepare(index, f"{kind}_{TYPES[x.dtype]}"), index, use_ue8m0)
    caster(*(0 if y is None else y.data_ptr() for y in (x, values, scales, counts, starts, sizes)))
    _thread.last = caster


class _Caster:
    """A cast with all decided but the addresses and the stream. For one thread: it changes its arguments in place."""

    def __init__(self, walk: Walk, kernel: Any, index: int, use_ue8m0: bool) -> None:
        memory = ctypes.create_string_buffer(walk.args, ctypes.sizeof(_Args))
        self._args = _Args.from_buffer(memory)
        self._args.use_ue8m0 = use_ue8m0
        self._words = memoryview(memory).cast("B").cast("Q")
        self._pointer = (ctypes.c_void_p * 1)(ctypes.addressof(self._args))
        self._parameters = ctypes.addressof(self._pointer)
        self._launch, self._kernel = driver().cuLaunchKernel, kernel
        self._grid, self._threads = walk.grid, walk.threads
        self._stream_of = torch._C._cuda_getCurrentRawStream  # pyright: ignore
        self.index, self.has_others = index, torch.cuda.device_count() > 1

    def __call__(self, x: int, values: int, scales: int, counts: int = 0, starts: int = 0, sizes: int = 0) -> None:
        """Launches, with tensors at these addresses (0: there is none): the first six members of _Args."""
        words = self._words
        words[0], words[1], words[2], words[3], words[4], words[5] = x, values, scales, counts, starts, sizes
        stream = self._stream_of(self.index)
        launched = self._launch(self._kernel, *self._grid, self._threads, 1, 1, 0, stream, self._parameters, 0)
        check(launched, "launching a cast to FP8")

    def read(self, x: torch.Tensor, counts: torch.Tensor | None) -> bool:
        """Whether these, no copies of theirs and nothing else were read last."""
        read = [self._words[i] for i in (0, 3, 4, 5)]
        return read == [x.data_ptr(), 0 if counts is None else counts.data_ptr(), 0, 0]


class _Known(NamedTuple):
    """A call that came before: whether tensors are like its own, its caster, and what its results are like."""

    fits: Callable[..., bool]
    caster: _Caster
    device: torch.device
    shape: tuple[int, ...]
    scales_shape: tuple[int, ...]
    scales_strides: tuple[int, ...]


class _Thread(threading.local):
    """known: calls, by their keys. last: the caster of the last cast that was checked, since nothing_cast."""

    last: _Caster | None = None

    def __init__(self) -> None:
        self.known: dict[Any, _Known] = {}


_thread = _Thread()


def again(key: Any, x: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a cast returns that only has other addresses than one before; None if there was none, or x is for the check.

    key: what tells calls apart whose tensors are alike, the shape of x, and whether there are counts.
    """
    known = None if modes_at_work() else _thread.known.get(key)  # else sizes may be symbols, which have no hash
    if known is None or not (known.fits(x) if counts is None else known.fits(x, counts)):
        return None
    at, caster, counts_at = x.data_ptr(), known.caster, 0 if counts is None else counts.data_ptr()
    if at % _BYTES or not at or not (counts is None or counts_at):
        return None
    if caster.has_others and torch._C._cuda_getDevice() != caster.index:  # pyright: ignore
        return None
    values = torch.empty(known.shape, dtype=torch.float8_e4m3fn, device=known.device)
    scales = torch.empty_strided(known.scales_shape, known.scales_strides, dtype=torch.float32, device=known.device)
    caster(at, values.data_ptr(), scales.data_ptr(), counts_at)
    return values, scales


def nothing_cast() -> None:
    """Before a cast is checked: what was cast before it is not its own."""
    _thread.last = None


def remember(
    key: Any, x: torch.Tensor, counts: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor
) -> None:
    """Keeps the last cast for `again`, if it read x and counts where they lie."""
    caster, _thread.last = _thread.last, None
    if caster is None or type(values) is not torch.Tensor or not caster.read(x, counts):
        return
    fits = guard([x] if counts is None else [x, counts])
    if key not in _thread.known and len(_thread.known) >= MAX_KNOWN:
        _thread.known.pop(next(iter(_thread.known)))
    _thread.known[key] = _Known(fits, caster, x.device, values.shape, scales.shape, scales.stride())


class Walk(NamedTuple):
    """A launch with all decided but the addresses and use_ue8m0. args: the bytes of an _Args."""

    grid: tuple[int, int, int]
    threads: int
    args: bytes


@lru_cache(maxsize=1024)
def walk_of(
    kind: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int, of_blocks: bool = False, num_sms: int = 0
) -> Walk:
    """How a kernel walks [G, rows, columns] of elements of `size` bytes. num_sms: if rows are counted."""
    batches, rows, columns = shape
    columns = columns // 2 if kind == "gated" else columns
    groups, blocks = -(-columns // GROUP), -(-rows // GROUP)  # along a row, along a column
    log2 = 0
    if kind in ("token", "gated"):
        log2 = min((groups & -groups).bit_length() - 1, _MOST_SIDE_BY_SIDE)
        steps = STEPS_OF_16_BITS if size == 2 else 1
        row_tiles, column_tiles = -(-rows // (_ROWS_AT_ONCE * steps >> log2)), groups >> log2
        line, lines = -(-rows // 4) * 4, groups
    else:
        row_tiles, column_tiles = blocks, groups
        line, lines = groups if of_blocks else -(-columns // 4) * 4 if kind == "transposed" else columns, blocks
    args = _Args(
        input_batch=strides[0] * size if batches > 1 else 0,
        scales_batch=line * lines,
        input_row=strides[1] * size if rows > 1 else 0,
        scales_line=line,
        batches=batches,
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        tile_groups_log2=log2,
        of_blocks=of_blocks,
    )
    threads = ROW_THREADS if kind in ("token", "gated") else TILE_THREADS
    if num_sms:
        return Walk((min(batches * row_tiles * column_tiles, num_sms * BLOCKS_OF_COUNTED), 1, 1), threads, bytes(args))
    grid_y = min(batches, _MAX_GRID_Y)
    return Walk((row_tiles * column_tiles, grid_y, -(-batches // grid_y)), threads, bytes(args))


@cache
def source() -> Source:
    """The kernels, ready to be compiled."""
    folder = Path(__file__).parents[1] / "kernels"
    whole = {"ROW_THREADS": ROW_THREADS, "TILE_THREADS": TILE_THREADS, "STEPS_OF_16_BITS": STEPS_OF_16_BITS}
    real = {"E4M3_MAX": E4M3_MAX, "SMALLEST_AMAX": SMALLEST_AMAX, "LOG2_E": LOG2_E, "SHIFT": SHIFT, "LIMIT": LIMIT}
    tile = "#pragma once\n" + "".join(f"constexpr int {name} = {value};\n" for name, value in whole.items())
    tile += "".join(f"constexpr float {name} = {value!r}f;\n" for name, value in real.items())
    terms = ", ".join(f"{value!r}f" for value in EXP2)
    tile += f"constexpr int EXP2_TERMS = {len(EXP2)};\n__constant__ constexpr float EXP2[] = {{{terms}}};\n"
    names = ("exact.cuh", "ptx/base.cuh", "ptx/convert.cuh")
    headers = tuple((name, (folder / name).read_text()) for name in names)
    return Source("quantize.cu", (folder / "quantize.cu").read_text(), (("tile.cuh", tile), *headers))


_lock = threading.Lock()


def prepare(index: int, entry: str) -> Any:
    """One of ENTRIES, compiled and loaded at the device's first use of it; None unless the device is a Hopper GPU."""
    with _lock:
        return _kernel(index, entry)


def _forget() -> None:
    """In a child process, which has none of its parent's contexts, nor whoever holds a lock."""
    global _lock, _thread
    _lock, _thread = threading.Lock(), _Thread()
    _kernel.cache_clear()


os.register_at_fork(after_in_child=_forget)


@cache
def _kernel(index: int, entry: str) -> Any:
    if device.current(index).capability != device.HOPPER:
        return None
    return driver().CUfunction(int(load(cubin_for(source()), entry, "quantize.cu")))
