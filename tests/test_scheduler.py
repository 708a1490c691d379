"""kernels/scheduler.cuh on the CPU (warps.cpp): every row of every group is in one tile, whatever the layout holds.

What a tile stores follows `write_back` and `store_sum`. Needs a C++ compiler.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from deep_gemm import heuristics
from deep_gemm.layout import align, ceil_div
from deep_gemm.plan import make_tile
from deep_gemm.problem import Kind, Problem

KERNELS = Path(__file__).parents[1] / "deep_gemm" / "kernels"
COMPILER = shutil.which("c++")
TOGETHER, SCATTERED, NONE = range(3)
SHAPES = [(64, 64), (128, 64), (128, 64, 2, 1), (128, 48, 1, 2), (192, 64, 1, 2), (64, 32, 2, 1), (192, 48)]
COLUMNS = [(64, 64, 1, 1, True), (128, 32, 1, 1, True)]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


class Placed(NamedTuple):
    """A tile, as `struct Tile` has it, and the CTA that it was handed out in."""

    cta: int
    m: int
    n: int
    group: int
    batch: int
    end: int
    k: int
    k_blocks: int
    apart: int
    rows: int


@dataclass
class Case:
    kind: Kind
    m: int
    n: int
    k: int
    tile_rows: int
    band: int
    groups: int
    alignment: int
    layout: list[int]
    counter: int
    ctas: int

    def line(self, seed: int, launches: int) -> str:
        numbers = (seed, self.ctas, launches, self.kind, self.m, self.n, self.k, self.tile_rows, self.band)
        more = (self.counter, self.groups, self.alignment, len(self.layout))
        return " ".join(map(str, (*numbers, *more, *self.layout)))

    def ranges(self) -> list[tuple[int, int]]:
        """Rows of every group, or columns along K, where it has one range. Clamped as the docstrings say."""
        size = self.k if self.kind >= Kind.K_GROUPED else self.m
        ends, found, at = [min(max(x, 0), size) for x in self.layout], [], 0
        for group, end in enumerate(ends):
            if self.kind == Kind.MASKED:
                found.append((0, end))
            elif self.kind == Kind.K_GROUPED:
                found.append((min(at, size), min(at + end // 128 * 128, size)))
                at += end // 128 * 128
            else:
                start = min(align(ends[group - 1], self.alignment), size) if group else 0
                found.append((start, max(start, end)))
        return found


def cases(draw: random.Random, tile, count: int) -> Iterator[Case]:
    kinds = (Kind.DENSE, Kind.K_GROUPED, Kind.K_ENDS) if tile.column_scales else list(Kind)[:4]
    for i in range(count):
        kind, garbage = kinds[i % len(kinds)], draw.random() < 0.25
        groups = draw.choice([1, 2, 5, 8, 33, 80])
        m, k, alignment = (
            draw.randint(1, draw.choice([100, 1200])),
            128 * draw.randint(1, 6),
            draw.choice([64, 128, 192]),
        )
        anything = [draw.randint(-(2**31), 2**31 - 1) for _ in range(groups)]
        sizes = [draw.choice([0, 1, draw.randint(0, 20), draw.randint(0, 300)]) for _ in range(groups)]
        layout: list[int] = []
        if kind == Kind.DENSE:
            groups = 1
        elif kind == Kind.CONTIGUOUS:
            alignment = tile.block_m * draw.randint(1, 2)
            for _ in range(draw.randint(1, 7)):
                owner = draw.choice([-1, draw.randrange(groups), draw.randrange(groups), groups, -(2**31)])
                layout += [owner] * draw.randint(1, 3 * tile.block_m)
                if garbage:  # holes, and rows that nobody may have, but no second group within the alignment
                    layout = [x if draw.random() > 0.01 else draw.choice([-1, groups, 2**31 - 1]) for x in layout]
                layout += [-1] * (-len(layout) % alignment)
            del layout[draw.randint(max(1, len(layout) - alignment), len(layout)) :]
            m = len(layout)
        elif kind == Kind.MASKED:
            layout = anything if garbage else sizes
        elif kind == Kind.ENDS:
            for size in sizes:
                layout.append(align(layout[-1] if layout else 0, alignment) + size)
            layout = anything if garbage else layout
        else:
            alignment, m = 128 * draw.randint(1, 2), draw.randint(1, 300)
            k = 128 * (2**23 - 1 if garbage else draw.randint(1, 60))  # whose sum passes 2^32
            layout = [128 * draw.randint(0, 3) for _ in range(groups)]
            if kind == Kind.K_ENDS:
                layout = [align(sum(layout[:i]), alignment) + draw.randint(0, 100) for i in range(groups)]
            layout = anything if garbage else layout
        counter = draw.choice([0, 1, 7]) if kind in (Kind.MASKED, Kind.ENDS) else 0
        ctas = tile.cluster * draw.randint(1, draw.choice([5, 40]))
        n, band = 8 * draw.randint(1, draw.choice([8, 60])), draw.randint(1, draw.choice([2, 16]))
        tile_rows = heuristics.tile_rows(tile, Problem(m, n, k)) if kind == Kind.DENSE else tile.block_m
        yield Case(kind, m, n, k, tile_rows, band, groups, alignment, layout, counter, ctas)


@cache
def program(tile, folder: Path) -> Path:
    constants = [line for line in tile.render().splitlines() if line.startswith("constexpr int ")]
    (folder / "ptx").mkdir()
    (folder / "ptx" / "base.cuh").write_text("")  # warps.cpp has it all
    (folder / "config.cuh").write_text("#pragma once\n" + "\n".join(constants))
    for source in (KERNELS / "problem.cuh", KERNELS / "scheduler.cuh", Path(__file__).parent / "warps.cpp"):
        shutil.copy(source, folder)
    built = folder / "warps"
    subprocess.run([str(COMPILER), "-std=c++17", "-O1", str(folder / "warps.cpp"), "-o", str(built)], check=True)
    return built


def stored(tile, case: Case, t: Placed) -> list[int]:
    """The rows of d that the tile writes."""
    rows = range(t.m, min(t.end, t.m + tile.block_m))
    if tile.column_scales:
        return list(rows)
    boxed = 0 if t.rows == SCATTERED else len(rows)
    if t.end != case.m:
        boxed -= boxed % tile.store_m
    boxes = range(t.m, min(t.m + align(boxed, tile.store_m), case.m))
    left = [row for row in rows[boxed:] if case.kind != Kind.CONTIGUOUS or case.layout[row] == t.group]
    return [*boxes, *left]


def check(tile, case: Case, tiles: list[Placed]) -> None:
    along_k = case.kind >= Kind.K_GROUPED
    batches = case.groups if along_k or case.kind == Kind.MASKED else 1
    written = np.zeros((batches, ceil_div(case.n, tile.block_n), case.m), int)
    by_cta: dict[int, list[Placed]] = {cta: [] for cta in range(case.ctas)}
    ranges = case.ranges() if case.kind not in (Kind.DENSE, Kind.CONTIGUOUS) else []
    for t in tiles:
        by_cta[t.cta].append(t)
        if t.rows == NONE:
            continue
        assert t.group < case.groups and t.batch < batches and t.end <= case.m
        rows = stored(tile, case, t)
        if case.kind == Kind.CONTIGUOUS:
            assert all(case.layout[row] == t.group for row in rows)
        elif case.kind in (Kind.ENDS, Kind.MASKED):
            assert not rows or (ranges[t.group][0] <= rows[0] and rows[-1] < ranges[t.group][1])
        if along_k:
            assert (t.k, t.k_blocks) == (ranges[t.group][0], ceil_div(ranges[t.group][1] - ranges[t.group][0], 128))
        if t.n < case.n:
            written[t.batch, t.n // tile.block_n, rows] += 1
    if case.kind == Kind.CONTIGUOUS:
        want = np.array([0 <= owner < case.groups for owner in case.layout], int)[None]
    elif case.kind == Kind.MASKED:
        want = np.array([np.arange(case.m) < end for _, end in ranges], int)
    elif case.kind == Kind.ENDS:
        want = sum((np.arange(case.m) >= start) & (np.arange(case.m) < end) for start, end in ranges)[None]
    else:
        want = np.ones((1, case.m), int)
    assert (written == want[:, None]).all()
    for pair in range(0, case.ctas, 2) if tile.cluster == 2 else ():
        for x, y in zip(by_cta[pair], by_cta[pair + 1], strict=True):  # they load for each other
            assert (x.rows == NONE) == (y.rows == NONE)
            if x.rows != NONE and not x.apart:
                assert (x.group, x.batch, x.k_blocks, y.apart) == (y.group, y.batch, y.k_blocks, 0)
                assert x.n == y.n if tile.cluster_m == 2 else x.m == y.m


@pytest.mark.parametrize("shape", SHAPES + COLUMNS, ids=str)
def test_every_row_is_in_one_tile(shape, tmp_path: Path):
    tile = make_tile(*shape[:4], column_scales=len(shape) > 4)
    tried = list(cases(random.Random(1), tile, 120))
    lines = "\n".join(case.line(seed, 2) for seed, case in enumerate(tried))
    said = subprocess.run(
        [program(tile, tmp_path)], input=lines, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    launches = re.split(r"left (\d+)\n", said)
    assert len(launches) == 4 * len(tried) + 1
    assert set(launches[1::2]) == {"0"}, "the next launch would not start from 0"
    for i, launch in enumerate(launches[:-1:2]):
        check(tile, tried[i // 2], [Placed(*map(int, line.split())) for line in launch.splitlines()])
