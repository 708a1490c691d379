"""How long a call takes, as DeepGEMM's users measure it. `make bench` takes more care: clocks, operands, turns."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import overload

import torch

from .. import settings
from ..errors import InvalidInputError, UnsupportedDeviceError

_FLUSH_BYTES = 256 << 20  # four times what the L2 cache of an H200 holds


def bench(fn: Callable[[], object], num_warmups: int = 5, num_tests: int = 10, high_precision: bool = False) -> float:
    """Seconds per call of fn: the mean of num_tests calls in a row, after num_warmups that are not counted.

    With a GPU, what its current stream does between two events; L2 is emptied before the first call, not between calls.
    Without a GPU, the time that passes.

    Args:
        fn: what is called, without arguments.
        num_warmups: calls that are not counted.
        num_tests: calls that are.
        high_precision: a large multiplication goes first, so that the GPU does not wait for the CPU to launch.

    Raises: InvalidInputError for a num_tests below 1.
    """
    if num_tests < 1:
        raise InvalidInputError(f"num_tests is {num_tests}, expected at least 1: nothing is measured otherwise")
    for _ in range(num_warmups):
        fn()
    if not torch.cuda.is_available():
        start_s = time.perf_counter()
        for _ in range(num_tests):
            fn()
        return (time.perf_counter() - start_s) / num_tests
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _empty_l2()
    if high_precision:
        x = torch.ones(8192, 8192, device="cuda")
        torch.mm(x, x)
    start.record()
    for _ in range(num_tests):
        fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_tests


@overload
def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str,
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], object] | None = None,
) -> float: ...
@overload
def bench_kineto(
    fn: Callable[[], object],
    kernel_names: tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], object] | None = None,
) -> tuple[float, ...]: ...
def bench_kineto(
    fn: Callable[[], object],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    with_multiple_kernels: bool = False,
    barrier: Callable[[], object] | None = None,
) -> float | tuple[float, ...]:
    """Seconds that the GPU spends per call of fn in the kernels whose name contains `kernel_names`, by torch.profiler.

    Args:
        fn: called 1 + 2 * num_tests times; the last num_tests are counted.
        kernel_names: such as "fp8_gemm"; several give a tuple, in their order. 0.0 where no kernel has the name.
        suppress_kineto_output: what the profiler prints goes nowhere, and all else on file descriptors 1 and 2 with it.
        trace_path: where to write a trace for chrome://tracing.
        flush_l2: L2 is emptied before every call.
        with_multiple_kernels: the times of several kernels of one name are added up; else they are an error.
        barrier: called before every call of fn, where several GPUs have to start at once.

    With DG_USE_NVIDIA_TOOLS set, fn is called once, nothing is measured, and every time is 1.0.

    Raises:
        UnsupportedDeviceError: no GPU.
        InvalidInputError: a name that several kernels have.
    """
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "bench_kineto measures kernels, and PyTorch sees no CUDA device: call bench, which measures the CPU too"
        )
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    fn()
    if settings.get("DG_USE_NVIDIA_TOOLS"):
        seconds = (1.0,) * len(names)
    else:
        with _silence() if suppress_kineto_output else contextlib.nullcontext():
            profiler = _profile(fn, num_tests, flush_l2, barrier)
        if trace_path is not None:
            profiler.export_chrome_trace(trace_path)
        events = [e for e in profiler.events() or () if e.device_type.name == "CUDA"]
        kernels = [(e.name, e.time_range.elapsed_us()) for e in events]
        seconds = tuple(_sum_us(kernels, name, with_multiple_kernels) / 1e6 / num_tests for name in names)
    return seconds[0] if isinstance(kernel_names, str) else seconds


def _empty_l2() -> None:
    torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()


def _profile(
    fn: Callable[[], object], num_tests: int, flush_l2: bool, barrier: Callable[[], object] | None
) -> torch.profiler.profile:
    """Two rounds of num_tests calls; the profiler starts up in the first and records the second."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
        acc_events=True,
    ) as profiler:
        for _ in range(2):
            for _ in range(num_tests):
                if flush_l2:
                    _empty_l2()
                if barrier is not None:
                    barrier()
                fn()
            torch.cuda.synchronize()
            profiler.step()
    return profiler


def _sum_us(kernels: Iterable[tuple[str, float]], wanted: str, several: bool) -> float:
    # "gemm_" is how DeepGEMM's tests find its kernels, fp8_gemm_...; ours is called fp8_gemm.
    found = [(name, us) for name, us in kernels if wanted in f"{name}_"]
    names = sorted({name for name, _ in found})
    if len(names) > 1 and not several:
        raise InvalidInputError(
            f"{wanted!r} is in the names of {len(names)} kernels ({', '.join(names)}), expected one: pass more of the "
            "name, or with_multiple_kernels=True"
        )
    return sum(us for _, us in found)


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """Redirects the file descriptors: the profiler is C++ and knows nothing of sys.stdout."""
    with contextlib.ExitStack() as restore, open(os.devnull, "w") as nowhere:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            saved = os.dup(descriptor)
            restore.callback(os.close, saved)
            restore.callback(os.dup2, saved, descriptor)
            os.dup2(nowhere.fileno(), descriptor)
        yield
