"""From a plan to a running kernel: loads the cubin, describes the operands to the copy engine, launches."""

from __future__ import annotations

import ctypes
import threading
import warnings
from typing import Any

import torch

from .. import settings
from ..heuristics import box_rows, tile_rows
from ..layout import align, ceil_div, get_mn_major_tma_aligned_tensor
from ..plan import (
    BLOCK_K,
    COUNTERS,
    DEBUG_WAIT_SECONDS,
    ENTRY,
    Plan,
    Strip,
    Tile,
    describing_source,
    reporting_source,
)
from ..problem import Kind, Operands
from .compiler import Source, cubin_for
from .driver import bind_context, check, driver, load
from .transpose import prepare as prepare_transposition

MAP_BYTES = 128
MAX_LAUNCHERS = 1024  # for each thread


class _ProblemArgs(ctypes.Structure):
    """`struct Problem` of kernels/problem.cuh."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("m", ctypes.c_uint32),
        ("n", ctypes.c_uint32),
        ("k", ctypes.c_uint32),
        ("band", ctypes.c_uint32),  # of strips `split`
        ("tile_rows", ctypes.c_uint32),
        ("box_rows", ctypes.c_uint32),
        ("scale_rows", ctypes.c_uint32),
        ("counter", ctypes.c_uint32),
        ("groups", ctypes.c_uint32),
        ("stages", ctypes.c_uint32),
        ("overlaps", ctypes.c_uint32),
        ("b_scales", ctypes.c_uint64),
        ("b_scale_stride_n", ctypes.c_int64),
        ("b_scale_stride_k", ctypes.c_int64),
        ("b_scale_stride_g", ctypes.c_int64),
        ("alignment", ctypes.c_uint32),
        ("clear_padding", ctypes.c_uint32),
        ("layout", ctypes.c_uint64),
        ("d", ctypes.c_uint64),
        ("d_stride_m", ctypes.c_int64),
        ("d_stride_g", ctypes.c_int64),
        ("c", ctypes.c_uint64),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("maps", ctypes.c_uint64),
        ("pace", ctypes.c_uint32),
        ("nothing", ctypes.c_uint32),
    ]


class _Args(ctypes.Structure):
    """`struct Args` of kernels/problem.cuh. Its tensor maps are aligned: `_args` sees to that."""

    _fields_ = [
        ("a", ctypes.c_byte * MAP_BYTES),
        ("b", ctypes.c_byte * MAP_BYTES),
        ("a_scales", ctypes.c_byte * MAP_BYTES),
        ("b_scales", ctypes.c_byte * MAP_BYTES),
        ("d", ctypes.c_byte * MAP_BYTES),
        ("problem", _ProblemArgs),
        ("padding", ctypes.c_byte * 32),  # alignas(64)
    ]


def launch(plan: Plan, operands: Operands) -> None:
    """Queues the kernel on the current stream of the operands' device.

    Raises: CompileError, LaunchError.
    """
    index = operands.d.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(plan, operands)
    o = operands
    a_scales, b_scales = mn_major(o.a_scales), mn_major(o.b_scales) if plan.tile.column_scales else o.b_scales
    c, d = o.c, o.d
    if c is not None and (c.stride() != d.stride() or c.data_ptr() % 16):  # the kernel has d's strides for it
        c = torch.empty_strided(d.shape, d.stride(), dtype=d.dtype, device=d.device).copy_(c)
    if a_scales is not o.a_scales or b_scales is not o.b_scales or c is not o.c:
        o = o._replace(a_scales=a_scales, b_scales=b_scales, c=c)
    key = (
        plan,
        index,
        o.a.stride(),
        o.a_scales.stride(),
        o.b.stride(),
        o.b_scales.stride(),
        o.d.stride(),
        o.clear_padding,
    )
    launchers = _launchers()
    launcher = launchers.pop(key, None) or _Launcher(plan, o)
    launchers[key] = launcher
    if len(launchers) > MAX_LAUNCHERS:
        launchers.pop(next(iter(launchers)))
    launcher(o)


def prepare(tile: Tile | Strip, kind: Kind, device_index: int) -> None:
    """Compiles and loads what a launch needs, and launches nothing. Raises: CompileError, LaunchError."""
    key = (tile, kind, device_index, settings.get("DG_JIT_DEBUG"))
    if key in _prepared:
        return
    with torch.cuda.device(device_index):
        _launchers()
        kernel_for(tile, device_index)
        prepare_transposition(device_index)  # for scales that are not laid out yet
        if kind in (Kind.K_GROUPED, Kind.K_ENDS):
            _small_kernel(describing_source(), device_index)
        if kind == Kind.CONTIGUOUS and settings.get("DG_JIT_DEBUG"):
            _small_kernel(reporting_source(), device_index)
    _prepared.add(key)


class _Launcher:
    """A launch with all decided but the addresses and the stream. For one thread: it changes its arguments in place."""

    def __init__(self, plan: Plan, o: Operands) -> None:
        cuda, tile = driver(), plan.tile
        self._replace, self._launch = cuda.cuTensorMapReplaceAddress, cuda.cuLaunchKernelEx
        self._plan = plan
        self._index: int = o.d.device.index
        self._kernel = kernel_for(tile, self._index)
        self._args, encoded = _args(cuda, plan, o)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._args))
        self._parameters_address = ctypes.addressof(self._parameters)
        self._mapped = tuple(encoded)  # the operands that have a tensor map
        self._maps = [
            cuda.CUtensorMap(_ptr=ctypes.addressof(self._args) + getattr(_Args, name).offset) for name in encoded
        ]
        self._addresses = [getattr(o, name).data_ptr() for name in encoded]
        self._config = _launch_config(cuda, plan.ctas, tile.threads, plan.smem_bytes, plan.cluster, plan.pdl)
        self._counters = _counters_of(tile, self._index) if plan.claims else None
        self._report: Any = None
        if plan.problem.kind == Kind.CONTIGUOUS and settings.get("DG_JIT_DEBUG"):
            self._report = _small_kernel(reporting_source(), self._index)
            self._report_config = _launch_config(cuda, 1, 1024, 0, 1, plan.pdl)
        self._describe: Any = None
        if plan.problem.kind in (Kind.K_GROUPED, Kind.K_ENDS):
            self._describe = _small_kernel(describing_source(), self._index)
            self._describe_config = _launch_config(cuda, 1, 32, 0, 1, plan.pdl)

    def __call__(self, o: Operands) -> None:
        addresses = [getattr(o, name).data_ptr() for name in self._mapped]
        if addresses != self._addresses:
            # Until all are replaced none is taken for known: the next call mends what an interrupt leaves.
            before, self._addresses = self._addresses, [0] * len(addresses)
            for tensor_map, old, new in zip(self._maps, before, addresses, strict=True):
                if old != new:
                    check(self._replace(tensor_map, new), "moving a tensor's description")
            self._addresses = addresses
        problem = self._args.problem
        problem.b_scales = o.b_scales.data_ptr()
        problem.d = o.d.data_ptr()
        problem.layout = 0 if o.layout is None else o.layout.data_ptr()
        problem.c = 0 if o.c is None else o.c.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self._index)  # pyright: ignore
        if self._report is not None:
            p = self._plan.problem
            values = (ctypes.c_uint64(problem.layout), *(ctypes.c_uint32(x) for x in (p.m, p.groups, p.alignment)))
            parameters = (ctypes.c_void_p * 4)(*(ctypes.addressof(value) for value in values))
            self._queue(self._report, self._report_config, stream, ctypes.addressof(parameters))
        if self._describe is not None:
            maps = torch.empty(self._plan.problem.groups * 2 * MAP_BYTES, dtype=torch.uint8, device=o.d.device)
            problem.a, problem.b, problem.maps = o.a.data_ptr(), o.b.data_ptr(), maps.data_ptr()
            self._queue(self._describe, self._describe_config, stream)
        if self._counters is not None:
            problem.counter = self._counters.take(stream)
        self._queue(self._kernel, self._config, stream)

    def _queue(self, kernel: Any, config: Any, stream: int, parameters: int = 0) -> None:
        config.hStream = stream
        result = self._launch(config, kernel, parameters or self._parameters_address, 0)
        if int(result[0]):
            check(result, f"launching {self._plan}")


def _launch_config(cuda: Any, ctas: int, threads: int, smem_bytes: int, cluster: int, pdl: bool) -> Any:
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = smem_bytes
    attributes: list[Any] = []
    if cluster > 1:
        attribute, value = cuda.CUlaunchAttribute(), cuda.CUlaunchAttributeValue()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
        attribute.value = value
        attributes.append(attribute)
    if pdl:
        attribute, value = cuda.CUlaunchAttribute(), cuda.CUlaunchAttributeValue()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        attributes.append(attribute)
    if attributes:
        config.attrs, config.numAttrs = attributes, len(attributes)
    return config


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
_kernels: dict[tuple[Tile | Strip, int, bool], Any] = {}
_small_kernels: dict[tuple[str, int], Any] = {}
_prepared: set[tuple[Tile | Strip, Kind, int, bool]] = set()


class _Counters:
    """The counters of claimed tiles in a kernel's memory: which one a launch takes.

    No other launch may have it at the same time. Those of a stream run one after the other and share one. What is
    captured into a CUDA graph has one for itself for good, since the graph may run on any stream, beside any other.
    """

    def __init__(self) -> None:
        self._stream_id = driver().cuStreamGetId
        self._lock = threading.Lock()
        self._taken, self._warned = 0, False
        self._of_stream: dict[int, int] = {}

    def take(self, stream: int) -> int:
        """The counter's number, 0 if none is left: then each CTA's tiles are fixed beforehand, which is slower."""
        if torch.cuda.is_current_stream_capturing():
            return self._another()
        # Unlike its handle, a stream's id is never that of another one, before or after.
        unique = int(check(self._stream_id(stream), "reading a stream's id"))
        number = self._of_stream.get(unique, 0)
        if not number and (number := self._another()):
            number = self._of_stream.setdefault(unique, number)
        return number

    def _another(self) -> int:
        with self._lock:
            if self._taken < COUNTERS - 1:
                self._taken += 1
                return self._taken
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(
                f"{COUNTERS - 1} streams and captured launches have a counter of tiles: others balance uneven groups "
                "less well; capture fewer graphs anew in one process",
                RuntimeWarning,
                stacklevel=2,
            )
        return 0


_counters: dict[tuple[Tile | Strip, int], _Counters] = {}


def _counters_of(tile: Tile | Strip, device_index: int) -> _Counters:
    return _counters.setdefault((tile, device_index), _Counters())


def kernel_for(tile: Tile | Strip, device_index: int) -> Any:
    """The kernel of that tile, compiled and loaded at its first use, ready for that device."""
    debug = settings.get("DG_JIT_DEBUG")
    key = (tile, device_index, debug)
    if key not in _kernels:
        with _lock:
            if key not in _kernels:
                image = cubin_for(tile.source(DEBUG_WAIT_SECONDS if debug else 0))
                _kernels[key] = _load(image, tile.name, tile.smem_bytes, device_index)
    return _kernels[key]


def _small_kernel(source: Source, device_index: int) -> Any:
    """A kernel beside the one that multiplies, ready for that device."""
    key = (source.name, device_index)
    if key not in _small_kernels:
        with _lock:
            if key not in _small_kernels:
                _small_kernels[key] = _load(cubin_for(source), source.stem, 0, device_index)
    return _small_kernels[key]


def _load(image: bytes, name: str, smem_bytes: int, device_index: int) -> Any:
    cuda, kernel = driver(), load(image, ENTRY, name)
    device = check(cuda.cuDeviceGet(device_index), f"looking up device {device_index}")
    attributes = cuda.CUfunction_attribute
    wishes = [(attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)]
    if smem_bytes:  # several CTAs on an SM need what one alone would leave to L1
        wishes.append((attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
    for attribute, value in wishes:
        action = f"asking for {smem_bytes} bytes of shared memory"
        check(cuda.cuKernelSetAttribute(attribute, value, kernel, device), action)
    return cuda.CUfunction(int(kernel))


def _args(cuda: Any, plan: Plan, o: Operands) -> tuple[_Args, list[str]]:
    """The kernel's arguments, and the operands that it knows by a tensor map."""
    tile, problem = plan.tile, plan.problem
    n, k = problem.n, problem.k
    swizzles = cuda.CUtensorMapSwizzle
    swizzle_128 = swizzles.CU_TENSOR_MAP_SWIZZLE_128B
    swizzle_64, swizzle_32 = swizzles.CU_TENSOR_MAP_SWIZZLE_64B, swizzles.CU_TENSOR_MAP_SWIZZLE_32B
    unswizzled = swizzles.CU_TENSOR_MAP_SWIZZLE_NONE
    types = cuda.CUtensorMapDataType
    byte, float32 = types.CU_TENSOR_MAP_DATA_TYPE_UINT8, types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    bf16 = types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    memory = ctypes.create_string_buffer(ctypes.sizeof(_Args) + 127)
    args = _Args.from_buffer(memory, -ctypes.addressof(memory) % 128)  # a tensor map asks for 64, newer ones for 128
    rows, scale_rows = box_rows(tile, problem), min(tile.block_m, align(problem.m, 4))
    # Grouped along K, every group's a and b are matrices: these maps are what theirs are made from.
    a, b = (x if x.dim() > 1 else x[: size * k].view(size, k) for x, size in ((o.a, problem.m), (o.b, n)))
    encoded = ["a", "b", "a_scales"]
    _tensor_map(cuda, args.a, a, byte, (BLOCK_K, rows), swizzle_128)
    _tensor_map(cuda, args.b, b, byte, (BLOCK_K, tile.b_rows), swizzle_128)
    _tensor_map(cuda, args.a_scales, o.a_scales.mT, float32, (scale_rows, 1), unswizzled)
    if tile.column_scales:
        _tensor_map(cuda, args.b_scales, o.b_scales.mT, float32, (tile.block_n, 1), unswizzled)
        encoded.append("b_scales")
    elif isinstance(tile, Tile):
        swizzle_d = {16: swizzle_32, 32: swizzle_64, 64: swizzle_128}[tile.store_n]
        _tensor_map(cuda, args.d, o.d, bf16, (tile.store_n, tile.store_m), swizzle_d)
        encoded.append("d")
    stride_g, stride_n, stride_k = (0, *o.b_scales.stride())[-3:]
    args.problem = _ProblemArgs(
        kind=problem.kind,
        m=problem.m,
        n=n,
        k=k,
        groups=problem.groups,
        alignment=problem.alignment,
        band=plan.band if isinstance(tile, Tile) else plan.split,
        tile_rows=tile_rows(tile, problem),
        box_rows=rows,
        scale_rows=scale_rows,
        stages=plan.stages,
        overlaps=plan.pdl and not tile.column_scales,  # whose b may be new as well
        pace=0 if plan.tc_util == 100 else ceil_div(tile.block_m * tile.block_n * 100, 32 * plan.tc_util),
        clear_padding=o.clear_padding,
        b_scale_stride_g=stride_g,
        b_scale_stride_n=stride_n,
        b_scale_stride_k=stride_k,
        d_stride_g=o.d.stride(0) if o.d.dim() == 3 else 0,
        d_stride_m=o.d.stride(-2),
    )
    return args, encoded


def mn_major(scales: torch.Tensor) -> torch.Tensor:
    """Scales as the copy engine reads them: M-major, rows on 16 bytes. What is so already is used in place."""
    *groups, m, blocks = scales.shape
    rows_fit = scales.stride(-2) == 1 or m == 1
    pitch_fits = blocks == 1 or (scales.stride(-1) % 4 == 0 and scales.stride(-1) >= m)
    groups_fit = not groups or groups[0] == 1 or (scales.stride(0) % 4 == 0 and scales.stride(0) > 0)
    if rows_fit and pitch_fits and groups_fit and scales.data_ptr() % 16 == 0:
        return scales
    return get_mn_major_tma_aligned_tensor(scales)


def _tensor_map(cuda: Any, to: Any, x: torch.Tensor, dtype: Any, box: tuple[int, int], swizzle: Any) -> None:
    """Describes x [rows, columns] or [groups, rows, columns], of inner stride 1. box: columns and rows of one copy."""
    *groups, rows, columns = x.shape
    count = groups[0] if groups else 1
    # Where there is one row or one group its stride means nothing; the driver wants one all the same.
    pitch = x.stride(-2) * x.element_size() if rows > 1 else align(columns * x.element_size(), 16)
    group_pitch = x.stride(0) * x.element_size() if count > 1 else pitch * rows
    encoded = check(
        cuda.cuTensorMapEncodeTiled(
            dtype,
            3,
            x.data_ptr(),
            [cuda.cuuint64_t(size) for size in (columns, rows, count)],
            [cuda.cuuint64_t(size) for size in (pitch, group_pitch)],
            [cuda.cuuint32_t(size) for size in (*box, 1)],
            [cuda.cuuint32_t(1)] * 3,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"describing a tensor of shape {tuple(x.shape)}, strides {tuple(x.stride())} to the copy engine",
    )
    ctypes.memmove(to, encoded.getPtr(), MAP_BYTES)
