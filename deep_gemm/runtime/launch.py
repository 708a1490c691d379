"""From a plan to a running kernel: loads the cubin, describes the operands to the copy engine, launches."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

import torch

from .. import settings
from ..layout import align, ceil_div, get_mn_major_tma_aligned_tensor
from ..plan import BLOCK_K, ENTRY, Plan, Tile
from ..problem import Operands
from .compiler import cubin_for
from .driver import bind_context, check, driver

DEBUG_WAIT_SECONDS = 2
MAX_LAUNCHERS = 1024  # for each thread


class _ProblemArgs(ctypes.Structure):
    """`struct Problem` of kernels/scheduler.cuh."""

    _fields_ = [
        ("m", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("k_blocks", ctypes.c_uint32),
        ("band", ctypes.c_uint32),
        ("stage_bytes", ctypes.c_uint32),
        ("b_scales", ctypes.c_uint64),
        ("b_scale_stride_n", ctypes.c_int64),
        ("b_scale_stride_k", ctypes.c_int64),
    ]


class _Args(ctypes.Structure):
    """`struct Args` of kernels/fp8_gemm.cu. Its tensor maps are aligned: `_args` sees to that."""

    _fields_ = [
        ("a", ctypes.c_byte * 128),
        ("b", ctypes.c_byte * 128),
        ("a_scales", ctypes.c_byte * 128),
        ("d", ctypes.c_byte * 128),
        ("problem", _ProblemArgs),
        ("padding", ctypes.c_byte * 16),  # alignas(64)
    ]


def launch(plan: Plan, operands: Operands) -> None:
    """Queues the kernel on the current stream of the operands' device.

    Raises: CompileError, LaunchError.
    """
    index = operands.d.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(plan, operands)
    a_scales = mn_major(operands.a_scales)
    key = (
        plan,
        index,
        operands.a.stride(),
        a_scales.stride(),
        operands.b.stride(),
        operands.b_scales.stride(),
        operands.d.stride(),
    )
    launchers = _launchers()
    launcher = launchers.pop(key, None) or _Launcher(plan, operands, a_scales)
    launchers[key] = launcher
    if len(launchers) > MAX_LAUNCHERS:
        launchers.pop(next(iter(launchers)))
    launcher(operands, a_scales)


class _Launcher:
    """A launch with all decided but the addresses and the stream. For one thread: it changes its arguments in place."""

    def __init__(self, plan: Plan, o: Operands, a_scales: torch.Tensor) -> None:
        cuda, tile = driver(), plan.tile
        self._replace, self._launch = cuda.cuTensorMapReplaceAddress, cuda.cuLaunchKernelEx
        self._plan = plan
        self._index: int = o.d.device.index
        self._kernel = kernel_for(tile, self._index)
        self._args = _args(cuda, plan, o, a_scales)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._args))
        self._parameters_address = ctypes.addressof(self._parameters)
        self._addresses = [x.data_ptr() for x in (o.a, o.b, a_scales, o.d)]
        self._maps = [cuda.CUtensorMap(_ptr=ctypes.addressof(self._args) + i * 128) for i in range(4)]
        self._config = config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = plan.ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = tile.threads, 1, 1
        config.sharedMemBytes = tile.smem_bytes
        if tile.cluster > 1:
            cluster = cuda.CUlaunchAttribute()
            cluster.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            value = cuda.CUlaunchAttributeValue()
            value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = tile.cluster, 1, 1
            cluster.value = value
            config.attrs, config.numAttrs = [cluster], 1

    def __call__(self, o: Operands, a_scales: torch.Tensor) -> None:
        addresses = [o.a.data_ptr(), o.b.data_ptr(), a_scales.data_ptr(), o.d.data_ptr()]
        if addresses != self._addresses:
            # Until all are replaced none is taken for known: the next call mends what an interrupt leaves.
            before, self._addresses = self._addresses, [0, 0, 0, 0]
            for tensor_map, old, new in zip(self._maps, before, addresses, strict=True):
                if old != new:
                    check(self._replace(tensor_map, new), "moving a tensor's description")
            self._addresses = addresses
        self._args.problem.b_scales = o.b_scales.data_ptr()
        self._config.hStream = torch._C._cuda_getCurrentRawStream(self._index)  # pyright: ignore
        result = self._launch(self._config, self._kernel, self._parameters_address, 0)
        if int(result[0]):
            check(result, f"launching {self._plan}")


_thread = threading.local()


def _launchers() -> dict[Any, _Launcher]:
    """This thread's launchers, the least recently used first."""
    try:
        return _thread.launchers
    except AttributeError:
        bind_context()
        _thread.launchers = {}
        return _thread.launchers


_lock = threading.Lock()
_kernels: dict[tuple[Tile, int, bool], Any] = {}


def kernel_for(tile: Tile, device_index: int) -> Any:
    """The kernel of that tile, compiled and loaded at its first use, ready for that device."""
    debug = settings.get("DG_JIT_DEBUG")
    key = (tile, device_index, debug)
    if key not in _kernels:
        with _lock:
            if key not in _kernels:
                image = cubin_for(tile.source(DEBUG_WAIT_SECONDS if debug else 0))
                _kernels[key] = _load(image, tile, device_index)
    return _kernels[key]


def _load(image: bytes, tile: Tile, device_index: int) -> Any:
    cuda, start = driver(), time.perf_counter()
    library = check(cuda.cuLibraryLoadData(image, [], [], 0, [], [], 0), f"loading the kernel of {tile.name}")
    kernel = check(cuda.cuLibraryGetKernel(library, ENTRY.encode()), f"looking up {ENTRY}")
    device = check(cuda.cuDeviceGet(device_index), f"looking up device {device_index}")
    attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(
        cuda.cuKernelSetAttribute(attribute, tile.smem_bytes, kernel, device),
        f"asking for {tile.smem_bytes} bytes of shared memory",
    )
    if settings.get("DG_JIT_PRINT_LOAD_TIME"):
        print(f"deep_gemm: loaded {tile.name} in {(time.perf_counter() - start) * 1e3:.2f} ms", file=sys.stderr)
    return cuda.CUfunction(int(kernel))


def _args(cuda: Any, plan: Plan, o: Operands, a_scales: torch.Tensor) -> _Args:
    tile, problem = plan.tile, plan.problem
    m, n, k = problem.m, problem.n, problem.k
    swizzles = cuda.CUtensorMapSwizzle
    swizzle_128 = swizzles.CU_TENSOR_MAP_SWIZZLE_128B
    swizzle_64, swizzle_32 = swizzles.CU_TENSOR_MAP_SWIZZLE_64B, swizzles.CU_TENSOR_MAP_SWIZZLE_32B
    unswizzled = swizzles.CU_TENSOR_MAP_SWIZZLE_NONE
    types = cuda.CUtensorMapDataType
    byte, float32 = types.CU_TENSOR_MAP_DATA_TYPE_UINT8, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    bf16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    memory = ctypes.create_string_buffer(ctypes.sizeof(_Args) + 127)
    args = _Args.from_buffer(memory, -ctypes.addressof(memory) % 128)  # a tensor map asks for 64, newer ones for 128
    # The CTAs of a cluster load their shared operand in halves. Rows past a small M would take time to be filled with
    # zeros: none are asked for.
    a_rows, scale_rows = min(tile.block_m // tile.cluster_n, align(m, 8)), min(tile.block_m, align(m, 4))
    stage_bytes = (a_rows * tile.cluster_n + tile.block_n) * BLOCK_K + scale_rows * 4
    _tensor_map(cuda, args.a, o.a, byte, (k, m), _pitch(o.a), (BLOCK_K, a_rows), swizzle_128)
    _tensor_map(cuda, args.b, o.b, byte, (k, n), _pitch(o.b), (BLOCK_K, tile.block_n // tile.cluster_m), swizzle_128)
    a_scale_pitch = max(a_scales.stride(1) * 4, 16) if problem.k_blocks > 1 else ceil_div(m, 4) * 16
    scales_shape = (m, problem.k_blocks)
    _tensor_map(cuda, args.a_scales, a_scales, float32, scales_shape, a_scale_pitch, (scale_rows, 1), unswizzled)
    swizzle_d = {16: swizzle_32, 32: swizzle_64, 64: swizzle_128}[tile.store_n]
    _tensor_map(cuda, args.d, o.d, bf16, (n, m), _pitch(o.d), (tile.store_n, tile.block_m), swizzle_d)
    stride_n, stride_k = o.b_scales.stride()
    args.problem = _ProblemArgs(
        m, n, problem.k_blocks, plan.band, stage_bytes, o.b_scales.data_ptr(), stride_n, stride_k
    )
    return args


def mn_major(scales: torch.Tensor) -> torch.Tensor:
    """The scales of a as the copy engine reads them: M-major, rows on 16 bytes. What is so already is used in place."""
    m, blocks = scales.shape
    rows_fit = scales.stride(0) == 1 or m == 1
    pitch_fits = blocks == 1 or (scales.stride(1) % 4 == 0 and scales.stride(1) >= m)
    if rows_fit and pitch_fits and scales.data_ptr() % 16 == 0:
        return scales
    return get_mn_major_tma_aligned_tensor(scales)


def _pitch(x: torch.Tensor) -> int:
    """Bytes from row to row; of a single row, where the stride means nothing, its length on 16 bytes."""
    return (x.stride(0) if x.shape[0] > 1 else ceil_div(x.shape[1], 16) * 16) * x.element_size()


def _tensor_map(
    cuda: Any,
    to: Any,
    x: torch.Tensor,
    dtype: Any,
    shape: tuple[int, int],
    pitch: int,
    box: tuple[int, int],
    swizzle: Any,
) -> None:
    encoded = check(
        cuda.cuTensorMapEncodeTiled(
            dtype,
            2,
            x.data_ptr(),
            [cuda.cuuint64_t(size) for size in shape],
            [cuda.cuuint64_t(pitch)],
            [cuda.cuuint32_t(size) for size in box],
            [cuda.cuuint32_t(1), cuda.cuuint32_t(1)],
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"describing a tensor of shape {tuple(x.shape)}, strides {tuple(x.stride())} to the copy engine",
    )
    ctypes.memmove(to, encoded.getPtr(), 128)
