"""Which tile, and why: what is legal, and a cost model that a launch's time follows. Pure: no CUDA, no measuring.

The constants were fitted to sweeps of tiles on an H200, those of launches that overlap, AGAIN, DEEP and PART_NS on an
H100 (docs/facts.md, planner).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil, gcd
from typing import Any

import numpy as np

from . import decode, measured
from .config import Config
from .errors import InvalidInputError
from .layout import align, ceil_div
from .plan import BLOCK_K, Cost, Plan, Strip, Tile, make_tile, norm
from .problem import Kind, Problem, Problems
from .runtime.device import Device

START_US = 3.03  # from one launch to the next
CLUSTER_START_US = 1.19  # more, if CTAs have to start in pairs
SOONER_US = 0.5  # less, where the first tile is fetched while the CTA gets ready
OVERLAP_US = 0.77  # less, where that happens while the kernel before still runs, and
READY_US = 1.57  # less, if all of the tile is fetched so
AHEAD = 6  # K blocks that are (kernels/storage.cuh)
TENSOR_GHZ = 1.795  # the tensor cores' clock where nothing else limits them
CLUSTER_DRAG = 1.03  # more time where every stage waits for both CTAs of a cluster
ONE_BANK = 1.525  # more time where a sole warpgroup waits for its own promotion
STRADDLE_NS = 5.58  # for a warpgroup to choose the scale of b, for every run of columns that has a choice
SM_BYTES_PER_NS = 110.5  # what the copy engine brings into one SM
L2_BYTES_PER_NS = 14_620  # what L2 delivers to all of them
BLOCK_NS = 87.7  # a K block takes, however small, and
WARPGROUP_NS = 4.55  # for every further warpgroup
TILE_NS = 478  # from one tile to the next, and
CONVERT_BYTES_PER_NS = 36.7  # for a warpgroup to hand over its part of the result, and
PART_NS = 500  # to wait until half of that has left shared memory
STORE_BYTES_PER_NS = 30.0  # of the last result, which nothing is left to hide
HALVED = 0.85  # of a turn of tiles, if it is upper and lower halves of tiles
NARROWED = 0.6  # the same of left and right ones
UNEVEN = 0.635  # of a turn that the busiest CTA has more than the mean, where tiles are claimed one by one
FLOP_PER_US = 1.319e9  # what power allows, at load
LONG_K = 4096  # from here on power decides more than turns: better whole columns of a band at a time than every SM
SPARED = 0.05  # of the SMs, and of turns more, that may be given for it
L2_BYTES = 16e6  # that tiles in flight may read, if those after them are to find it in L2
FROM_MEMORY = 3.0  # times more that a byte costs which was not there
WHOLE_ROWS = 0.9  # of the cost, if tiles in flight are whole rows of tiles, so that the next ones have the same b
MEMORY_EFFICIENCY = 0.943  # of the rate at which weights can be streamed
AGAIN = 0.05  # of a group's b, as good as read anew by each row of tiles after the first: it crosses L2 more than once
DEEP = 1.02  # times more of that rate, where what a result in parts saves is a stage
DEFAULT = Config()
_SPREAD = np.array([0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3])
SHARPNESS = 8.47  # of the norms that stand for "the slowest decides, and the next slowest disturbs it"


@cache
def tiles(column_scales: bool = False) -> tuple[Tile, ...]:
    """Every tile that the planner chooses from. None spills; each is worth a kernel (docs/facts.md, planner)."""
    if column_scales:
        shapes = ((64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
        return tuple(make_tile(*shape, column_scales=True) for shape in shapes)
    widths = {
        64: (32, 48, 64, 80, 96, 128, 144, 160, 192, 256),
        128: (64, 96, 128, 160, 176, 192, 224, 256),
        192: (96, 128),
    }
    alone = (make_tile(block_m, block_n) for block_m in widths for block_n in widths[block_m])
    return *alone, make_tile(128, 256, 2, 1), make_tile(128, 256, 2, 1, parts=2)


@cache
def spare_tiles() -> tuple[Tile, ...]:
    """Other shapes, compiled when set_block_size_multiple_of leaves none of the former."""
    shapes = [*((m, n) for m in (64, 128) for n in range(16, 257, 16) if n not in (208, 240)), (192, 80), (192, 112)]
    known = {(tile.block_m, tile.block_n) for tile in tiles()}
    return tuple(make_tile(*shape) for shape in shapes if shape not in known)


def kernels(column_scales: bool = False) -> tuple[Tile | Strip, ...]:
    """All that the planner chooses from while tiles are not restricted: the closed set of kernels."""
    return tiles(column_scales) if column_scales else (*tiles(), *decode.strips())


class _Table:
    """Tiles as columns of numbers: the cost model runs over all of them at once, so that a miss takes microseconds."""

    def __init__(self, tiles: tuple[Tile, ...]) -> None:
        def column(number: Callable[[Tile], float]) -> Any:
            return np.array([number(tile) for tile in tiles])

        self.tiles = tiles
        self.numbers = {tile.name: i for i, tile in enumerate(tiles)}
        self.block_m, self.block_n = column(lambda t: t.block_m), column(lambda t: t.block_n)
        self.cluster_m, self.cluster_n = column(lambda t: t.cluster_m), column(lambda t: t.cluster_n)
        self.cluster, self.smem_bytes = column(lambda t: t.cluster), column(lambda t: t.smem_bytes)
        self.height, self.width = self.block_m * self.cluster_m, self.block_n * self.cluster_n
        self.area = area = self.block_m * self.block_n
        parts = column(lambda t: t.parts)
        self.depth = np.where(parts > 1, DEEP, 1.0)
        drag = column(lambda t: ONE_BANK if t.banks == 1 and t.warpgroups == 1 else 1)
        self.tensor_ns = area / 32 / TENSOR_GHZ * drag * np.where(self.cluster > 1, CLUSTER_DRAG, 1)
        self.latency_ns = BLOCK_NS + WARPGROUP_NS * (self.block_m // 64 - 1)
        self.straddle_ns = STRADDLE_NS * column(lambda t: t.warpgroups * _choices(t))
        self.halved = column(lambda t: NARROWED if t.narrows else HALVED)
        self.tile_ns = TILE_NS + 64 * self.block_n * 2 / CONVERT_BYTES_PER_NS + PART_NS * (parts - 1)
        self.start_us = START_US + np.where(self.cluster > 1, CLUSTER_START_US, 0)
        self.end_us = area * 2 / STORE_BYTES_PER_NS / 1e3


def _choices(tile: Tile) -> float:
    """Runs of columns whose scale of b has to be chosen: all, or those of one range but its last, at two boundaries."""
    run = gcd(tile.chunk_n, 128)
    if tile.block_n % 128 == 0:
        return 0
    return tile.block_n / run if tile.ranges == 1 else 2 * (128 / tile.ranges / run - 1)


@cache
def _table(column_scales: bool) -> _Table:
    return _Table(tiles(column_scales))


@cache
def _spare_table() -> _Table:
    return _Table(spare_tiles())


class _Costs:
    """What problems cost on each tile of a table, and how they would be launched: a row for each problem."""

    def __init__(self, table: _Table, problems: Problems, device: Device, config: Config) -> None:
        self._problem, self._config, self._table = problems.like, config, table
        problem = problems.like
        self.rows, groups, used, multiplied, alike = _rows(table, problems)
        one_a = problem.kind == Kind.CONTIGUOUS  # of all groups
        self.rows_of_group = np.maximum(1, self.rows / problem.groups) if one_a else self.rows
        self.columns = _ceil_div(problem.n, table.width)
        count = groups * self.rows * self.columns
        clusters = np.maximum(1, (config.num_sms or device.num_sms) // table.cluster)
        known = problem.kind in (Kind.DENSE, Kind.CONTIGUOUS)  # else there may be more tiles than expected
        self._known, self._count = known, count
        self._half = np.where((table.block_m == 128) & known, table.halved, 1)
        shared_out = _turns(count, clusters, self._half)
        claimed = np.maximum(1, count / clusters + UNEVEN * (count > clusters))
        self.waves = np.where(alike, shared_out, claimed)
        self.clusters = np.minimum(clusters, count).astype(np.int64) if known else clusters

        rows = np.minimum(table.block_m, _ceil_div(problems.m, 8) * 8)  # of a that are loaded
        ingest = (rows + table.block_n) * BLOCK_K / SM_BYTES_PER_NS
        shared = rows / table.cluster_n + table.block_n / table.cluster_m
        l2 = shared * BLOCK_K * np.minimum(clusters, np.maximum(count, 1)) * table.cluster / L2_BYTES_PER_NS
        tensor = used * table.tensor_ns
        self.block_ns = norm(SHARPNESS, tensor, ingest, l2, table.latency_ns) + table.straddle_ns
        k_blocks = problem.k_blocks / (problem.groups if problem.kind in (Kind.K_GROUPED, Kind.K_ENDS) else 1)
        sooner = SOONER_US * (table.cluster == 1) if problem.kind == Kind.DENSE else 0.0
        self.start_us = table.start_us - sooner
        compute_us = self.waves * (k_blocks * self.block_ns + table.tile_ns) / 1e3
        streamed = problems.bytes * np.ones(len(table.tiles))
        if problem.kind in (Kind.MASKED, Kind.ENDS):
            streamed = (streamed + AGAIN * groups * problem.n * problem.k * (self.rows - 1)) / table.depth
        self.memory_us = streamed / (MEMORY_EFFICIENCY * device.memory_gbps) / 1e3
        blocks = count * table.cluster * k_blocks
        self.power_us = blocks * BLOCK_K * multiplied * table.area * 2 / FLOP_PER_US
        self.us = self.start_us + norm(SHARPNESS / 2, compute_us, self.memory_us, self.power_us) + table.end_us

    def plan(self, i: int) -> Plan:
        """The plan that walks the first problem with the table's tile number i."""
        table, tile = self._table, self._table.tiles[i]
        clusters, band = self._walk(i)
        figures = (
            *(self.us[0, i], self.start_us[i], self.waves[0, i], self.block_ns[0, i], table.tile_ns[i]),
            *(self.memory_us[0, i], self.power_us[0, i], table.end_us[i]),
        )
        cost = Cost(*(x.item() for x in figures))
        ctas, config, problem = clusters * tile.cluster, self._config, self._problem
        pdl = config.pdl and bool(_may_overlap(problem, problem.m))
        return Plan(problem, tile, ctas, band, config.tc_util, pdl, cost, tile.stages)

    def _walk(self, i: int) -> tuple[int, int]:
        """How many clusters run, and the height of the bands that they walk: those that cost L2 and memory least.

        Tiles in flight at one time read their rows of a and b together, K block by K block. If L2 holds all of that,
        a's rows are still there for the next tiles of the band, and of b's each is new: then high bands are best. Among
        equals the highest that is not higher than what is in flight, for then what shares b is close together.
        """
        height, width, k = int(self._table.height[i]), int(self._table.width[i]), self._problem.k
        rows, columns = ceil(self.rows_of_group[0, i]), int(self.columns[i])
        all_of_them = int(self.clusters[0, i] if self._known else self.clusters[i])
        count, half, at_least = float(self._count[0, i]), float(self._half[i]), _ceil_div(all_of_them, columns)

        def run(band: int) -> int:
            few = all_of_them - all_of_them % band
            if not self._known or k < LONG_K or few == all_of_them or few < (1 - SPARED) * all_of_them:
                return all_of_them
            return few if _turns(count, few, half) <= (1 + SPARED) * _turns(count, all_of_them, half) else all_of_them

        def cost(band: int) -> tuple[float, int, int, int]:
            in_flight, clusters = max(band, at_least), run(band)
            a, b = in_flight * height, min(_ceil_div(clusters, band), columns) * width
            turns_of_band = max(1, band * columns / clusters)
            new = a / turns_of_band + min(clusters / band, columns) * width if (a + b) * k <= L2_BYTES else a + b
            read = (a + b + FROM_MEMORY * new) * (WHOLE_ROWS if clusters == band * columns else 1)
            return read, in_flight - band, -rows % band, band

        band = min(_even_heights(rows), key=cost)
        return run(band), band


def _may_overlap(problem: Problem, m: Any) -> Any:
    """Whether a tile's launch may overlap with the kernel before, if there are m rows.

    CTAs then start one by one, and read the same rows of a at different times: with many rows and a long K that costs
    more than it saves (docs/facts.md, few rows).
    """
    return (m <= 64) | (problem.kind != Kind.DENSE or problem.k < LONG_K)


def _turns(count: Any, clusters: Any, half: Any) -> Any:
    """Tiles that the busiest cluster computes; `half`: what it takes of a turn whose tiles are halved, or 1."""
    turns, rest = count // clusters, count % clusters
    halved = (turns > 0) & (rest * 2 <= clusters)
    return turns + (rest > 0) * (1 - halved * (1 - half))


def ranked(problem: Problem, device: Device, config: Config = DEFAULT, every_split: bool = False) -> tuple[Plan, ...]:
    """A plan for every tile that is legal for the problem, and for every strip, the cheapest first.

    All split K as the chosen one does; with every_split, in any way.
    """
    options = _Options(Problems(problem), device, config)
    split = None if every_split else options.split
    return tuple(options.plan(i) for i in options.cheapest_first(split))


def choose(problem: Problem, device: Device, config: Config = DEFAULT) -> Plan:
    """The plan that the cost model holds for the fastest. Deterministic. Whether launches overlap does not change bits.

    Raises: InvalidInputError where set_block_size_multiple_of leaves no tile that is legal.
    """
    options = _Options(Problems(problem), device, config)
    return options.plan(options.cheapest(config.pdl)[0])


def choices(problems: Problems, device: Device, config: Config = DEFAULT) -> tuple[list[Tile | Strip], ...]:
    """What `choose` chooses for each of many problems, without and with overlap. In a few microseconds for each.

    All of them have at most decode.MOST_ROWS rows, or all have more. Raises: as `choose`.
    """
    options = _Options(problems, device, config)
    return tuple([options.tile(i) for i in options.cheapest(pdl)] for pdl in (False, True))


class _Options:
    """Tiles, and then strips, with what they cost (infinite where they are not legal): a row for each problem."""

    def __init__(self, problems: Problems, device: Device, config: Config) -> None:
        problem = problems.like
        table = _table(problem.column_scales)
        legal = _legal(table, problems, device, config)
        self._strips = decode.Costs(problems, device, config) if decode.takes(problems, device, config) else None
        if not (legal.any() or problem.column_scales):
            table = _spare_table()
            legal = _legal(table, problems, device, config)
        self._table, self._pdl = table, config.pdl
        self._tiles = _Costs(table, problems, device, config)
        us = np.where(legal, self._tiles.us, np.inf)
        overlap_us = 0.0
        if problem.kind == Kind.DENSE:
            sooner_us = (OVERLAP_US + READY_US * min(1.0, AHEAD / problem.k_blocks)) * (table.cluster == 1)
            overlap_us = np.where(_may_overlap(problem, problems.m), sooner_us, 0)
        self._us, self._split = [us, us - overlap_us], np.ones(len(table.tiles), dtype=int)
        if self._strips:
            of_strips = (np.where(self._strips.legal, self._strips.us(pdl), np.inf) for pdl in (False, True))
            self._us = [np.concatenate(pair, axis=1) for pair in zip(self._us, of_strips, strict=True)]
            self._split = np.concatenate([self._split, self._strips.table.split])
        if not np.isfinite(self._us[0]).any(axis=1).all():
            raise InvalidInputError(
                f"no tile is left for {problem}: allow smaller ones by set_block_size_multiple_of(1)"
            )
        self._prefer_measured(problems, measured.lines(problem, device, config))
        self.splits = self._cheapest_splits()

    def _prefer_measured(self, problems: Problems, lines: measured.Lines) -> None:
        """Makes the plans that are known to be fastest the cheapest, whatever the model foretells (see plan)."""
        count = problems.m if problems.like.kind == Kind.DENSE else problems.rows / problems.like.groups
        for first, last, *names in lines:
            within = ((first <= count) & (count <= last))[:, 0]
            for us, name in zip(self._us, names, strict=True):
                i = self._find(name) if name and within.any() else None
                if i is not None:
                    known = within & np.isfinite(us[:, i])
                    us[known, i] = 0.99 * us[known].min(axis=1)

    def _find(self, name: str) -> int | None:
        """The number of the plan of that name, if there is one."""
        if name in self._table.numbers:
            return self._table.numbers[name]
        strip = self._strips.find(name) if self._strips else None
        return None if strip is None else len(self._table.tiles) + strip

    def _cheapest_splits(self) -> Any:
        """Into how many parts K is split: the same with and without overlap, what is fastest on the whole."""
        if not self._strips:
            return np.ones(len(self._us[0]), dtype=int)
        every = np.array(decode.SPLITS)
        totals = [sum(np.where(self._split == split, us, np.inf).min(axis=1) for us in self._us) for split in every]
        return every[np.argmin(totals, axis=0)]

    @property
    def split(self) -> int:
        """Of the first problem."""
        return int(self.splits[0])

    def cheapest(self, pdl: bool) -> list[int]:
        """Of each problem the number of its plan."""
        return np.where(self._split == self.splits[:, None], self._us[pdl], np.inf).argmin(axis=1).tolist()

    def cheapest_first(self, split: int | None) -> list[int]:
        us = self._us[self._pdl][0]
        legal = np.flatnonzero(np.isfinite(us) & ((self._split == split) | (split is None)))
        return legal[np.argsort(us[legal], kind="stable")].tolist()

    def tile(self, i: int) -> Tile | Strip:
        tiles = self._table.tiles
        if i < len(tiles):
            return tiles[i]
        assert self._strips
        return self._strips.table.variants[i - len(tiles)].strip

    def plan(self, i: int) -> Plan:
        """Of the first problem."""
        tiles = len(self._table.tiles)
        if i < tiles:
            return self._tiles.plan(i)
        assert self._strips
        return self._strips.plan(i - tiles)


def is_legal(tile: Tile, problem: Problem, device: Device, config: Config = DEFAULT) -> bool:
    """A cluster needs two tiles to share an operand, and two SMs; a tile has rows of one group alone."""
    return bool(_legal(_Table((tile,)), Problems(problem), device, config)[0, 0])


def plan_for(tile: Tile, problem: Problem, device: Device, config: Config = DEFAULT) -> Plan:
    """The plan that walks the problem with that tile."""
    return _Costs(_Table((tile,)), Problems(problem), device, config).plan(0)


def _legal(table: _Table, problems: Problems, device: Device, config: Config) -> Any:
    problem = problems.like
    legal = (table.smem_bytes <= device.smem_bytes) & (table.cluster <= (config.num_sms or device.num_sms))
    legal &= (table.cluster_n == 1) | (problem.n > table.block_n)
    if problem.kind == Kind.CONTIGUOUS:
        legal &= problem.alignment % table.block_m == 0
    legal &= (table.block_m % config.block_m == 0) & (table.block_n % config.block_n == 0)
    return legal & ((table.cluster_m == 1) | (problems.m > table.block_m))


def _rows(table: _Table, problems: Problems) -> tuple[Any, int, Any, Any, Any]:
    """Rows of tiles in a group, groups that have them, how much of a row of tiles takes time, how much of it multiplies
    (a cluster waits for its fuller CTA), and if all groups have as many.

    Where the device alone knows, groups are taken to be spread evenly from 0.7 to 1.3 times what is expected.
    """
    problem, m = problems.like, problems.m
    if problem.kind in (Kind.MASKED, Kind.ENDS):
        expected = np.maximum(1.0, problems.rows / problem.groups)
        spread = np.minimum(np.ceil(expected * _SPREAD[:, None, None]), m).astype(np.int64)
        sizes = np.where(expected < m, spread, m)  # each a row of problems
        rows = _ceil_div(sizes, table.height)
        # Of the last row of tiles, the upper CTA of a cluster, which is the fuller one.
        filled = _ceil_div(np.minimum(sizes - (rows - 1) * table.height, table.block_m), 64) * 64 / table.block_m
        alike = (rows == rows[0]).all(0)
        mean = rows.mean(0)
        multiplied = (_ceil_div(sizes, 64) * 64).mean(0) / (mean * table.height)
        return mean, problem.groups, 1 - (1 - filled.mean(0)) / mean, multiplied, alike
    groups = problem.groups if problem.kind in (Kind.K_GROUPED, Kind.K_ENDS) else 1
    return _ceil_div(m, table.height), groups, 1.0, 1.0, True


def _ceil_div(x: Any, y: Any) -> Any:
    return -(-x // y)


def _even_heights(rows: int) -> Iterator[int]:
    """ceil(rows / bands) for every number of bands, each height once: about 2 sqrt(rows) of them."""
    height = rows
    while height > 1:
        yield height
        height = ceil_div(rows, ceil_div(rows, height - 1))
    yield height


def tile_rows(tile: Tile | Strip, problem: Problem) -> int:
    """Rows of a for each tile: block_m, or fewer where a few rows of tiles share out evenly what there is.

    Else the last ones' copies bring rows out of bounds, which costs time (docs/facts.md, few rows). Not where more
    warpgroups would have rows then; nor for CTAs that share rows of a, which load halves of block_m.
    """
    cluster_m, cluster_n = (tile.cluster_m, tile.cluster_n) if isinstance(tile, Tile) else (1, 1)
    rows = ceil_div(problem.m, tile.block_m * cluster_m) * cluster_m
    share = align(ceil_div(problem.m, rows), 8)
    few = problem.kind == Kind.DENSE and 1 < rows <= 4 and cluster_n == 1
    return share if few and rows * ceil_div(share, 64) == ceil_div(problem.m, 64) else tile.block_m


def box_rows(tile: Tile | Strip, problem: Problem) -> int:
    """Rows of a that one copy brings. Rows past a small M, or a small group, would take time and serve nobody.

    The CTAs of a cluster load their shared operand in halves.
    """
    if isinstance(tile, Strip):
        return min(tile_rows(tile, problem), problem.m)
    rows = min(tile_rows(tile, problem) // tile.cluster_n, align(problem.m, 8))
    if problem.kind in (Kind.MASKED, Kind.ENDS) and tile.cluster_n == 1:
        expected = problem.rows // problem.groups
        rows = min(rows, 16 if expected <= 16 else 32 if expected <= 32 else 64)
    return rows
