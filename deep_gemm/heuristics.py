"""Which tile, and why: what is legal, and a cost model that a launch's time follows. Pure: no CUDA, no measuring.

The constants were fitted to a sweep of every tile on an H200 (docs/facts.md, planner).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import gcd

from .layout import align, ceil_div
from .plan import BLOCK_K, Cost, Plan, Tile, make_tile
from .problem import Problem
from .runtime.device import Device

START_US = 2.6  # from one launch to the next
CLUSTER_START_US = 0.7  # more, if CTAs have to start in pairs
TENSOR_GHZ = 1.5  # the clock under load, times the share of it in which the tensor cores are busy
CLUSTER_DRAG = 1.07  # more time where every stage waits for both CTAs of a cluster
ONE_BANK = 1.12  # more time where one or two warpgroups have to wait for each other's promotion
STRADDLE_NS = 4  # for a warpgroup to choose the scale of b, for every run of columns that is sure to share one
SM_BYTES_PER_NS = 125  # what the copy engine brings into one SM
L2_BYTES_PER_NS = 14_000  # what L2 delivers to all of them
BLOCK_NS = 105  # a K block takes, however small, and
WARPGROUP_NS = 50  # for every further warpgroup
TILE_NS = 600  # from one tile to the next, and
CONVERT_BYTES_PER_NS = 45  # for a warpgroup to hand over its part of the result
STORE_BYTES_PER_NS = 25  # of the last result, which nothing is left to hide
MEMORY_EFFICIENCY = 0.93  # of the rate at which weights can be streamed
SHARPNESS = 7  # of the norms that stand for "the slowest decides, and the next slowest disturbs it"


@cache
def tiles() -> tuple[Tile, ...]:
    """Every tile that a kernel can be compiled for, that is, without spilling registers."""
    shapes = [(m, n) for m in (64, 128, 192) for n in range(16, 257, 16) if m < 192 or n <= 128]
    clusters = ((1, 1), (2, 1), (1, 2))
    return tuple(make_tile(m, n, *c) for m, n in shapes for c in clusters if (m, n, c) != (128, 256, (1, 2)))


def candidates(problem: Problem, device: Device, num_sms: int) -> Iterator[Plan]:
    """A plan for every tile that is legal for the problem."""
    for tile in tiles():
        if is_legal(tile, problem, device, num_sms):
            yield plan_for(tile, problem, device, num_sms)


def ranked(problem: Problem, device: Device, num_sms: int | None = None) -> tuple[Plan, ...]:
    """Every plan for the problem, the cheapest first."""
    return tuple(sorted(candidates(problem, device, num_sms or device.num_sms), key=lambda plan: plan.cost.us))


def choose(problem: Problem, device: Device, num_sms: int | None = None) -> Plan:
    """The plan that the cost model holds for the fastest. Deterministic."""
    return min(candidates(problem, device, num_sms or device.num_sms), key=lambda plan: plan.cost.us)


def is_legal(tile: Tile, problem: Problem, device: Device, num_sms: int) -> bool:
    """A cluster needs two tiles to share an operand, and two SMs."""
    return (
        tile.smem_bytes <= device.smem_bytes
        and tile.cluster <= num_sms
        and (tile.cluster_m == 1 or problem.m > tile.block_m)
        and (tile.cluster_n == 1 or problem.n > tile.block_n)
    )


def plan_for(tile: Tile, problem: Problem, device: Device, num_sms: int) -> Plan:
    """The plan that walks the problem with that tile."""
    rows = ceil_div(problem.m, tile.block_m * tile.cluster_m)
    columns = ceil_div(problem.n, tile.block_n * tile.cluster_n)
    clusters = min(num_sms // tile.cluster, rows * columns)
    waves = ceil_div(rows * columns, clusters)
    return Plan(
        problem,
        tile,
        clusters * tile.cluster,
        _band(tile, rows, columns, clusters),
        _cost(tile, problem, device, clusters, waves),
    )


def _band(tile: Tile, rows: int, columns: int, clusters: int) -> int:
    """The height of a band for which the tiles in flight at one time read the fewest rows of a and of b."""
    height, width = tile.block_m * tile.cluster_m, tile.block_n * tile.cluster_n
    return min(
        _even_heights(rows), key=lambda band: (band * height + min(ceil_div(clusters, band), columns) * width, band)
    )


def _even_heights(rows: int) -> Iterator[int]:
    """ceil(rows / bands) for every number of bands, each height once: about 2 sqrt(rows) of them."""
    height = rows
    while height > 1:
        yield height
        height = ceil_div(rows, ceil_div(rows, height - 1))
    yield height


def _cost(tile: Tile, problem: Problem, device: Device, clusters: int, waves: int) -> Cost:
    m, n, ctas = tile.block_m, tile.block_n, clusters * tile.cluster
    rows = min(m, align(problem.m, 8))  # of a that are loaded
    tensor = m * n / 32 / TENSOR_GHZ
    tensor *= (ONE_BANK if tile.banks == 1 and tile.warpgroups < 3 else 1) * (CLUSTER_DRAG if tile.cluster > 1 else 1)
    ingest = (rows + n) * BLOCK_K / SM_BYTES_PER_NS
    l2 = (rows / tile.cluster_n + n / tile.cluster_m) * BLOCK_K * ctas / L2_BYTES_PER_NS
    latency = BLOCK_NS + WARPGROUP_NS * (tile.warpgroups - 1)
    straddle = 0 if n % 128 == 0 else STRADDLE_NS * tile.warpgroups * n / gcd(tile.chunk_n, 128)
    block = _norm(SHARPNESS, tensor, ingest, l2, latency) + straddle
    per_tile = TILE_NS + 64 * n * 2 / CONVERT_BYTES_PER_NS
    compute_us = waves * (problem.k_blocks * block + per_tile) / 1e3
    memory_us = problem.bytes / (MEMORY_EFFICIENCY * device.memory_gbps) / 1e3
    start_us = START_US + (CLUSTER_START_US if tile.cluster > 1 else 0)
    end_us = m * n * 2 / STORE_BYTES_PER_NS / 1e3
    us = start_us + _norm(SHARPNESS / 2, compute_us, memory_us) + end_us
    return Cost(us, start_us, waves, block, per_tile, memory_us, end_us)


def _norm(p: float, *terms: float) -> float:
    return sum(term**p for term in terms) ** (1 / p)
