"""What a call costs the CPU, from calling to being back, beside others: `python -m bench.host`.

Method: graph.host_us. Operands change with every call: each of several sets lies elsewhere, and where it says
"changing M" has other rows. Before they are timed, our calls' results are held against those of the first one. Peers:
cuBLASLt through torch, a Triton kernel that does nothing, what the CUDA driver alone takes to launch one, and, if
DEEP_GEMM_PEER names the folder that sgl-deep-gemm was installed into (bench/run.py), that fork of DeepSeek's library,
in a process of its own after the others.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import deep_gemm
from bench import grouped
from bench.graph import Case, host_us
from bench.peer import Peer
from bench.run import commit, machine, on_hopper, slug, versions
from bench.table import FORK, RESULTS
from deep_gemm.runtime.compiler import Source, compile
from deep_gemm.runtime.driver import check, driver, load

SETS, BATCH, BATCHES = 8, 200, 60
N, K = 4096, 7168
MS = (128, 1, 64, 96, 16, 100, 32, 7)
SHAPES = {
    f"fp8_gemm_nt 128x{N}x{K}": grouped.Shape(grouped.DENSE, 1, 128, N, K, 128),
    "m_grouped_fp8_gemm_nt_contiguous 8x128x512x1024": grouped.Shape(grouped.CONTIGUOUS, 8, 128, 512, 1024, 128),
    "m_grouped_fp8_gemm_nt_masked 8x128x512x1024": grouped.Shape(grouped.MASKED, 8, 128, 512, 1024, 90),
}


def case_of(sets: Sequence[grouped.Operands]) -> Case:
    return grouped.call(sets[0])[0], [grouped.call(x)[1] for x in sets]


def ours() -> dict[str, Case]:
    """Our calls, by name."""
    sets = {name: [grouped.Operands.random(shape) for _ in range(SETS)] for name, shape in SHAPES.items()}
    name = f"fp8_gemm_nt, changing M, {N}x{K}"
    sets[name] = [grouped.Operands.random(grouped.Shape(grouped.DENSE, 1, m, N, K, m)) for m in MS]
    calls = {f"deep_gemm.{name}": case_of(each) for name, each in sets.items()}
    check_all(calls, [[x.d for x in each] for each in sets.values()])
    rows = torch.randn(SETS, 128, K, device="cuda").bfloat16()
    dense = calls[f"deep_gemm.fp8_gemm_nt 128x{N}x{K}"][1]
    return calls | {
        f"deep_gemm.per_token_cast_to_fp8 128x{K}": (deep_gemm.per_token_cast_to_fp8, [(x,) for x in rows]),
        f"torch.ops.deep_gemm.fp8_gemm_nt 128x{N}x{K}": (
            torch.ops.deep_gemm.fp8_gemm_nt,
            [(*a, *b) for a, b, _ in dense],
        ),
    }


def check_all(calls: dict[str, Case], results: list[list[torch.Tensor]]) -> None:
    """Warm calls must give the bits that first ones gave. Raises: RuntimeError."""
    for (name, (function, sets)), outputs in zip(calls.items(), results, strict=True):
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


def fork(folder: Path) -> dict[str, list[float]]:
    """The times of the fork's calls."""
    peer = Peer(folder)
    try:
        asked = {"seed": 0, "sets": SETS, "pdl": False, "batch": BATCH, "batches": BATCHES}
        return {
            f"{FORK}.{name}": peer.ask({"family": shape.family, "shape": shape.numbers, **asked})["us"]
            for name, shape in SHAPES.items()
        }
    finally:
        peer.close()


def main() -> int:
    parser = argparse.ArgumentParser("bench.host", description="Times what calls cost the CPU.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    if not on_hopper("host"):
        return 1
    started, gpu = datetime.now(timezone.utc), machine()
    about: dict[str, Any] = {"time": started.isoformat(timespec="seconds"), "machine": gpu, "versions": versions()}
    gc.collect()
    times = host_us(ours() | peers(), BATCH, BATCHES)
    if folder := os.environ.get("DEEP_GEMM_PEER"):
        times |= fork(Path(folder))
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
