"""Which tile, and why: what is legal, and a cost model that a launch's time follows. Pure: no CUDA, no measuring.

The constants were fitted to a sweep of every tile on an H200 (docs/facts.md, planner).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import ceil, gcd

from .config import Config
from .errors import InvalidInputError
from .layout import align, ceil_div
from .plan import BLOCK_K, Cost, Plan, Tile, make_tile
from .problem import Kind, Problem
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
DEFAULT = Config()
_SPREAD = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
SHARPNESS = 7  # of the norms that stand for "the slowest decides, and the next slowest disturbs it"


@cache
def tiles(column_scales: bool = False) -> tuple[Tile, ...]:
    """Every tile that a kernel can be compiled for, that is, without spilling registers."""
    if column_scales:
        return tuple(make_tile(m, n, column_scales=True) for m in (64, 128) for n in (32, 64, 128))
    shapes = [(m, n) for m in (64, 128, 192) for n in range(16, 257, 16) if m < 192 or n <= 128]
    clusters = ((1, 1), (2, 1), (1, 2))
    return tuple(make_tile(m, n, *c) for m, n in shapes for c in clusters if (m, n, c) != (128, 256, (1, 2)))


def candidates(problem: Problem, device: Device, config: Config) -> Iterator[Plan]:
    """A plan for every tile that is legal for the problem."""
    for tile in tiles(problem.column_scales):
        if is_legal(tile, problem, device, config):
            yield plan_for(tile, problem, device, config)


def ranked(problem: Problem, device: Device, config: Config = DEFAULT) -> tuple[Plan, ...]:
    """Every plan for the problem, the cheapest first."""
    return tuple(sorted(candidates(problem, device, config), key=lambda plan: plan.cost.us))


def choose(problem: Problem, device: Device, config: Config = DEFAULT) -> Plan:
    """The plan that the cost model holds for the fastest. Deterministic.

    Raises: InvalidInputError where set_block_size_multiple_of leaves no tile that is legal.
    """
    plan = min(candidates(problem, device, config), key=lambda plan: plan.cost.us, default=None)
    if plan is None:
        raise InvalidInputError(f"no tile is left for {problem}: allow smaller ones by set_block_size_multiple_of(1)")
    return plan


def is_legal(tile: Tile, problem: Problem, device: Device, config: Config = DEFAULT) -> bool:
    """A cluster needs two tiles to share an operand, and two SMs; a tile has rows of one group alone."""
    return (
        tile.smem_bytes <= device.smem_bytes
        and tile.cluster <= (config.num_sms or device.num_sms)
        and (tile.cluster_m == 1 or problem.m > tile.block_m)
        and (tile.cluster_n == 1 or problem.n > tile.block_n)
        and (tile.cluster_m == 1 or problem.kind != Kind.CONTIGUOUS)
        and (problem.kind != Kind.CONTIGUOUS or problem.alignment % tile.block_m == 0)
        and tile.block_m % config.block_m == 0
        and tile.block_n % config.block_n == 0
    )


def plan_for(tile: Tile, problem: Problem, device: Device, config: Config = DEFAULT) -> Plan:
    """The plan that walks the problem with that tile."""
    rows, groups, used = _rows(tile, problem)
    columns = ceil_div(problem.n, tile.block_n * tile.cluster_n)
    tiles, clusters = ceil(groups * rows * columns), (config.num_sms or device.num_sms) // tile.cluster
    waves = ceil_div(tiles, clusters)
    if problem.kind in (Kind.DENSE, Kind.CONTIGUOUS):  # else there may be more tiles than expected
        clusters = min(clusters, tiles)
    return Plan(
        problem,
        tile,
        clusters * tile.cluster,
        _band(tile, ceil(rows), columns, clusters),
        config.tc_util,
        config.pdl,
        _cost(tile, problem, device, clusters, waves, used),
    )


def _rows(tile: Tile, problem: Problem) -> tuple[float, int, float]:
    """Rows of tiles in a group, groups that have them, and how much of a tile's height is in use.

    Where the device alone knows, groups are taken to be spread evenly from 0.7 to 1.3 times what is expected.
    """
    height = tile.block_m * tile.cluster_m
    if problem.kind in (Kind.MASKED, Kind.ENDS):
        expected = max(1.0, problem.rows / problem.groups)
        sizes = [min(ceil(expected * x), problem.m) for x in _SPREAD]
        rows = sum(ceil_div(size, height) for size in sizes) / len(sizes)
        used = sum(ceil_div(size, 64) for size in sizes) / len(sizes) * 64
        return rows, problem.groups, used / (rows * height)
    groups = problem.groups if problem.kind in (Kind.K_GROUPED, Kind.K_ENDS) else 1
    return ceil_div(problem.m, height), groups, 1.0


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


def _cost(tile: Tile, problem: Problem, device: Device, clusters: int, waves: int, used: float) -> Cost:
    m, n, ctas = tile.block_m, tile.block_n, clusters * tile.cluster
    rows = min(m, align(problem.m, 8))  # of a that are loaded
    tensor = used * m * n / 32 / TENSOR_GHZ
    tensor *= (ONE_BANK if tile.banks == 1 and tile.warpgroups < 3 else 1) * (CLUSTER_DRAG if tile.cluster > 1 else 1)
    ingest = (rows + n) * BLOCK_K / SM_BYTES_PER_NS
    l2 = (rows / tile.cluster_n + n / tile.cluster_m) * BLOCK_K * ctas / L2_BYTES_PER_NS
    latency = BLOCK_NS + WARPGROUP_NS * (tile.warpgroups - 1)
    straddle = 0 if n % 128 == 0 else STRADDLE_NS * tile.warpgroups * n / gcd(tile.chunk_n, 128)
    block = _norm(SHARPNESS, tensor, ingest, l2, latency) + straddle
    per_tile = TILE_NS + 64 * n * 2 / CONVERT_BYTES_PER_NS
    k_blocks = problem.k_blocks / (problem.groups if problem.kind in (Kind.K_GROUPED, Kind.K_ENDS) else 1)
    compute_us = waves * (k_blocks * block + per_tile) / 1e3
    memory_us = problem.bytes / (MEMORY_EFFICIENCY * device.memory_gbps) / 1e3
    start_us = START_US + (CLUSTER_START_US if tile.cluster > 1 else 0)
    end_us = m * n * 2 / STORE_BYTES_PER_NS / 1e3
    us = start_us + _norm(SHARPNESS / 2, compute_us, memory_us) + end_us
    return Cost(us, start_us, waves, block, per_tile, memory_us, end_us)


def _norm(p: float, *terms: float) -> float:
    return sum(term**p for term in terms) ** (1 / p)


def box_rows(tile: Tile, problem: Problem) -> int:
    """Rows of a that one copy brings. Rows past a small M, or a small group, would take time and serve nobody.

    The CTAs of a cluster load their shared operand in halves.
    """
    rows = min(tile.block_m // tile.cluster_n, align(problem.m, 8))
    if problem.kind in (Kind.MASKED, Kind.ENDS) and tile.cluster_n == 1:
        expected = problem.rows // problem.groups
        rows = min(rows, 16 if expected <= 16 else 32 if expected <= 32 else 64)
    return rows
