"""From a plan to a running kernel: loads the cubin, describes the operands to the copy engine, launches."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import config, settings
from ..config import Config
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
from .guard import guard, modes_at_work
from .transpose import prepare as prepare_transposition

MAP_BYTES = 128
MAX_LAUNCHERS = 4096  # for each thread and settings, of different sizes
MAX_ALIKE = 8  # of the same sizes
MAX_SETTINGS = 8  # whose launchers a thread keeps


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


def _never(*tensors: torch.Tensor) -> bool:
    return False


def _word(struct: type[ctypes.Structure], name: str) -> int:
    """Where a member is among the words of a structure, of 8 bytes each."""
    return getattr(struct, name).offset // 8


_A, _A_SCALES, _B, _B_SCALES, _D = (_word(_Args, name) for name in ("a", "a_scales", "b", "b_scales", "d"))
_P_A, _P_B, _P_B_SCALES, _P_C, _P_D, _P_LAYOUT = (
    _word(_Args, "problem") + _word(_ProblemArgs, name) for name in ("a", "b", "b_scales", "c", "d", "layout")
)
_P_COUNTER = (_Args.problem.offset + _ProblemArgs.counter.offset) // 4
_DEFAULT_STREAM = -1
DENSE = -1  # the option of a plain dense call, which no grouped one has
_FORGOTTEN: Any = object()  # the option that no call has, and settings


def again(a: Any, b: Any, d: Any, layout: Any = None, option: Any = DENSE) -> bool:
    """Launches what this thread has launched before for operands that only have other addresses; whether there was any.

    If not, nothing has happened, and the operands are to be checked. a, b, d: as of a public call. layout: the tensor
    that says which rows belong to which group. option: as given to launch.

    What came after the last launcher the last time is tried first, others are found by sizes; that all is the same, one
    comparison tells. What follows it is _Launcher.__call__ for the common case, spelled out: this is where a call's
    microseconds go.
    """
    launchers = _thread.launchers
    if launchers.settings is not config.running or modes_at_work():
        return False
    try:
        (x, x_scales), (y, y_scales) = a, b
        last = launchers.last
        launcher = last.next
        if launcher.option != option or not (
            launcher.fits_again(x, x_scales, y, y_scales, d)
            if layout is None
            else launcher.fits_again(x, x_scales, y, y_scales, d, layout)
        ):
            tensors = (x, x_scales, y, y_scales, d) if layout is None else (x, x_scales, y, y_scales, d, layout)
            for launcher in launchers.known[x.numel(), y.numel(), option]:
                if launcher.fits_again(*tensors):
                    break
            else:
                return False
            last.next = launcher
    except (KeyError, TypeError, ValueError, AttributeError):  # never seen, or no pairs of tensors
        return False
    a_at, a_scales_at, b_at, b_scales_at = x.data_ptr(), x_scales.data_ptr(), y.data_ptr(), y_scales.data_ptr()
    d_at, layout_at = d.data_ptr(), 0 if layout is None else layout.data_ptr()
    if (a_at | a_scales_at | b_at | d_at) & 15 or not (a_at and a_scales_at and b_at and b_scales_at and d_at):
        return False
    if layout is not None and not layout_at:
        return False
    if launcher.has_others and torch._C._cuda_getDevice() != launcher.index:  # pyright: ignore
        return False
    stream = launcher.current_stream(launcher.index)
    if stream != launcher.stream:
        launcher.change_stream(stream)
    counter = (
        0 if launcher.counters is None else launcher.counters.take(stream)
    )  # which may warn, and run what hears it
    words = launcher.words
    words[_A] = a_at
    words[_A_SCALES] = a_scales_at
    words[_B] = b_at
    words[_P_B_SCALES] = b_scales_at
    words[_D] = words[_P_D] = d_at
    if layout is not None:
        words[_P_LAYOUT] = layout_at
        launcher.numbers[_P_COUNTER] = counter
    launcher.used = True
    launchers.last = launcher
    result = launcher.launch(launcher.config, launcher.kernel, launcher.parameters, 0)
    if result[0] is not launcher.success:
        check(result, f"launching {launcher.plan}")
    return True


def launch(plan: Plan, operands: Operands, option: Any = None, settings_now: Config | None = None) -> None:
    """Queues the kernel on the current stream of the operands' device.

    option: what tells the problem from others whose operands are laid out alike, for `again`; None: all of it.
    settings_now: those that the plan was made for.
    Raises: CompileError, LaunchError.
    """
    index = operands.d.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(plan, operands, option, settings_now)
    o, problem = operands, plan.problem
    a_scales, b_scales = mn_major(o.a_scales), mn_major(o.b_scales) if plan.tile.column_scales else o.b_scales
    c, d = o.c, o.d
    if c is not None and (c.stride() != d.stride() or c.data_ptr() % 16):  # the kernel has d's strides for it
        c = torch.empty_strided(d.shape, d.stride(), dtype=d.dtype, device=d.device).copy_(c)
    if a_scales is not o.a_scales or b_scales is not o.b_scales or c is not o.c:
        o = o._replace(a_scales=a_scales, b_scales=b_scales, c=c)
    if option is None:
        option = problem.kind, problem.expected_m, problem.alignment, problem.column_scales, o.clear_padding
    tensors = [x for x in (o.a, o.a_scales, o.b, o.b_scales, o.d, o.layout) if x is not None]
    launchers = _thread.launchers_for(settings_now or config.current())
    key = o.a.numel(), o.b.numel(), option
    launcher = launchers.find(key, plan, tensors) or launchers.add(key, _Launcher(plan, o, option, guard(tensors)))
    addresses = [0 if x is None else x.data_ptr() for x in (o.a, o.a_scales, o.b, o.b_scales, o.d, o.layout, o.c)]
    launchers.last = launcher
    launcher(*addresses)


def prepare(tile: Tile | Strip, kind: Kind, device_index: int) -> None:
    """Compiles and loads what a launch needs, and launches nothing. Raises: CompileError, LaunchError."""
    key = (tile, kind, device_index, settings.get("DG_JIT_DEBUG"))
    if key in _prepared:
        return
    with torch.cuda.device(device_index):
        bind_context()
        kernel_for(tile, device_index)
        prepare_transposition(device_index)  # for scales that are not laid out yet
        if kind in (Kind.K_GROUPED, Kind.K_ENDS):
            _small_kernel(describing_source(), device_index)
        if kind == Kind.CONTIGUOUS and settings.get("DG_JIT_DEBUG"):
            _small_kernel(reporting_source(), device_index)
    _prepared.add(key)


class _Launcher:
    """A launch with all decided but the addresses and the stream. For one thread: it changes its arguments in place.

    fits: whether tensors are laid out as those that it was made for; fits_again: the same, False where the addresses
    and the kernel are not all there is to it. option: as given to launch, until it is forgotten. next: what was
    launched after it the last time. has_others: whether there are other devices than its own, `index`.
    """

    def __init__(self, plan: Plan, o: Operands, option: Any, fits: Callable[..., bool]) -> None:
        cuda, tile, kind = driver(), plan.tile, plan.problem.kind
        self.plan, self.fits, self.option = plan, fits, option
        self.used, self.next = False, self
        self.index, self._device = o.d.device.index, o.d.device
        self.has_others = torch.cuda.device_count() > 1
        self.launch, self.success, self.kernel = (
            cuda.cuLaunchKernelEx,
            cuda.CUresult.CUDA_SUCCESS,
            kernel_for(tile, self.index),
        )
        self._args, self.words, encoded = _args(cuda, plan, o)
        self.numbers = self.words.cast("B").cast("I")
        self._pointer = (ctypes.c_void_p * 1)(ctypes.addressof(self._args))
        self.parameters = ctypes.addressof(self._pointer)
        maps = {name: cuda.CUtensorMap(_ptr=ctypes.addressof(self._args) + _word(_Args, name) * 8) for name in encoded}
        by_hand = all(_begins_with_address(cuda, x, self.words[_word(_Args, name) :][:16]) for name, x in maps.items())
        self._maps = {} if by_hand else maps  # those that the driver has to move
        self.config = _launch_config(cuda, plan.ctas, tile.threads, plan.smem_bytes, plan.cluster, plan.pdl)
        self.current_stream = torch._C._cuda_getCurrentRawStream  # pyright: ignore
        self.change_stream(0)
        self.counters = _counters_of(tile, self.index) if plan.claims else None
        self._before: Callable[[int], None] | None = None
        if kind == Kind.CONTIGUOUS and settings.get("DG_JIT_DEBUG"):
            self._before = self._report
            self._small = _small_kernel(reporting_source(), self.index)
            self._small_config = _launch_config(cuda, 1, 1024, 0, 1, plan.pdl)
        if kind in (Kind.K_GROUPED, Kind.K_ENDS):
            self._before = self._describe
            self._small = _small_kernel(describing_source(), self.index)
            self._small_config = _launch_config(cuda, 1, 32, 0, 1, plan.pdl)
        plain = by_hand and self._before is None and not tile.column_scales
        self.fits_again = fits if plain else _never

    def __call__(self, a: int, a_scales: int, b: int, b_scales: int, d: int, layout: int = 0, c: int = 0) -> None:
        """Launches, with operands at these addresses (0: there is none).

        All are written every time, so nothing that an interrupt leaves half done is ever taken for known.
        """
        stream = self.current_stream(self.index)
        if stream != self.stream:
            self.change_stream(stream)
        counter = 0 if self.counters is None else self.counters.take(stream)  # which may warn: first
        words = self.words
        if self._maps:
            self._move(a=a, a_scales=a_scales, b=b, b_scales=b_scales, d=d)
        else:
            words[_A], words[_A_SCALES], words[_B], words[_B_SCALES], words[_D] = a, a_scales, b, b_scales, d
        words[_P_B_SCALES], words[_P_D], words[_P_LAYOUT], words[_P_C] = b_scales, d, layout, c
        self.numbers[_P_COUNTER] = counter
        if self._before is not None:
            words[_P_A], words[_P_B] = a, b
            self._before(stream)
        check(self.launch(self.config, self.kernel, self.parameters, 0), f"launching {self.plan}")

    def change_stream(self, stream: int) -> None:
        self.config.hStream = stream
        self.stream = stream

    def _move(self, **addresses: int) -> None:
        for name, tensor_map in self._maps.items():
            check(driver().cuTensorMapReplaceAddress(tensor_map, addresses[name]), "moving a tensor's description")

    def _report(self, stream: int) -> None:
        p, problem = self.plan.problem, self._args.problem
        values = (ctypes.c_uint64(problem.layout), *(ctypes.c_uint32(x) for x in (p.m, p.groups, p.alignment)))
        parameters = (ctypes.c_void_p * 4)(*(ctypes.addressof(value) for value in values))
        self._queue_small(stream, ctypes.addressof(parameters))

    def _describe(self, stream: int) -> None:
        size = self.plan.problem.groups * 2 * MAP_BYTES
        maps = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._args.problem.maps = maps.data_ptr()
        self._queue_small(stream, self.parameters)

    def _queue_small(self, stream: int, parameters: int) -> None:
        self._small_config.hStream = stream
        check(self.launch(self._small_config, self._small, parameters, 0), f"preparing for {self.plan}")


def _begins_with_address(cuda: Any, tensor_map: Any, words: Any) -> bool:
    """Whether all that the driver changes when it moves a tensor map is the first of its words: to the address.

    Then it can be moved without a call. What else a map holds is the driver's own business.
    """
    rest, move = words[1:].tolist(), cuda.cuTensorMapReplaceAddress
    return all(
        not int(move(tensor_map, x)[0]) and words.tolist() == [x, *rest] for x in (16, 0x1FFF_FFFF_FFF0, words[0])
    )


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


class _Launchers:
    """What a thread has launched with some settings: by sizes and option, bounded.

    If there are too many, the oldest goes that has not been used again since it was last passed over.
    """

    def __init__(self, settings_now: Config = _FORGOTTEN) -> None:
        self.settings = settings_now
        self.known: dict[Any, tuple[_Launcher, ...]] = {}
        self.last: Any = None

    def find(self, key: Any, plan: Plan, tensors: list[torch.Tensor]) -> _Launcher | None:
        for launcher in self.known.get(key, ()):
            if launcher.plan is plan and launcher.fits(*tensors):
                launcher.used = True
                return launcher
        return None

    def add(self, key: Any, launcher: _Launcher) -> _Launcher:
        alike = (launcher, *self.known.pop(key, ()))
        self._forget(alike[MAX_ALIKE:])
        while len(self.known) >= MAX_LAUNCHERS:
            oldest = next(iter(self.known))
            launchers = self.known.pop(oldest)
            if any(each.used for each in launchers):
                self.known[oldest] = launchers
                for each in launchers:
                    each.used = False
            else:
                self._forget(launchers)
        self.known[key] = alike[:MAX_ALIKE]
        return launcher

    def _forget(self, launchers: tuple[_Launcher, ...]) -> None:
        for each in launchers:
            each.option, each.next = _FORGOTTEN, each


class _Thread(threading.local):
    """launchers: a thread's own, for the settings that it launched with last."""

    launchers = _Launchers()

    def __init__(self) -> None:
        self._of: dict[Config, _Launchers] = {}

    def launchers_for(self, settings_now: Config) -> _Launchers:
        if self.launchers.settings is not settings_now:
            if not self._of:
                bind_context()
            self._of[settings_now] = self.launchers = self._of.pop(settings_now, None) or _Launchers(settings_now)
            if len(self._of) > MAX_SETTINGS:
                self._of.pop(next(iter(self._of)))
        return self.launchers


_thread = _Thread()


_lock = threading.Lock()
_kernels: dict[tuple[Tile | Strip, int, bool], Any] = {}
_small_kernels: dict[tuple[str, int], Any] = {}
_prepared: set[tuple[Tile | Strip, Kind, int, bool]] = set()
_counters: dict[tuple[Tile | Strip, int], _Counters] = {}


def _forget() -> None:
    """What a process has of its parent's is of no use to it: contexts, and locks that nobody will release."""
    global _thread, _lock
    _thread, _lock = _Thread(), threading.Lock()
    for known in (_kernels, _small_kernels, _prepared, _counters):
        known.clear()


os.register_at_fork(after_in_child=_forget)


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
        if not stream:  # the default one, which is never captured
            unique = _DEFAULT_STREAM
        elif torch.cuda.is_current_stream_capturing():
            return self._another()
        else:  # unlike its handle, a stream's id is never that of another one, before or after
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


def _args(cuda: Any, plan: Plan, o: Operands) -> tuple[_Args, Any, list[str]]:
    """The kernel's arguments, the same as words of 8 bytes, and the operands that it knows by a tensor map."""
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
    start = -ctypes.addressof(memory) % 128  # a tensor map asks for 64, newer ones for 128
    args = _Args.from_buffer(memory, start)
    words = memoryview(memory).cast("B")[start : start + ctypes.sizeof(_Args)].cast("Q")
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
    return args, words, encoded


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
