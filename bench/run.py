"""Measures this GPU: our GEMMs beside others, over the shapes of DeepSeek-V3. `make bench`, or `python -m bench.run`.

Method. A CUDA graph holds many launches over several sets of operands, so many that nothing is found in L2. All
implementations of a shape take turns: an idle pause, one replay to warm up, and one that is timed. The figure is the
median of nine turns, in us per launch ("burst": the clock is high after the pause). For M = 4096 every implementation
also runs alone for a second and a half without a pause, and the second half of it is reported ("sustained": power
limits the clock). Before it is timed, a shape is multiplied through the graph into poisoned outputs, and samples of
the first and the last set are held against the bit-exact reference: with one wrong bit the row has an error, no time.

Dense shapes stand beside cuBLASLt. If DEEP_GEMM_PEER names the folder that the PyPI package sgl-deep-gemm is in, a fork
of DeepSeek's DeepGEMM (bench/peer.py; it needs nvcc), the grouped ones stand beside it, and so do the dense ones of
--peer-m, where launches overlap with its set_pdl(True); else the grouped ones stand beside cuBLASLt in a loop:

    pip install --no-deps --target FOLDER sgl-deep-gemm==0.1.5 apache-tvm-ffi==0.1.11
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch

import deep_gemm
from bench import grouped
from bench.graph import capture, sustained_us, turn_us
from bench.peer import Peer
from bench.table import (
    DENSE,
    DENSE_PDL,
    FORK,
    LOOP,
    OURS,
    PEER,
    RESULTS,
    ROOT,
    UPSTREAM_MS,
    Row,
    family_means,
    faster_than_upstream,
    geometric_means,
    other,
)
from deep_gemm import reference
from deep_gemm.cli import LAYERS
from deep_gemm.gemm import plan_of
from deep_gemm.problem import Kind, Pair, Problem
from deep_gemm.quantize import per_block_cast_to_fp8, per_token_cast_to_fp8

FAMILIES = (DENSE, DENSE_PDL, grouped.CONTIGUOUS, grouped.MASKED)
MS = (1, 16, 64, 128, 4096)
SUSTAINED_M = 4096
TURNS = 9
REPLAY_US = 1500


@dataclass(frozen=True)
class Operands:
    """One set. a [M, K] and b [N, K] in both formats; the scales as each implementation wants them; d [M, N] BF16."""

    a: torch.Tensor
    a_scales: torch.Tensor
    a_scales_dense: torch.Tensor  # M-major without padding, as cuBLASLt reads them
    b: torch.Tensor
    b_scales: torch.Tensor
    b_scales_padded: torch.Tensor  # [align(ceil(K/128), 4), ceil(N/128)], K-major, as cuBLASLt reads it
    one: torch.Tensor
    a_bf16: torch.Tensor
    b_bf16: torch.Tensor
    d: torch.Tensor

    @classmethod
    def random(cls, problem: Problem) -> Operands:
        a_bf16 = torch.randn(problem.m, problem.k, device="cuda", dtype=torch.bfloat16)
        b_bf16 = torch.randn(problem.n, problem.k, device="cuda", dtype=torch.bfloat16)
        a, a_scales = per_token_cast_to_fp8(a_bf16, False)
        b, b_scales = per_block_cast_to_fp8(b_bf16, False)
        k_blocks = b_scales.shape[1]
        padded = torch.zeros(b_scales.shape[0], -(-k_blocks // 4) * 4, device="cuda")
        padded[:, :k_blocks] = b_scales
        return cls(
            a=a,
            a_scales=deep_gemm.get_mn_major_tma_aligned_tensor(a_scales),
            a_scales_dense=a_scales.t().contiguous().as_strided(a_scales.shape, (1, problem.m)),
            b=b,
            b_scales=b_scales,
            b_scales_padded=padded.t(),
            one=torch.ones((), device="cuda"),
            a_bf16=a_bf16,
            b_bf16=b_bf16,
            d=torch.empty(problem.m, problem.n, device="cuda", dtype=torch.bfloat16),
        )


def run_ours(x: Operands) -> torch.Tensor:
    deep_gemm.fp8_gemm_nt((x.a, x.a_scales), (x.b, x.b_scales), x.d)
    return x.d


def run_tensorwise(x: Operands) -> torch.Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        x.a, x.b.t(), x.one, x.one, out_dtype=torch.bfloat16, use_fast_accum=True, out=x.d
    )


def run_block(x: Operands) -> torch.Tensor:
    recipe = torch.nn.functional.ScalingType
    return torch.nn.functional.scaled_mm(
        x.a,
        x.b.t(),
        x.a_scales_dense,
        recipe.BlockWise1x128,
        x.b_scales_padded,
        recipe.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def run_bf16(x: Operands) -> torch.Tensor:
    return torch.mm(x.a_bf16, x.b_bf16.t(), out=x.d)


IMPLEMENTATIONS: dict[str, Callable[[Operands], torch.Tensor]] = {
    OURS: run_ours,
    PEER: run_tensorwise,
    "cublaslt_block": run_block,
    "bf16": run_bf16,
}


def counts(problem: Problem, l2_bytes: int) -> tuple[int, int]:
    """How many sets of operands, and how many launches in a graph: all sets equally often, for about REPLAY_US."""
    sets = max(2, -(-4 * l2_bytes // problem.bytes) + 1)
    launch_us = 2 + max(problem.flop / 1.3e9, problem.bytes / 4e6)
    return sets, sets * max(1, round(REPLAY_US / (launch_us * sets)))


def wrong_bits(a: Pair, b: Pair, d: torch.Tensor, most: tuple[int, int] = (32, 1024), split: int = 1) -> int:
    """How many of up to so many rows x columns of d, picked at random, differ from the bit-exact reference."""
    rows, columns = (torch.randperm(size, device=d.device)[:limit] for size, limit in zip(d.shape, most, strict=True))
    few_a, few_b = (x.view(torch.uint8)[i].view(x.dtype) for x, i in ((a[0], rows), (b[0], columns)))
    scales = a[1][rows], b[1][columns // 128]
    total = reference.fp8_gemm_nt_per_column_scales(few_a, scales[0], few_b, scales[1], exact=True, split=split)
    return int((d[rows][:, columns].view(torch.int16) != reference.to_bf16(total).view(torch.int16)).sum())


def wrong_in_groups(x: grouped.Operands) -> int:
    """wrong_bits of up to eight groups, and rows of theirs that are not real but were written: d is NaN before."""
    a, a_scales, d = map(x.by_group, (x.a, x.a_scales, x.d))
    wrong = 0
    for g in sorted({*range(0, len(x.counts), -(-len(x.counts) // 7)), len(x.counts) - 1}):
        real = slice(x.counts[g])
        wrong += wrong_bits((a[g, real], a_scales[g, real]), (x.b[g], x.b_scales[g]), d[g, real], (32, 256))
        wrong += int((~d[g, x.counts[g] :].isnan()).any(1).sum())
    return wrong


def take_turns(row: Row, implementations: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Puts medians and spreads into the row. Returns the medians, in us per graph."""
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for _, (name, turn) in product(range(turns), implementations.items()):
        times[name].append(turn())
    burst = {name: statistics.median(values) for name, values in times.items()}
    row["us"] |= {name: round(us / row["launches"], 3) for name, us in burst.items()}
    row["spread"] = {name: round((max(values) - min(values)) / burst[name], 4) for name, values in times.items()}
    return burst


def measure(
    problem: Problem, l2_bytes: int, turns: int, sustained: bool, peer: Peer | None = None, pdl: bool = False
) -> Row:
    """A dense row. pdl: our launches, and the peer's, overlap with the ones before."""
    row: Row = {
        "family": DENSE_PDL if pdl else DENSE,
        "shape": [problem.m, problem.n, problem.k],
        "us": dict.fromkeys(IMPLEMENTATIONS),
        "flop": problem.flop,
        "bytes": problem.bytes,
    }
    sets_count, row["launches"] = counts(problem, l2_bytes)
    sets = [Operands.random(problem) for _ in range(sets_count)]
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    deep_gemm.set_pdl(pdl)
    for name, run in IMPLEMENTATIONS.items():
        try:
            graphs[name] = capture(run, sets, row["launches"])
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            if name == OURS:
                raise
            row.setdefault("refused", {})[name] = str(error).splitlines()[0]
    split = plan_of(problem).split
    deep_gemm.set_pdl(False)
    for x in sets:
        x.d.fill_(float("nan"))
    graphs[OURS].replay()
    if wrong := sum(wrong_bits((x.a, x.a_scales), (x.b, x.b_scales), x.d, split=split) for x in (sets[0], sets[-1])):
        return row | {"error": f"{wrong} sampled elements differ from the exact reference"}

    turn_of: dict[str, Callable[[], float]] = {name: partial(turn_us, graph) for name, graph in graphs.items()}
    held_of: dict[str, Callable[[float], float]] = {
        name: partial(sustained_us, graph) for name, graph in graphs.items()
    }
    try:
        if peer:
            about = {"family": DENSE, "shape": row["shape"], "seed": 0, "pdl": pdl}
            peer.ask(about | {"sets": sets_count, "launches": row["launches"]})
            turn_of[FORK] = lambda: peer.ask("replay")["us"]
            held_of[FORK] = lambda burst_us: peer.ask({"burst_us": burst_us})["us"]
        burst = take_turns(row, turn_of, turns)
    except (RuntimeError, OSError) as error:
        if peer is None:
            raise
        row["us"][FORK], row["refused"] = None, row.get("refused", {}) | {FORK: str(error)}
        turn_of.pop(FORK, None)
        held_of.pop(FORK, None)
        burst = take_turns(row, turn_of, turns)
    if sustained and problem.m == SUSTAINED_M:
        row["us_sustained"] = dict.fromkeys(row["us"])
        for name, held in held_of.items():
            time.sleep(0.3)
            row["us_sustained"][name] = round(held(burst[name]) / row["launches"], 3)
    if peer and FORK in turn_of:
        peer.ask("free")
    return row


def work(shape: grouped.Shape) -> Problem:
    """The multiplication of the rows that are real, for its FLOP and bytes."""
    return Problem(sum(shape.counts), shape.n, shape.k, Kind.CONTIGUOUS, shape.groups)


def measure_grouped(shape: grouped.Shape, l2_bytes: int, turns: int, peer: Peer | None) -> Row:
    """A row of a grouped family; without a peer the second implementation is cuBLASLt in a loop."""
    problem, name = work(shape), FORK if peer else LOOP
    row: Row = {
        "family": shape.family,
        "shape": shape.numbers,
        "us": {OURS: None, name: None},
        "flop": problem.flop,
        "bytes": problem.bytes,
    }
    sets_count, row["launches"] = counts(problem, l2_bytes)
    torch.manual_seed(0)
    sets = [grouped.Operands.random(shape) for _ in range(sets_count)]
    graphs = {OURS: capture(grouped.run, sets, row["launches"])}
    for x in sets:
        x.d.fill_(float("nan"))
    graphs[OURS].replay()
    if wrong := wrong_in_groups(sets[0]) + wrong_in_groups(sets[-1]):
        return row | {"error": f"{wrong} sampled elements or rows differ from the exact reference"}
    if peer is None:
        graphs[LOOP] = capture(grouped.run_loop, sets, row["launches"])
    turn_of: dict[str, Callable[[], float]] = {name: partial(turn_us, graph) for name, graph in graphs.items()}
    torch.cuda.empty_cache()  # the peer's operands take as much memory again
    try:
        if peer:
            about = {"family": shape.family, "shape": shape.numbers, "seed": 0, "pdl": False}
            peer.ask(about | {"sets": sets_count, "launches": row["launches"]})
            turn_of[FORK] = lambda: peer.ask("replay")["us"]
        take_turns(row, turn_of, turns)
        if peer:
            peer.ask("free")
    except (RuntimeError, OSError) as error:
        row.setdefault("refused", {})[name] = str(error)
        take_turns(row, {OURS: turn_of[OURS]}, turns)
    return row


def output_of(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# A first call in a process of its own, after torch has started; prints seconds.
FIRST_CALL = """
import sys, time, torch
device = sys.argv[1]
a = torch.ones(64, 512).to(torch.float8_e4m3fn).to(device), torch.ones(64, 4, device=device)
b = torch.ones(256, 512).to(torch.float8_e4m3fn).to(device), torch.ones(2, 4, device=device)
d = torch.zeros(64, 256, dtype=torch.bfloat16, device=device)
start = time.perf_counter()
import deep_gemm
deep_gemm.fp8_gemm_nt(a, b, d)
d.cpu()
print(time.perf_counter() - start)
"""


def seconds_of(script: str, cache: str, *arguments: str) -> float:
    """What a script prints, run in a process of its own with that folder as cache of kernels."""
    environment = os.environ | {"DG_JIT_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-c", script, *arguments)
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def first_call_s(device: str = "cuda", turns: int = 3) -> dict[str, float]:
    """Seconds that the import and the first call take, the cache of kernels empty and then filled: medians."""
    taken: dict[str, list[float]] = {"empty_cache": [], "warm_cache": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as cache:
            for name in taken:
                taken[name].append(seconds_of(FIRST_CALL, cache, device))
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}


# Every kernel, on no more cores than asked for; prints seconds.
COMPILE_ALL = """
import os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
from deep_gemm.heuristics import kernels
from deep_gemm.runtime.compiler import compile_many
sources = [kernel.source() for kernel in kernels()][: int(sys.argv[2])]
start = time.perf_counter()
compile_many(sources)
print(time.perf_counter() - start)
"""


def compile_all_s(cores: int = 2, most: int = 1000) -> dict[str, float]:
    """Seconds that compiling every kernel (at most so many) takes, the cache of kernels empty."""
    with tempfile.TemporaryDirectory() as cache:
        return {"cores": cores, "seconds": round(seconds_of(COMPILE_ALL, cache, str(cores), str(most)), 1)}


def eager_call_us(calls: int = 400) -> dict[str, float]:
    """What a warm call costs the CPU, with two sets of operands in turn. The GPU is never far behind."""
    sets = [Operands.random(Problem(64, 2112, 7168)) for _ in range(2)]
    taken: list[float] = []
    for i in range(calls + 50):
        if i % 50 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run_ours(sets[i % 2])
        taken.append((time.perf_counter() - start) * 1e6)
    warm = sorted(taken[50:])
    return {"median": round(statistics.median(warm), 1), "p99": round(warm[len(warm) * 99 // 100], 1)}


def layout_share_of_copy(turns: int = 5) -> dict[str, float]:
    """Bytes per second at which scales get the GEMM's layout, beside a plain copy's. Nothing fits into L2."""
    m, blocks = 524288, 56
    inputs = {
        "K-major": torch.rand(m, blocks, device="cuda"),
        "K-major, 32 groups": torch.rand(32, m // 32, blocks, device="cuda"),
        "M-major, odd pitch": torch.rand(blocks, m + 1, device="cuda")[:, :m].mT,
    }
    source, plain = (torch.rand(m, blocks, device="cuda") for _ in range(2))
    shares: dict[str, float] = {}
    for name, x in inputs.items():
        graphs = capture(plain.copy_, [source], 4), capture(deep_gemm.get_mn_major_tma_aligned_tensor, [x], 4)
        taken = [[turn_us(graph) for graph in graphs] for _ in range(turns)]
        copied, ours = (statistics.median(us) for us in zip(*taken, strict=True))
        shares[name] = round(copied / ours, 3)
    return shares


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    fields = ("uuid", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory", "clocks.sm")
    lines = (output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader") or "").splitlines()
    line = next((line for line in lines if str(gpu.uuid) in line), "")  # of the GPU that torch calls 0
    reported = dict(zip(fields, line.split(", "), strict=False))
    reported.pop("uuid", None)
    return {"gpu": gpu.name, "sms": gpu.multi_processor_count, "l2_bytes": gpu.L2_cache_size, **reported}


def versions() -> dict[str, str | None]:
    def cublas() -> str | None:
        for major in (13, 12):  # torch has loaded one of them
            try:
                return str(ctypes.CDLL(f"libcublasLt.so.{major}").cublasLtGetVersion())
            except OSError:
                continue
        return None

    _, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
    return {
        "deep_gemm": deep_gemm.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cublaslt": cublas(),
        "nvrtc": f"{major}.{minor}",
    }


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether tracked files differ from it (None: no git here)."""
    git = ("git", "-C", str(Path(__file__).parent))
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    head = output_of(*git, "rev-parse", "HEAD") or os.environ.get("DEEP_GEMM_COMMIT") or "unknown"
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def line_of(row: Row) -> str:
    dense = row["family"] in (DENSE, DENSE_PDL)
    m, n, k = row["shape"] if dense else (0, 0, 0)
    head = (
        f"{m:5d} {n:6d} {k:6d}{' overlapping' * (row['family'] == DENSE_PDL)}"
        if dense
        else f"{row['family']:10} {', '.join(map(str, row['shape'])):27}"
    )
    if "error" in row:
        return f"{head}  {row['error']}"
    cells = [f"{us:9.2f}" if us else f"{'-':>9}" for us in row["us"].values()]
    ours, theirs = row["us"][OURS], row["us"][other(row)]
    ratio = f"{ours / theirs:7.3f}" if theirs else f"{'-':>7}"
    speed = f"{row['flop'] / ours / 1e6:7.0f} TF {row['bytes'] / ours / 1e3:6.0f} GB/s"
    held = row.get("us_sustained")
    tail = f"  sustained {held[OURS]:.2f} ({held[OURS] / held[PEER]:.3f})" if held else ""
    return f"{head} {' '.join(cells)} {ratio} {speed}{tail}"


def slug(gpu: str) -> str:
    return "-".join(gpu.removeprefix("NVIDIA ").lower().split())


def as_text(about: Row, rows: Sequence[Row]) -> str:
    """JSON with a line for each row, so that two files can be compared."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(about, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def on_hopper(program: str) -> bool:
    """Whether there is a GPU to measure; else says so."""
    found = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not found:
        print(f"{program}: needs a Hopper GPU (compute capability 9.0) and a CUDA build of torch", file=sys.stderr)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.run", description="Our GEMMs beside others on this GPU.")
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES), help="default: all")
    parser.add_argument("--m", type=int, nargs="+", default=list(MS), help="rows of a, dense")
    parser.add_argument("--n", type=int, nargs="+", help="only layers of these N")
    parser.add_argument("--k", type=int, nargs="+", help="only layers of these K")
    parser.add_argument("--peer-m", type=int, nargs="*", default=[SUSTAINED_M], help="rows that a peer multiplies, too")
    parser.add_argument("--quick", action="store_true", help="three turns instead of nine, nothing sustained")
    parser.add_argument("--no-sustained", action="store_true", help="no figures at load")
    parser.add_argument("--output", type=Path, help=f"folder for the results (default: {RESULTS}, for complete runs)")
    parser.add_argument("--note", default="", help="kept in the results file")
    args = parser.parse_args(argv)
    if not on_hopper("bench"):
        return 1

    peer_folder = os.environ.get("DEEP_GEMM_PEER")
    try:
        peer = Peer(Path(peer_folder)) if peer_folder else None
    except (RuntimeError, OSError) as error:
        print(f"bench: DEEP_GEMM_PEER is {peer_folder}, expected a folder with sgl-deep-gemm: {error}", file=sys.stderr)
        return 1

    torch.manual_seed(0)
    started = datetime.now(timezone.utc)
    gpu = machine()
    print(
        f"{gpu}\n{versions()}\n    M      N      K "
        + " ".join(f"{name[:9]:>9}" for name in (*IMPLEMENTATIONS, *[FORK] * bool(peer)))
    )
    turns, sustained = (3, False) if args.quick else (TURNS, not args.no_sustained)
    rows: list[Row] = []
    layers = [(n, k) for _, n, k in LAYERS if n in (args.n or [n]) and k in (args.k or [k])]
    ms: list[int] = args.m
    for (n, k), m in product(layers if DENSE in args.family else [], ms):
        rows.append(measure(Problem(m, n, k), gpu["l2_bytes"], turns, sustained, peer if m in args.peer_m else None))
        print(line_of(rows[-1]), flush=True)
    few = [m for m in ms if m in UPSTREAM_MS]
    for (n, k), m in product(layers if DENSE_PDL in args.family else [], few):
        rows.append(measure(Problem(m, n, k), gpu["l2_bytes"], turns, False, peer if m in args.peer_m else None, True))
        print(line_of(rows[-1]), flush=True)
    shapes = [x for x in grouped.SHAPES if x.family in args.family and (x.n, x.k) in layers]
    for shape in shapes:
        rows.append(measure_grouped(shape, gpu["l2_bytes"], turns, peer))
        print(line_of(rows[-1]), flush=True)
    if peer:
        peer.close()
    for reason in dict.fromkeys(f"{name}: {why}" for row in rows for name, why in row.get("refused", {}).items()):
        print(f"refused by {reason}")
    for m, mean in geometric_means(rows).items():
        print(f"M={m}: ours / tensor-wise {mean:.3f} (geometric mean)")
    for m, mean in geometric_means(rows, family=DENSE_PDL).items():
        print(f"M={m} overlapping: ours / tensor-wise {mean:.3f} (geometric mean)")
    for family in (DENSE, DENSE_PDL):
        if mean := faster_than_upstream(rows, family):
            print(f"{family}, M={', '.join(map(str, few))}: DeepSeek's / ours {mean:.3f} (geometric mean)")
    for m, mean in geometric_means(rows, "us_sustained").items():
        print(f"M={m} sustained: ours / tensor-wise {mean:.3f} (geometric mean)")
    for family, when in ((DENSE, ""), (DENSE_PDL, " overlapping")):
        for m, mean in geometric_means(rows, to=FORK, family=family).items():
            print(f"M={m}{when}: ours / {FORK} {mean:.3f} (geometric mean)")
    for family, mean in family_means(rows).items():
        print(f"{family}: ours / {mean.other} {mean.ratio:.3f} (geometric mean)")
    complete = set(args.m) >= set(MS) and set(args.family) == set(FAMILIES)
    complete = complete and not (args.n or args.k or args.quick or args.no_sustained)
    folder: Path | None = args.output or (RESULTS if complete else None)
    used = {FORK: peer.version} if peer else {}
    about = {"time": started.isoformat(timespec="seconds"), "note": args.note, **commit(), "machine": gpu}
    about |= {"versions": versions() | used}
    path = folder / f"{started.date()}-{slug(gpu['gpu'])}.json" if folder else None
    if path:  # rows are not to be lost with what follows; nor a whole file of that name to half a one
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(as_text(about, rows))
    host = {
        "first_call_s": first_call_s(),
        "compile_all_s": compile_all_s(),
        "eager_call_us": eager_call_us(),
        "layout_share_of_copy": layout_share_of_copy(),
    }
    print(f"{host}\n{(datetime.now(timezone.utc) - started).total_seconds():.0f} s")

    if path:
        part = path.with_name(path.name + ".part")
        part.write_text(as_text(about | host, rows))
        part.replace(path)
        print(path)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
