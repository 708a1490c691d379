"""What a call costs the CPU, from calling to being back, beside others: `python -m bench.host`.

Every call is timed by itself, on the default stream, in batches after which the GPU is waited for, so that the queue
never is full. Implementations take turns. Operands change with every call: each of several sets lies elsewhere, and
where it says "changing M" has other rows. Before they are timed, our calls' results are held against a first one's.
Garbage collection is left on. Peers: cuBLASLt through torch, a Triton kernel that does nothing, what the CUDA driver
alone takes to launch one, and, if DEEP_GEMM_PEER names the folder that sgl-deep-gemm was installed into (bench/run.py),
that fork of DeepSeek's library.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

import deep_gemm
from bench.run import commit, machine, on_hopper, slug, versions
from bench.table import RESULTS
from deep_gemm.runtime.compiler import Source, compile
from deep_gemm.runtime.driver import check, driver, load

Case = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]  # a function, and the arguments of each call in turn
SETS, BATCH, BATCHES = 8, 200, 60
N, K, GROUPS = 4096, 7168, 8
MS = (128, 1, 64, 96, 16, 100, 32, 7)


def dense_operands(m: int, n: int = N, k: int = K) -> tuple[Any, Any, torch.Tensor]:
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(m, k, device="cuda"), False)
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(n, k, device="cuda"), False)
    a = a[0], deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    return a, b, torch.empty(m, n, dtype=torch.bfloat16, device="cuda")


def ours() -> dict[str, Case]:
    """Our calls, by name."""
    same = [dense_operands(128) for _ in range(SETS)]
    changing = [dense_operands(m) for m in MS]
    small = 512, 1024
    groups = [torch.randn(GROUPS, *small, device="cuda") for _ in range(SETS)]
    weights = [deep_gemm.per_block_cast_to_fp8(x, False) for x in groups]
    rows = [deep_gemm.per_token_cast_to_fp8(torch.randn(GROUPS, 128, small[1], device="cuda"), False) for _ in groups]
    rows = [(x, deep_gemm.get_mn_major_tma_aligned_tensor(scales)) for x, scales in rows]
    flat = [(x.view(-1, small[1]), s.reshape(-1, s.shape[-1])) for x, s in rows]
    flat = [(x, deep_gemm.get_mn_major_tma_aligned_tensor(scales)) for x, scales in flat]
    d = [torch.empty(GROUPS, 128, small[0], dtype=torch.bfloat16, device="cuda") for _ in groups]
    counts = [torch.full((GROUPS,), 100, dtype=torch.int32, device="cuda") for _ in groups]
    layout = [torch.arange(GROUPS * 128, device="cuda").div(128, rounding_mode="floor").int() for _ in groups]
    masked = list(zip(rows, weights, d, counts, [100] * SETS, strict=True))
    contiguous = [(a, b, x.view(-1, small[0]), y) for a, b, x, y in zip(flat, weights, d, layout, strict=True)]
    rows16 = torch.randn(SETS, 128, K, device="cuda").bfloat16()
    sizes = f"{GROUPS}x128x{small[0]}x{small[1]}"
    name = f"deep_gemm.fp8_gemm_nt 128x{N}x{K}"
    calls: dict[str, Case] = {
        name: (deep_gemm.fp8_gemm_nt, same),
        f"deep_gemm.fp8_gemm_nt, changing M, {N}x{K}": (deep_gemm.fp8_gemm_nt, changing),
        f"deep_gemm.m_grouped_fp8_gemm_nt_contiguous {sizes}": (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, contiguous),
        f"deep_gemm.m_grouped_fp8_gemm_nt_masked {sizes}": (deep_gemm.m_grouped_fp8_gemm_nt_masked, masked),
        f"deep_gemm.per_token_cast_to_fp8 128x{K}": (deep_gemm.per_token_cast_to_fp8, [(x,) for x in rows16]),
        f"torch.ops.deep_gemm.fp8_gemm_nt 128x{N}x{K}": (
            torch.ops.deep_gemm.fp8_gemm_nt,
            [(*a, *b) for a, b, _ in same],
        ),
    }
    check_all(calls, [[d for *_, d in same], [d for *_, d in changing], d, d])
    return calls


def check_all(calls: dict[str, Case], results: list[list[torch.Tensor]]) -> None:
    """Warm calls must give the bits that first ones gave. Raises: RuntimeError."""
    for (name, (function, sets)), outputs in zip(calls.items(), results, strict=False):
        first: list[torch.Tensor] = []
        for turn in range(3):
            for d in outputs:
                d.zero_()
            for args in sets:
                function(*args)
            if turn == 0:
                first = [d.clone() for d in outputs]
            if not all(torch.equal(x, d) and bool(d.any()) for x, d in zip(first, outputs, strict=True)):
                raise RuntimeError(f"{name}: a warm call gives other bits than the first")


def peers() -> dict[str, Case]:
    """The calls of others."""
    one = torch.ones((), device="cuda")
    a, b = (torch.randn(SETS, rows, K, device="cuda").to(torch.float8_e4m3fn) for rows in (128, N))
    a16, b16 = (torch.randn(SETS, rows, K, device="cuda").bfloat16() for rows in (128, N))
    d = torch.empty(SETS, 128, N, dtype=torch.bfloat16, device="cuda")
    scaled = torch._scaled_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def tensorwise(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        scaled(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True, out=d)

    def mm(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        torch.mm(a, b, out=d)

    return {
        f"torch._scaled_mm 128x{N}x{K}": (tensorwise, [(x, y.t(), z) for x, y, z in zip(a, b, d, strict=True)]),
        f"torch.mm 128x{N}x{K}": (mm, [(x, y.t(), z) for x, y, z in zip(a16, b16, d, strict=True)]),
        "cuLaunchKernelEx of cuda.bindings, nothing else": empty_launch(),
        **triton_launch(),
    }


def empty_launch() -> Case:
    """A launch with as many bytes of arguments as ours."""
    text = 'struct P { unsigned char x[832]; };\nextern "C" __global__ void nothing(const __grid_constant__ P p) {}'
    cuda = driver()
    kernel = cuda.CUfunction(int(load(compile(Source("nothing.cu", text)).image, "nothing", "nothing")))
    arguments = ctypes.create_string_buffer(832)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    config, address = cuda.CUlaunchConfig(), ctypes.addressof(parameters)
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX, config.hStream = 32, 0
    check(cuda.cuLaunchKernelEx(config, kernel, address, 0), "launching nothing")
    _kept.extend((arguments, parameters))
    return cuda.cuLaunchKernelEx, [(config, kernel, address, 0)]


_kept: list[Any] = []  # what addresses point to


def triton_launch() -> dict[str, Case]:
    try:
        kernel = import_module("bench.host_triton").nothing
    except ImportError:
        return {}
    sets = [[torch.empty(16, device="cuda") for _ in range(3)] for _ in range(SETS)]
    return {"a Triton kernel that does nothing, 3 tensors and an int": (kernel[(1,)], [(*x, 16) for x in sets])}


def times_us(implementations: dict[str, Case]) -> dict[str, list[float]]:
    """Of every single call, warmed up."""
    clock = time.perf_counter_ns
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for batch in range(BATCHES + 5):
        for name, (function, sets) in implementations.items():
            taken: list[int] = []
            torch.cuda.synchronize()
            for _, args in zip(range(BATCH), cycle(sets), strict=False):
                begun = clock()
                function(*args)
                taken.append(clock() - begun)
            if batch >= 5:
                times[name] += [each / 1e3 for each in taken]
    torch.cuda.synchronize()
    nothing = [clock() - clock() for _ in range(1000)]
    overhead = -statistics.median(nothing) / 1e3
    return {name: [each - overhead for each in every] for name, every in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser("bench.host", description="Times what calls cost the CPU.")
    parser.add_argument("--output", type=Path, default=RESULTS / "host", help="folder for the results")
    args = parser.parse_args()
    if not on_hopper("host"):
        return 1
    started, gpu = datetime.now(timezone.utc), machine()
    about: dict[str, Any] = {"time": started.isoformat(timespec="seconds"), "machine": gpu, "versions": versions()}
    gc.collect()
    times = times_us(ours() | peers())
    rows = [
        {
            "call": name,
            "us_median": round(statistics.median(every), 2),
            "us_p99": round(statistics.quantiles(every, n=100)[98], 2),
            "us_min": round(min(every), 2),
        }
        for name, every in times.items()
    ]
    for row in rows:
        print(f"{row['us_median']:7.2f} us  p99 {row['us_p99']:7.2f}  min {row['us_min']:6.2f}  {row['call']}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{started:%Y-%m-%d}-{slug(gpu['gpu'])}-host.json"
    path.write_text(json.dumps(about | commit() | {"calls_each": BATCH * BATCHES, "rows": rows}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
