"""Tiles to test: all that the planner may choose, and pairs of CTAs in either direction, which the kernel can do too.

Most of those pairs no plan has. `made` compiles a tile before it is used, so that tests run where calls may not.
"""

from __future__ import annotations

from deep_gemm import heuristics
from deep_gemm.plan import Tile, make_tile
from deep_gemm.runtime.compiler import compile_many

PAIRS = (
    *(
        (64, 16, 2, 1),
        (64, 48, 1, 2),
        (64, 64, 2, 1),
        (64, 96, 1, 2),
        (64, 128, 1, 2),
        (64, 192, 2, 1),
        (64, 256, 1, 2),
    ),
    *((128, 32, 1, 2), (128, 64, 2, 1), (128, 80, 1, 2), (128, 112, 2, 1), (128, 128, 1, 2), (128, 192, 1, 2)),
    *((192, 96, 2, 1), (192, 128, 1, 2)),
)
ROWS = (*heuristics.tiles(), *heuristics.spare_tiles(), *(make_tile(*shape) for shape in PAIRS))  # with BF16 results
COLUMNS = (*heuristics.tiles(True), make_tile(128, 32, column_scales=True))
EVERY = (*ROWS, *COLUMNS)


def of(column_scales: bool) -> tuple[Tile, ...]:
    return COLUMNS if column_scales else ROWS


def made(*shape: int, **more: int | bool) -> Tile:
    """make_tile, compiled."""
    tile = make_tile(*shape, **more)  # type: ignore[arg-type]
    compile_many([tile.source()])
    return tile
