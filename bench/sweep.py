"""Times tile after tile on this GPU, to fit the planner's cost model to, and says how well the planner chooses.

Shapes: linear layers of open models with FP8 weights (DeepSeek-V3, Kimi-K2, Qwen3, GLM-4.5, Llama-3.1) with 256 to
32,768 rows, and experts, contiguous and masked; or some of them with 1 to 256 rows, and other groups. Of each
problem the tiles and strips that the cost model holds for the fastest are timed, the GPU at load, one after the other
in random order and then in the reverse one: a graph of several launches over several sets of operands, the median of
four replays, once the tile's own power has decided on the clock.

    python -m bench.sweep                   # sweeps, and writes to bench/results/sweep
    python -m bench.sweep --few-rows        # the same of few rows
    python -m bench.sweep --few-rows --pdl  # of the dense ones, with launches that overlap
    python -m bench.sweep --report FILE     # what today's choices took in a sweep, and the fastest tile
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

import deep_gemm
from bench import grouped
from bench.graph import capture
from bench.run import as_text, commit, machine, on_hopper, slug, versions
from bench.table import RESULTS
from deep_gemm import heuristics, problem
from deep_gemm.config import Config
from deep_gemm.plan import Strip, Tile
from deep_gemm.problem import Kind, Operands, Problem
from deep_gemm.quantize import per_block_cast_to_fp8, per_token_cast_to_fp8
from deep_gemm.runtime import device
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.runtime.launch import launch

SWEEPS = RESULTS / "sweep"
REPLAY_US = 400
WARM_S = 0.3
SETTLE_S = 0.01  # for a tile to be timed at the clock that its own power allows, not at that of the tile before
MOST_FLOP = 4e12
MOST = 40  # tiles of a problem, and strips of one with few rows
LAYERS = (  # N, K
    *((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)),  # DeepSeek-V3
    *((36864, 7168), (7168, 18432), (12288, 1536), (16384, 512), (7168, 8192), (576, 7168)),  # and Kimi-K2
    *((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (10240, 5120), (5120, 8192), (5120, 25600)),  # Qwen3
    *((9216, 4096), (14336, 5120), (5120, 12288), (24576, 5120)),  # and GLM-4.5
    *((10240, 8192), (8192, 8192), (8192, 28672), (28672, 4096), (4096, 14336), (1280, 8192), (8192, 1024)),  # Llama
)
MS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
EXPERTS = (*grouped.EXPERT, (3072, 4096), (4096, 1536))  # N, K of DeepSeek-V3's, and of Qwen3-235B's
CONTIGUOUS_GROUPS = ((4, 8192), (8, 4096), (32, 256), (16, 512), (64, 128))  # groups, rows of each
MASKED_GROUPS = ((1, 1024, 1024), (2, 512, 512), (4, 256, 256), (32, 4096, 192), (8, 2048, 700))  # and expected
FEW_LAYERS = (*LAYERS[:13], *LAYERS[14:19], (2048, 4096), (1280, 8192))
FEW_MS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FEW_CONTIGUOUS_GROUPS = ((8, 1024), (16, 384), (8, 2048))
FEW_MASKED_GROUPS = (
    *((32, 4096, 20), (8, 256, 128), (64, 512, 48), (32, 512, 64)),
    *((8, 512, 100), (16, 1024, 350), (4, 2048, 700), (32, 256, 8), (1, 256, 100), (128, 256, 16)),
    *((32, 512, 150), (32, 512, 192), (32, 512, 225), (8, 512, 192)),
)


class Outcome(NamedTuple):
    """What today's cost model makes of a problem that was swept; times in us."""

    family: str
    shape: list[int]
    chosen: str
    chosen_us: float | None  # none where the tile was not timed
    foretold_us: float
    fastest: str
    fastest_us: float


def shapes(few_rows: bool = False) -> Iterator[tuple[str, list[int]]]:
    """A family and its numbers, as problem_of takes them: of dense layers every other M, and DeepSeek-V3's at 4096."""
    layers, ms = (FEW_LAYERS, FEW_MS) if few_rows else (LAYERS, MS)
    for (i, (n, k)), (j, m) in product(enumerate(layers), enumerate(ms)):
        if few_rows or (2 * m * n * k <= MOST_FLOP and ((i + j) % 2 == 0 or (m == 4096 and i < 6))):
            yield grouped.DENSE, [m, n, k]
    for numbers, (n, k) in product(FEW_CONTIGUOUS_GROUPS if few_rows else CONTIGUOUS_GROUPS, EXPERTS):
        yield grouped.CONTIGUOUS, [*numbers, n, k]
    for (groups, m, expected), (n, k) in product(FEW_MASKED_GROUPS if few_rows else MASKED_GROUPS, EXPERTS):
        yield grouped.MASKED, [groups, m, n, k, expected]


def problem_of(family: str, numbers: Sequence[int]) -> Problem:
    """dense [m, n, k], contiguous [groups, rows of each, n, k], masked [groups, max_m, n, k, expected_m]."""
    if family == grouped.DENSE:
        m, n, k = numbers
        return Problem(m, n, k)
    groups, m, n, k = numbers[:4]
    if family == grouped.CONTIGUOUS:
        return Problem(groups * m, n, k, Kind.CONTIGUOUS, groups, alignment=128)
    return Problem(m, n, k, Kind.MASKED, groups, numbers[4])


def operands_of(family: str, numbers: list[int]) -> Operands:
    if family == grouped.DENSE:
        m, n, k = numbers
        a, a_scales = per_token_cast_to_fp8(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), False)
        b = per_block_cast_to_fp8(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), False)
        d = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        return problem.dense((a, deep_gemm.get_mn_major_tma_aligned_tensor(a_scales)), b, d, None, False)[1]
    x = grouped.Operands.random(grouped.Shape.of(family, numbers))
    a, b = (x.a, x.a_scales), (x.b, x.b_scales)
    if family == grouped.CONTIGUOUS:
        return problem.contiguous(a, b, x.d, x.layout, False, 128, None, True)[1]
    return problem.masked(a, b, x.d, x.layout, numbers[4])[1]


def keep_busy(graph: torch.cuda.CUDAGraph, seconds: float) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        graph.replay()
        torch.cuda.synchronize()


def sweep_one(family: str, numbers: list[int], most: int, pdl: bool = False) -> dict[str, float]:
    """Microseconds of each plan, by name. pdl: launches overlap."""
    about = problem_of(family, numbers)
    every = heuristics.ranked(about, device.current(), Config(pdl=pdl), every_split=True)
    plans = [plan for kind in (Tile, Strip) for plan in [x for x in every if isinstance(x.tile, kind)][:most]]
    # Few rows wait for memory, not for power: then there is nothing that has to settle.
    warm_s, settle_s = (0.02, 0.0) if family == grouped.DENSE and about.m <= max(FEW_MS) else (WARM_S, SETTLE_S)
    random.Random(str(numbers)).shuffle(plans)
    sets = [operands_of(family, numbers) for _ in range(max(2, min(8, int(3e8 / about.bytes) + 1)))]
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for plan in plans:
        launches = len(sets) * max(1, round(REPLAY_US / plan.cost.us / len(sets)))
        graph = capture(lambda x, plan=plan: (launch(plan, x), x.d)[1], sets, launches)
        graphs[plan.name] = graph, launches
    keep_busy(next(iter(graphs.values()))[0], warm_s)
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for name in (*graphs, *reversed(graphs)):  # there and back, for the GPU grows warmer, and its clock slower
        graph, launches = graphs[name]
        keep_busy(graph, settle_s)
        for _ in range(2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) * 1e3 / launches)
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


def sweep(todo: list[tuple[str, list[int]]], most: int, limit_s: float, pdl: bool = False) -> list[dict[str, Any]]:
    """A row for each problem: its family and shape; us in the order of heuristics.tiles(), None where not timed; us of
    strips, by name."""
    tiles = heuristics.tiles()
    compile_many([kernel.source() for kernel in heuristics.kernels()])
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for family, numbers in random.Random(0).sample(todo, len(todo)):  # so that a limit leaves out no family
        if time.perf_counter() - begun > limit_s:
            print(f"{limit_s:.0f} s are over: {len(todo) - len(rows)} of {len(todo)} problems are left out", flush=True)
            break
        us = sweep_one(family, numbers, most, pdl)
        of_tiles = [us.pop(tile.name, None) for tile in tiles]
        rows.append({"family": family, "shape": numbers, "us": of_tiles} | ({"strips": us} if us else {}))
        torch.cuda.empty_cache()
    return rows


def outcomes(path: Path) -> Iterator[Outcome]:
    """What the cost model chooses for every problem of a sweep, on the GPU that was swept."""
    swept = json.loads(path.read_text())
    gpu = device.named(swept["machine"]["gpu"], swept["machine"]["sms"])
    pdl = swept.get("pdl", False)
    for row in swept["rows"]:
        us = {name: time for name, time in zip(swept["tiles"].split(" | "), row["us"], strict=True) if time}
        us |= row.get("strips", {})
        plan = heuristics.choose(problem_of(row["family"], row["shape"]), gpu, Config(pdl=pdl))
        fastest = min(us, key=us.__getitem__)
        yield Outcome(row["family"], row["shape"], plan.name, us.get(plan.name), plan.cost.us, fastest, us[fastest])


def report(path: Path) -> str:
    lines: list[str] = []
    behind: list[float] = []
    off: list[float] = []
    for x in outcomes(path):
        if not x.chosen_us:
            lines.append(f"{x.family:10} {x.shape!s:28} {x.chosen}, which was not timed")
            continue
        behind.append(x.chosen_us / x.fastest_us)
        off.append(abs(x.foretold_us / x.chosen_us - 1))
        best = "" if x.chosen == x.fastest else f"  {x.fastest} {x.fastest_us:.1f}: {behind[-1]:.3f}"
        lines.append(
            f"{x.family:10} {x.shape!s:28} {x.chosen} {x.chosen_us:.1f} us, foretold {x.foretold_us:.1f}{best}"
        )
    median, mean, worst = statistics.median(behind), statistics.mean(behind), max(behind)
    lines.append(
        f"{len(behind)} problems. Chosen tile / fastest one: median {median:.3f}, mean {mean:.3f}, worst {worst:.3f}. "
        f"Foretold times are off by {statistics.median(off):.1%} in the median."
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.sweep", description="Times tile after tile, to fit the planner to.")
    parser.add_argument("--few-rows", action="store_true", help="1 to 256 rows instead of 256 to 32,768")
    parser.add_argument("--pdl", action="store_true", help="dense problems, with launches that overlap")
    parser.add_argument("--most", type=int, default=MOST, help="tiles of each problem, the most promising first")
    parser.add_argument(
        "--limit", type=float, default=3600, metavar="SECONDS", help="start no further problem after so long"
    )
    parser.add_argument("--output", type=Path, help=f"folder for the results (default: {SWEEPS}, for complete sweeps)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="no sweep: what today's choices took in that one")
    args = parser.parse_args(argv)
    if args.most < 1:
        parser.error(f"--most is {args.most}, expected 1 or more")
    if args.report:
        if not args.report.is_file():
            parser.error(f"{args.report} is no file")
        print(report(args.report))
        return 0
    if not on_hopper("sweep"):
        return 1
    started, gpu = datetime.now(timezone.utc), machine()
    about = {"time": started.isoformat(timespec="seconds"), "machine": gpu, "versions": versions(), **commit()}
    about["tiles"] = " | ".join(tile.name for tile in heuristics.tiles())
    about["pdl"] = args.pdl
    todo = [x for x in shapes(args.few_rows) if x[0] == grouped.DENSE or not args.pdl]
    rows = sweep(todo, args.most, args.limit, args.pdl)
    complete = len(rows) == len(todo) and args.most >= MOST
    folder = args.output or (SWEEPS if complete else Path(tempfile.mkdtemp(prefix="sweep.")))
    folder.mkdir(parents=True, exist_ok=True)
    which = "-few-rows" * args.few_rows + "-overlapping" * args.pdl
    path = folder / f"{started:%Y-%m-%d}-{slug(gpu['gpu'])}{which}.json"
    path.write_text(as_text(about, rows))
    print(report(path))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
