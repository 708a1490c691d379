"""DeepSeek-V3's layers, and another: plans that were measured to be faster than what the cost model prefers. Pure.

The model foretells most times of few rows within a few percent, and among plans that are that close may pick one 2 to
20 % slower than the best. For these layers it is told what was fastest, alone and overlapping, on H100s (whose tables
all GPUs have but the H200) and on H200s (docs/facts.md, planner). Both of a line split K alike, so that `set_pdl`
changes no bits.

A line is changed with a sweep at hand: `python -m bench.sweep --few-rows`, with `--pdl` for the last column.
"""

from __future__ import annotations

from .config import Config
from .problem import Kind, Problem
from .runtime.device import H200, Device

NUM_SMS = 132  # of the GPUs that were measured

Lines = tuple[tuple[int, int, str | None, str | None], ...]

# By GPU and N, K: first and last M, what is fastest alone, and overlapping; none where the cost model is right.
PLANS: dict[str, dict[tuple[int, int], Lines]] = {
    "H100": {
        (2112, 7168): (
            (1, 8, "8x64 swapped K/2 stages 12", "8x64 swapped K/2 stages 24"),
            (9, 16, "16x64 swapped K/2 stages 8", "16x64 swapped K/2 stages 20"),
            (17, 32, "64x32 strip K/2 stages 16", "32x64 swapped K/2 stages 16"),
            (33, 64, "64x32 strip K/2 stages 16", "64x64 strip K/2 stages 12"),
            (65, 128, "128x32 strip K/2 stages 8", "128x32 strip K/2 stages 8"),
        ),
        (24576, 1536): (
            (1, 8, "8x64 swapped K/1 stages 8", None),
            (17, 32, None, "32x64 swapped K/1 stages 4"),
        ),
        (32768, 512): (
            (9, 16, None, "16x128 swapped K/1 stages 4"),
            (17, 32, None, "64x160"),
            (33, 64, "128x128", "128x160"),
            (65, 128, "128x128", "128x160"),
        ),
        (7168, 16384): ((65, 128, "64x128 strip K/1 stages 8 in pairs", "64x112 strip K/1 stages 8 in pairs"),),
        (4096, 7168): (
            (33, 48, "64x64 strip K/1 stages 12", "64x32 strip K/1 stages 16"),
            (49, 64, "64x32 strip K/1 stages 16", "64x32 strip K/1 stages 16"),
            (65, 128, "64x64 strip K/1 stages 12 in pairs", "64x64 strip K/1 stages 12 in pairs"),
        ),
        (7168, 2048): (
            (1, 8, None, "8x128 swapped K/1 stages 12"),
            (9, 16, None, "16x128 swapped K/1 stages 12"),
            (17, 64, "64x64 strip K/1 stages 12", "64x64 strip K/1 stages 12"),
            (65, 96, "128x64 strip K/1 stages 8", "128x64 strip K/1 stages 8"),
            (97, 128, "64x128 strip K/1 stages 8 in pairs", "64x128 strip K/1 stages 8 in pairs"),
        ),
    },
    "H200": {
        (2112, 7168): (
            (1, 8, "8x64 swapped K/2 stages 12", "8x64 swapped K/2 stages 24"),
            (9, 16, "16x64 swapped K/4 stages 8", "16x192 swapped K/4 stages 8"),
            (17, 32, "64x32 strip K/2 stages 16", "32x64 swapped K/2 stages 16"),
            (33, 64, "64x32 strip K/2 stages 16", "64x64 strip K/2 stages 12"),
            (65, 128, "128x32 strip K/2 stages 8", "128x32 strip K/2 stages 8"),
        ),
        (24576, 1536): (
            (1, 8, "8x64 swapped K/1 stages 8", "8x192 swapped K/1 stages 8"),
            (9, 16, "16x64 swapped K/1 stages 4", "16x192 swapped K/1 stages 8"),
            (17, 32, "32x64 swapped K/1 stages 4", "64x96"),
            (33, 64, "64x64", "64x96"),
            (65, 128, "128x96", "128x96"),
        ),
        (32768, 512): (
            (1, 3, "8x128 swapped K/1 stages 4", "8x192 swapped K/1 stages 4"),
            (4, 8, "8x128 swapped K/1 stages 4", "8x128 swapped K/1 stages 4"),
            (9, 16, "16x64 swapped K/1 stages 4", "16x128 swapped K/1 stages 4"),
            (17, 32, "32x128 swapped K/1 stages 4", "64x160"),
            (33, 64, "192x128", "64x160"),
            (65, 128, "192x128", "128x128"),
        ),
        (7168, 16384): (
            (1, 8, "8x64 swapped K/2 stages 4", "8x64 swapped K/2 stages 12"),
            (9, 16, "16x64 swapped K/2 stages 4", "16x128 swapped K/2 stages 12"),
            (17, 32, "32x64 swapped K/2 stages 4", "64x112 strip K/2 stages 8"),
            (33, 48, "64x64 strip K/2 stages 4", "64x112 strip K/2 stages 8"),
            (49, 64, "64x112 strip K/2 stages 8", "64x112 strip K/2 stages 8"),
            (65, 128, "64x112 strip K/1 stages 8 in pairs", "64x112 strip K/1 stages 8 in pairs"),
        ),
        (4096, 7168): (
            (1, 8, "8x64 swapped K/2 stages 8", "8x64 swapped K/2 stages 24"),
            (9, 16, "16x64 swapped K/2 stages 8", "16x64 swapped K/2 stages 20"),
            (17, 32, "32x64 swapped K/2 stages 8", "32x64 swapped K/2 stages 16"),
            (33, 64, "64x32 strip K/1 stages 16", "64x32 strip K/1 stages 16"),
            (65, 96, "128x64 strip K/2 stages 8", "128x64 strip K/2 stages 8"),
            (97, 128, "64x64 strip K/1 stages 12 in pairs", "64x64 strip K/1 stages 12 in pairs"),
        ),
        (7168, 2048): (
            (1, 8, "8x64 swapped K/2 stages 4", "8x64 swapped K/2 stages 8"),
            (9, 16, "16x64 swapped K/1 stages 8", "16x128 swapped K/1 stages 12"),
            (17, 32, "64x32 strip K/1 stages 8", "32x64 swapped K/1 stages 8"),
            (33, 64, "64x64 strip K/1 stages 12", "64x64 strip K/1 stages 12"),
            (65, 128, "64x128 strip K/1 stages 8 in pairs", "64x128 strip K/1 stages 8 in pairs"),
        ),
        (36864, 7168): ((1, 8, "8x64 swapped K/2 stages 8", "8x64 swapped K/2 stages 8"),),
        (5120, 25600): ((65, 128, "64x80", "64x80"),),
    },
}

# The same of many groups, masked, by the rows that are expected of each; alone and overlapping alike.
MANY = 16  # groups
MASKED: dict[str, dict[tuple[int, int], tuple[tuple[int, int, str], ...]]] = {
    "H100": {},
    "H200": {
        (4096, 7168): ((176, 208, "128x256 cluster 2x1 in parts"),),
        (7168, 2048): ((176, 208, "128x256 cluster 2x1"),),
    },
}


def lines(problem: Problem, device: Device, config: Config) -> Lines:
    """Those of a problem's layer, for its m, or the rows that are expected of each of its groups."""
    whole = device.num_sms == NUM_SMS == (config.num_sms or NUM_SMS) and config.tc_util == 100
    gpu, layer = "H200" if device.memory_gbps == H200.memory_gbps else "H100", (problem.n, problem.k)
    if problem.kind == Kind.DENSE and not problem.column_scales and whole:
        return PLANS[gpu].get(layer, ())
    if problem.kind == Kind.MASKED and problem.groups >= MANY and whole:
        return tuple((first, last, name, name) for first, last, name in MASKED[gpu].get(layer, ()))
    return ()


def fastest(problem: Problem, device: Device, config: Config) -> tuple[str | None, str | None]:
    """The names (`Plan.name`) of the plans that were fastest, alone and overlapping, where that is known better."""
    count = problem.m if problem.kind == Kind.DENSE else problem.rows / problem.groups
    for first, last, alone, overlapping in lines(problem, device, config):
        if first <= count <= last:
            return alone, overlapping
    return None, None
