"""The compile-time choices of a kernel, what they cost, and their rendering into the kernel's `config.cuh`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

from .layout import align
from .problem import Kind, Problem
from .runtime.compiler import Source
from .runtime.device import MAX_SMEM_BYTES

BLOCK_K = 128
WARPGROUP = 128  # threads
MAX_STAGES = 20
ENTRY = "fp8_gemm"
PAIR = 2  # CTAs of neighbouring rows of strips
IN_PAIRS = " in pairs"  # after the name of a plan of strips that come so
COUNTERS = 16384  # of claimed tiles, in every kernel's memory
DEBUG_WAIT_SECONDS = 2  # that a barrier is waited for in kernels of debug mode
DESCRIBE, REPORT = "describe", "report"  # the kernels beside those that multiply

# chunk_n and banks of a sole warpgroup where one wgmma of the tile's width would leave too few registers for a second
WIDE = {
    144: (48, 2),
    160: (80, 2),
    176: (88, 2),
    192: (64, 2),
    224: (112, 1),
    256: (64, 2),
}


# Without and with column scales: rows and columns of tiles with two banks for which turns of 8 K blocks are faster than
# of 4, which compile in half the time and leave room for other instructions (docs/facts.md, the tool chain).
EIGHTS = {
    False: ((64, 16), (64, 32), (64, 48), (64, 64), (64, 192), (64, 256)),
    True: ((64, 32), (128, 128)),
}


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for. Everything else is an argument of the launch.

    Attributes:
        block_m, block_n: rows and columns of d that one CTA computes at a time.
        chunk_n: columns of one wgmma; a warpgroup works through block_n / chunk_n chunks.
        banks: temporary accumulators. With 2, a chunk is promoted while the next one is in the tensor cores.
        unroll: K blocks of one turn of the main loop. With two banks the tensor cores are waited for at its end.
        stages: K blocks in flight in shared memory.
        cluster_m, cluster_n: CTAs that share tiles of b (neighbours along M) or of a (along N) by multicast.
        column_scales: a scale per row of b and 128 columns, and FP32 results, instead of one per 128x128, and BF16.
        parts: 2 if the left and the right half of the result go through shared memory one after the other. That leaves
            room for another stage, and takes some 1000 clocks a tile.
    """

    block_m: int
    block_n: int
    chunk_n: int
    banks: int
    unroll: int
    stages: int
    cluster_m: int
    cluster_n: int
    column_scales: bool = False
    parts: int = 1

    @property
    def warpgroups(self) -> int:
        return self.block_m // 64

    @property
    def threads(self) -> int:
        return (self.warpgroups + 1) * WARPGROUP

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n

    @property
    def narrows(self) -> bool:
        """Whether only the first of two chunks is loaded, multiplied and stored where no more columns are wanted."""
        return self.banks == 1 and self.block_n == 2 * self.chunk_n and self.chunk_n % self.store_n == 0

    @property
    def ranges(self) -> int:
        """Main loops, for so many ranges of the column where a tile's second scale of b begins."""
        return 4 if self.warpgroups == 2 and self.banks == 1 and gcd(self.chunk_n, 128) < 64 else 1

    @property
    def b_rows(self) -> int:
        """Rows of b that one copy brings."""
        return self.chunk_n if self.narrows else self.block_n // self.cluster_m

    @property
    def store_n(self) -> int:
        """Columns of one store of d: 128, 64 or 32 bytes, the width of its swizzle."""
        return gcd(self.block_n, 64)

    @property
    def store_m(self) -> int:
        """Rows of one store of d. A tile's last ones, if they are fewer and others follow, are stored one by one."""
        return 32

    @property
    def accumulators(self) -> int:
        """Registers that a consumer thread holds sums in."""
        return self.block_n // 2 + self.banks * self.chunk_n // 2

    @property
    def registers(self) -> tuple[int, int]:
        """What setmaxnreg leaves a consumer thread and one of the last warpgroup; a sole consumer group needs none."""
        return (152, 56) if self.warpgroups == 3 else (232, 40)

    @property
    def smem_bytes(self) -> int:
        """The size of the kernel's SharedStorage, which asserts it."""
        operands = (self.block_m + self.block_n) * BLOCK_K
        result = 128 if self.column_scales else self.block_m * self.block_n * 2 // self.parts
        scales = self.block_m * 4 + (self.block_n * 4 if self.column_scales else 16)
        tiles_and_barriers = 4 * 40 + ((self.stages + 4 + 1) * 2 + 2) * 8
        return align(self.stages * (operands + scales) + result + tiles_and_barriers, 1024)

    @property
    def name(self) -> str:
        cluster = f" cluster {self.cluster_m}x{self.cluster_n}" if self.cluster > 1 else ""
        more = " with column scales" * self.column_scales + " in parts" * (self.parts > 1)
        return f"{self.block_m}x{self.block_n}{cluster}{more}"

    def render(self, wait_limit: int = 0) -> str:
        """The text of config.cuh. `wait_limit`: about how many seconds a barrier may be waited for, 0 for ever."""
        consumer, producer = self.registers
        constants = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "warpgroups": self.warpgroups,
            "store_m": self.store_m,
            "narrows": self.narrows,
            "ranges": self.ranges,
            "counters": COUNTERS,
            "smem_bytes": self.smem_bytes,
            "consumer_registers": consumer,
            "producer_registers": producer,
            "wait_limit": wait_limit,
        }
        return _config(constants, _wgmma_block(self.chunk_n, one_statement=self.warpgroups < 3))

    def source(self, wait_limit: int = 0) -> Source:
        """The kernel for this tile, ready to be compiled."""
        return _source(f"{ENTRY}.cu", self.render(wait_limit), kernel_name(self.name, wait_limit > 0))


@dataclass(frozen=True)
class Strip:
    """What the kernel for few rows (decode.cu) is compiled for. A CTA has one tile of d, or a share of its K blocks.

    Attributes:
        swapped: b has the m side of wgmma, a the n side; else the other way round.
        width: rows of what has the n side. What has the m side has 64 for each warpgroup.
        ctas_per_sm: for so many CTAs on an SM there are registers.
        unroll: K blocks of one turn of the main loop, whose stages lie one behind the other. One is promoted while the
            next is in the tensor cores; at a turn's end nothing is.
    """

    swapped: bool
    width: int
    warpgroups: int
    ctas_per_sm: int
    unroll: int

    @property
    def block_m(self) -> int:
        return self.width if self.swapped else 64 * self.warpgroups

    @property
    def block_n(self) -> int:
        return 64 * self.warpgroups if self.swapped else self.width

    @property
    def b_rows(self) -> int:
        return self.block_n

    @property
    def column_scales(self) -> bool:
        return False

    @property
    def threads(self) -> int:
        return self.warpgroups * WARPGROUP + 64

    @property
    def smem_bytes(self) -> int:
        """The most that a launch may ask for."""
        return MAX_SMEM_BYTES

    def smem_bytes_of(self, stages: int, split: int) -> int:
        """The size of the kernel's Storage."""
        operands = (self.block_m + self.block_n) * BLOCK_K + max(32, self.block_m) * 4
        sums = self.block_m * self.block_n * 4 // split * (split - 1)
        return stages * (operands + 16) + 32 + sums

    @property
    def name(self) -> str:
        return f"{self.block_m}x{self.block_n} {'swapped' if self.swapped else 'strip'}"

    def render(self, wait_limit: int = 0) -> str:
        """The text of config.cuh."""
        constants = {f.name: getattr(self, f.name) for f in fields(self)} | {"wait_limit": wait_limit}
        return _config(constants, _wgmma(self.width))

    def source(self, wait_limit: int = 0) -> Source:
        """The kernel for this strip, ready to be compiled."""
        return _source("decode.cu", self.render(wait_limit), kernel_name(self.name, wait_limit > 0))


_HEADER = """\
// Generated by deep_gemm/plan.py: a tile's constants, and the one wgmma it uses.
#pragma once
#include "ptx/base.cuh"
"""


def _config(constants: dict[str, int], wgmma: str) -> str:
    lines = [f"constexpr int {name.upper()} = {int(value)};" for name, value in constants.items()]
    return "\n".join([_HEADER, *lines, "", wgmma])


def _wgmma(n: int) -> str:
    return f"""\
// wgmma.mma_async: d (+)= a @ b.T, 64 x {n} x 32; both operands through descriptors of shared memory
DEVICE void wgmma(float (&d)[{n // 2}], uint64_t a, uint64_t b, bool accumulate) {{
{_wgmma_statement(n, ["a"], ["b"], "int(accumulate)")}
}}
"""


def _wgmma_block(n: int, one_statement: bool) -> str:
    """The wgmmas of a K block. In one statement they compile a fifth faster than one by one, to the same code.

    But of three warpgroups, for which ptxas then spreads registers so that 192x128 is 3 to 4 % slower (docs/facts.md,
    the tool chain).
    """
    steps = range(0, BLOCK_K // 16, 2)  # 32 bytes each, in units of 16
    if one_statement:
        before, body = "", _wgmma_statement(n, [f"a + {i}" for i in steps], [f"b + {i}" for i in steps], "0")
    else:
        before = f"{_wgmma(n)}\n"
        body = "\n".join(f"    wgmma(d, a + {i}, b + {i}, {'true' if i else 'false'});" for i in steps)
    return f"""\
{before}// d = a @ b.T, 64 x {n} x {BLOCK_K}
DEVICE void wgmma_block(float (&d)[{n // 2}], uint64_t a, uint64_t b) {{
{body}
}}
"""


def _wgmma_statement(n: int, a: list[str], b: list[str], accumulate: str) -> str:
    """One wgmma for each pair of descriptors, of which the first adds to d only if that is wanted."""
    registers = n // 2
    outputs = ", ".join(f"%{i}" for i in range(registers))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(registers))
    instruction = f'"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 "\n        "{{{outputs}}}'
    instructions = "\n        ".join(
        f'{instruction}, %{registers + 2 * i}, %{registers + 2 * i + 1}, {"1" if i else "p"}, 1, 1;\\n"'
        for i in range(len(a))
    )
    descriptors = ", ".join(f'"l"({x}), "l"({y})' for x, y in zip(a, b, strict=True))
    return f"""\
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{registers + 2 * len(a)}, 0;\\n"
        {instructions}
        "}}"
        : {operands}
        : {descriptors}, "r"({accumulate}));"""


@cache
def _kernel_texts() -> dict[str, str]:
    folder = Path(__file__).parent / "kernels"
    names = [f"{ENTRY}.cu", "decode.cu", "describe.cu", "report.cu"]
    names += [f"{part}.cuh" for part in ("problem", "scheduler", "storage", "tiles", "store", "wait")]
    names += [f"ptx/{part}.cuh" for part in ("base", "barrier", "tma", "wgmma", "matrix")]
    return {name: (folder / name).read_text() for name in names}


def _source(name: str, config: str, kernel: str) -> Source:
    texts = _kernel_texts()
    headers = tuple((header, text) for header, text in texts.items() if header.endswith(".cuh"))
    return Source(name, texts[name], (("config.cuh", config), *headers), kernel)


def kernel_name(name: str, debug: bool) -> str:
    """What a kernel is called, to people."""
    return f"{name} debug" if debug else name


@dataclass(frozen=True)
class Cost:
    """What the model expects of a launch, in microseconds, and what it is made of (heuristics.py)."""

    us: float
    start_us: float  # from one launch to the next
    waves: float  # tiles that the busiest CTA computes, halves and what claiming evens out included
    block_ns: float  # of one K block
    tile_ns: float  # of one tile besides its K blocks
    memory_us: float  # to move every operand once
    power_us: float  # at the rate that the GPU's power allows
    end_us: float  # to store the last tile

    def __str__(self) -> str:
        return (
            f"{self.us:.1f} us: start {self.start_us:.1f}, end {self.end_us:.1f}, memory {self.memory_us:.1f} and "
            f"power {self.power_us:.1f} beside {self.waves:.3g} wave{'s' * (self.waves != 1)} of tiles: "
            f"{self.block_ns:.0f} ns per K block and {self.tile_ns:.0f} ns per tile"
        )


def norm(p: float, *terms: Any) -> Any:
    """The p-norm of times that go by side by side: the larger p, the more the longest alone decides."""
    return sum(term**p for term in terms) ** (1 / p)


@dataclass(frozen=True, eq=False)
class Plan:
    """A tile, and how a launch walks a problem's output with it. Compared by identity, which is fast.

    Attributes:
        ctas: the grid; of tiles persistent, so never more than there are SMs.
        band: rows of tiles (of clusters) that are walked together, so that operands are found in L2.
        tc_util: percent of the tensor cores' peak that may be used.
        pdl: whether the launch may overlap with the kernel before it.
        stages: K blocks in flight in shared memory.
        split: CTAs of a cluster that each multiply a part of K: part i the K blocks from blocks * i // split on.
    """

    problem: Problem
    tile: Tile | Strip
    ctas: int
    band: int
    tc_util: int
    pdl: bool
    cost: Cost
    stages: int
    split: int = 1

    @property
    def name(self) -> str:
        """What tells it from the problem's other plans: the tile's name; of a strip how it is launched, too."""
        if isinstance(self.tile, Tile):
            return self.tile.name
        return f"{self.tile.name} K/{self.split} stages {self.stages}" + IN_PAIRS * (self.cluster > self.split)

    @property
    def cluster(self) -> int:
        """CTAs of a cluster.

        Of strips those that share a tile; or else, of two rows of strips, the two of a column, for then these are
        neighbours that start together, and what both ask for comes from L2 once.
        """
        if isinstance(self.tile, Tile):
            return self.tile.cluster
        return self.split if self.split > 1 or self.problem.m <= self.tile.block_m else PAIR

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.tile.smem_bytes if isinstance(self.tile, Tile) else self.tile.smem_bytes_of(self.stages, self.split)

    @property
    def claims(self) -> bool:
        """Whether CTAs claim tiles one by one: costs are unequal, and only the device knows how many there are."""
        return self.problem.kind in (Kind.MASKED, Kind.ENDS)

    def __str__(self) -> str:
        t = self.tile
        chunk_n, banks, walk = (
            (t.chunk_n, t.banks, f"bands of {self.band}") if isinstance(t, Tile) else (t.width, 2, f"K in {self.split}")
        )
        return (
            f"{t.name}, wgmma n{chunk_n} x {banks} banks, {self.stages} stages, {self.smem_bytes / 1024:.0f} KB, "
            f"{self.ctas} CTAs, {walk}"
        )


def make_tile(
    block_m: int, block_n: int, cluster_m: int = 1, cluster_n: int = 1, column_scales: bool = False, parts: int = 1
) -> Tile:
    """The tile of that shape, with everything that follows from the shape.

    While a warpgroup promotes, something has to be in the tensor cores. Another warpgroup's wgmma will do if it is
    wide: then one bank is enough, and leaves registers for wide chunks. Every chunk reads a from shared memory anew,
    which chunks of 64 columns keep busy all the time (docs/facts.md). Narrow tiles, and a sole warpgroup's, have two
    banks, one of which is queued. Shared memory that the result leaves goes to stages.
    """
    if column_scales:
        chunk_n, banks = min(block_n, 64), 2  # scales of a chunk's columns take registers as well
    elif block_m == 192 or (block_m == 128 and block_n >= 96):
        chunk_n, banks = block_n if block_n <= 192 else block_n // 2, 1
    else:
        chunk_n, banks = (block_n, 2) if block_n <= 128 else WIDE[block_n]

    clusters = cluster_m * cluster_n == 2
    if banks == 1:
        unroll = 1 if block_m != 128 else 2 if clusters and block_n == 256 and parts == 1 else 4
    elif chunk_n != block_n and chunk_n > 80:
        unroll = 2
    else:
        eights = (block_m, block_n) in EIGHTS[column_scales] and not (clusters and chunk_n != block_n)
        unroll = 8 if eights else 4

    def tile(stages: int) -> Tile:
        return Tile(block_m, block_n, chunk_n, banks, unroll, stages, cluster_m, cluster_n, column_scales, parts)

    return tile(max(s for s in range(1, MAX_STAGES + 1) if tile(s).smem_bytes <= MAX_SMEM_BYTES))


def make_strip(swapped: bool, width: int, warpgroups: int = 1) -> Strip:
    """The strip of that shape, for as many CTAs on an SM as find registers there.

    Turns of 8 K blocks pay where these are short, or there is a second warpgroup (docs/facts.md).
    """
    if width <= 16:
        ctas = {1: 4, 2: 3, 3: 2}[warpgroups]
    elif width == 32:
        ctas = 2 if warpgroups == 2 else 3
    else:
        ctas = {1: 2, 2: 1}[warpgroups] if width <= 64 else 1
    return Strip(swapped, width, warpgroups, ctas, unroll=4 if swapped or width > 32 * warpgroups else 8)


def describing_source() -> Source:
    """The kernel that describes groups along K to the copy engine; the same for every tile."""
    return _source("describe.cu", make_tile(64, 32, column_scales=True).render(), DESCRIBE)


def reporting_source() -> Source:
    """The kernel that says, in debug mode, what is wrong with a contiguous grouped layout."""
    return _source("report.cu", "", REPORT)
