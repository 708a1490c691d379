"""Random multiplications of every kind, checked bit by bit: python -m deep_gemm.testing.fuzz --seed 1 --minutes 10

A case follows from its seed and number alone. One that fails prints the command that repeats it, and nothing but it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import config, gemm, heuristics, layout, problem, reference
from ..layout import align, ceil_div
from ..problem import E4M3, Kind, Operands, Pair, Problem
from ..runtime.compiler import compile_many

WHOLE = 2**28  # products of a problem that is checked as a whole; of larger ones, some rows and blocks of columns
ELEMENTS = 2**27  # of a, of b and of d, at most
WAIT_SECONDS = 60  # for a kernel, before it is taken to hang
GUARD = 12345.0  # around d
EXTREMES = (-1, -(2**31), 2**31 - 1)
NAN_CODE = 0x7F


@dataclass(frozen=True)
class Case:
    """A call, and what it is to be held against.

    Attributes:
        text: what is called, in short.
        call: multiplies into d.
        problem, operands: what the call makes of its arguments; d is what it writes into.
        ranges: of every group, the first row and the row after the last; or columns, where they are grouped along K.
        memory: what d lies in, otherwise full of GUARD.
        set_up: settings of the call.
    """

    text: str
    call: Callable[[], None]
    problem: Problem
    operands: Operands
    ranges: list[tuple[int, int]]
    memory: torch.Tensor
    set_up: Draw


class Draw:
    """Draws everything that is random in one case."""

    def __init__(self, seed: int, number: int, device: str) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.device = device
        self.generator = torch.Generator(device).manual_seed(self.rng.getrandbits(62))
        self.large = device == "cuda" and self.rng.random() < 0.12
        self.bits = self.rng.random() < 0.5
        self.alignment = self.rng.choice((64, 128, 128, 128, 192, 256))
        self.num_sms = self.rng.choice((None, None, self.rng.randint(1, config.get_num_sms())))
        self.tc_util = self.rng.choice((100, 100, 100, 50))
        self.pdl = self.rng.random() < 0.5
        self.block: tuple[int, int] = (1, 1)

    def limit_tiles(self, *block_ms: int) -> None:
        """Picks one of those and of all columns, now and then, for tiles that the planner would not choose."""
        if self.rng.random() < 0.5:
            self.block = self.rng.choice((1, *block_ms)), self.rng.choice((1, 16, 32, 64, 128))

    def size(self, usual: int, most: int, odd: Sequence[int]) -> int:
        """Small sizes as often as larger ones, and the odd ones."""
        limit = most if self.large else usual if self.device == "cuda" else usual // 2
        odd = [x for x in odd if x <= limit]
        return self.rng.choice(odd) if self.rng.random() < 0.3 else int(limit ** self.rng.random())

    def rows(self) -> int:
        return self.size(300, 8192, (1, 7, 8, 16, 32, 48, 63, 64, 65, 96, 100, 127, 128, 129, 192, 255, 4096))

    def n(self) -> int:
        return self.size(600, 8192, (8, 16, 64, 136, 192, 264, 448, 576, 2112, 7168)) + 7 & ~7

    def k(self) -> int:
        return self.size(800, 8192, (16, 128, 192, 256, 384, 400, 576, 640, 1152, 7168, 7296)) + 15 & ~15

    def groups(self, n: int, k: int) -> int:
        most = self.rng.choice((2, 5, 12, 40)) if self.device == "cuda" else 5
        return min(self.rng.randint(1, most), max(1, ELEMENTS // (n * k)))

    def values(self, *shape: int) -> torch.Tensor:
        """Normal, or every E4M3 pattern but NaN."""
        if not self.bits:
            x = torch.randn(shape, generator=self.generator, device=self.device)
            return x.mul_(100).clamp_(-448, 448).to(E4M3)
        x = torch.randint(0, 254, shape, generator=self.generator, device=self.device, dtype=torch.int16)
        return (x + (x >= NAN_CODE)).to(torch.uint8).view(E4M3)  # skips 127 and, at the end, 255

    def scales(self, *shape: int) -> torch.Tensor:
        """Of one size, or of many, some negative or zero."""
        x = torch.rand(shape, generator=self.generator, device=self.device).mul_(0.01).add_(0.005)
        if not self.bits:
            return x
        exponent = torch.randint(-40, 40, shape, generator=self.generator, device=self.device)
        sign = torch.randint(-1, 8, shape, generator=self.generator, device=self.device).clamp_(-1, 1)
        return torch.ldexp(x, exponent) * sign

    def matrix(self, *shape: int, dtype: torch.dtype, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, columns] or [groups, rows, columns] of inner stride 1, and the memory it lies in, full of `fill`."""
        *groups, rows, columns = shape
        unit = 16 // dtype.itemsize
        pitch = align(columns, unit) + unit * self.rng.choice((2, 2, 3, 7))
        group_major = not groups or self.rng.random() < 0.7
        outer = (*groups, rows + 4) if group_major else (rows + 4, *groups)
        memory = torch.full((*outer, pitch), fill, device=self.device).to(dtype)
        in_order = memory if group_major else memory.movedim(0, 1)
        return in_order[..., 2 : rows + 2, unit : unit + columns], memory

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        """Values, as they are or within wider memory, whose other values are NaN."""
        if self.rng.random() < 0.4:
            return x
        view, _ = self.matrix(*x.shape, dtype=E4M3, fill=float("nan"))
        _bytes(view).copy_(_bytes(x))
        return view

    def placed(self, x: torch.Tensor) -> torch.Tensor:
        """Scales, row-major or as the kernel reads them, or with their dimensions in any order, in wider memory."""
        way = self.rng.random()
        if way < 0.4:
            return x if way < 0.2 else layout.get_mn_major_tma_aligned_tensor(x)
        order = self.rng.sample(range(x.dim()), x.dim())
        memory = x.new_full([x.shape[i] + self.rng.choice((0, 0, 1, 3, 4)) for i in order], float("nan"))
        view = memory.permute([order.index(i) for i in range(x.dim())])[tuple(slice(size) for size in x.shape)]
        return view.copy_(x)

    def operand(self, values: torch.Tensor, scales: torch.Tensor, dead: torch.Tensor | None = None) -> Pair:
        """As a call takes them; what belongs to nobody is NaN, or huge."""
        if dead is not None:
            _bytes(values)[dead] = self.rng.choice((NAN_CODE, 0x7E))
            scales[dead] = self.rng.choice((float("nan"), 1e38))
        return self.strided(values), self.placed(scales)

    def weights(self, groups: int, n: int, k: int) -> Pair:
        return self.operand(self.values(groups, n, k), self.scales(groups, ceil_div(n, 128), ceil_div(k, 128)))

    def result(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
        """d, full of NaN, and what it lies in."""
        d, memory = self.matrix(*shape, dtype=dtype, fill=GUARD)
        return d.fill_(float("nan")), memory

    def addend(self, d: torch.Tensor) -> torch.Tensor | None:
        """None, another tensor, or d itself, which then holds numbers."""
        way, x = self.rng.randrange(3), torch.randn(d.shape, generator=self.generator, device=self.device)
        return None if way == 0 else x if way == 1 else d.copy_(x)

    def count(self, most: int) -> int:
        """Rows of a group."""
        small = (0, 0, 1, 7, 63, 64, 65, 127, 128, 129, 200)
        return self.rng.choice((*(x for x in small if x <= most), self.rng.randint(0, most), most))


def dense(draw: Draw) -> Case:
    m, n, k = draw.rows(), draw.n(), draw.k()
    draw.limit_tiles(64, 128, 192)
    a = draw.operand(draw.values(m, k), draw.scales(m, ceil_div(k, 128)))
    b = draw.operand(draw.values(n, k), draw.scales(ceil_div(n, 128), ceil_div(k, 128)))
    d, memory = draw.result(m, n)
    described, operands = problem.dense(a, b, d)
    form = draw.rng.choice(("nt", "nn", "tn", "tt"))
    lhs, rhs = _turned(a, form[0] == "t"), _turned(b, form[1] == "n")
    name = f"fp8_gemm_{form}"
    return Case(name, lambda: getattr(gemm, name)(lhs, rhs, d), described, operands, [(0, m)], memory, draw)


def column_scales(draw: Draw) -> Case:
    m, n, k = draw.rows(), draw.n(), draw.k()
    draw.limit_tiles(64, 128)
    a, b = (draw.operand(draw.values(rows, k), draw.scales(rows, ceil_div(k, 128))) for rows in (m, n))
    d, memory = draw.result(m, n, dtype=torch.float32)
    c = draw.addend(d)
    described, operands = problem.dense(a, b, d, c, True)

    def call() -> None:
        gemm.fp8_gemm_nt(a, b, d, c, recipe=(1, 1, 128))

    return Case("fp8_gemm_nt, recipe (1, 1, 128)", call, described, operands, [(0, m)], memory, draw)


def contiguous(draw: Draw) -> Case:
    """Groups in any order, some without rows, some twice; -1 and what is out of range within and behind them."""
    n, k, rng = draw.n(), draw.k(), draw.rng
    groups = draw.groups(n, k)
    draw.limit_tiles(*(m for m in (64, 128, 192) if draw.alignment % m == 0))
    most = min(4096 if draw.large else 300, ELEMENTS // max(n, k) // (groups + 1))
    padding = (-1, -1, -1, groups, *EXTREMES)
    owners: list[int] = []
    for group in [*rng.sample(range(groups), groups), rng.randrange(groups)]:
        rows = [group] * draw.count(most)
        for _ in range(rng.choice((0, 0, 3)) if rows else 0):
            rows[rng.randrange(len(rows))] = rng.choice(padding)
        owners += rows + [-1 if rng.random() < 0.9 else rng.choice(padding) for _ in range(-len(rows) % draw.alignment)]
    owners += [-1] * rng.choice((0, 1, 17, draw.alignment, 1000))
    owners = owners[: len(owners) - rng.choice((0, 0, 5))] or [0]
    indices = torch.tensor(owners, dtype=torch.int32, device=draw.device)
    return _rows_of_one_a(draw, groups, n, k, indices, (indices < 0) | (indices >= groups), ends=False, ranges=[])


def ends(draw: Draw) -> Case:
    """Running ends with gaps."""
    n, k, rng = draw.n(), draw.k(), draw.rng
    groups = draw.groups(n, k)
    draw.limit_tiles(64, 128, 192)
    most = min(4096 if draw.large else 300, ELEMENTS // max(n, k) // (groups + 1))
    ranges = _running(draw.alignment, [draw.count(most) for _ in range(groups)])
    m = max(1, ranges[-1][1], align(ranges[-1][1], draw.alignment) + rng.choice((-3, 0, 0, 130)))
    dead = torch.ones(m, dtype=torch.bool, device=draw.device)
    for start, end in ranges:
        dead[start:end] = False
    indices = torch.tensor([end for _, end in ranges], dtype=torch.int32, device=draw.device)
    return _rows_of_one_a(draw, groups, n, k, indices, dead, ends=True, ranges=ranges)


def _rows_of_one_a(
    draw: Draw,
    groups: int,
    n: int,
    k: int,
    indices: torch.Tensor,
    dead: torch.Tensor,
    ends: bool,
    ranges: list[tuple[int, int]],
) -> Case:
    m, clear = len(dead), draw.rng.random() < 0.5
    expected = draw.rng.choice((None, 1, m // groups)) if ends else None
    a = draw.operand(draw.values(m, k), draw.scales(m, ceil_div(k, 128)), dead)
    b = draw.weights(groups, n, k)
    d, memory = draw.result(m, n)
    form = draw.rng.choice(("nt", "nn"))
    rhs = _turned(b, form == "nn")
    hint: dict[str, Any] = {"expected_m_for_psum_layout": expected} if form == "nt" else {}
    described, operands = problem.contiguous(
        a, b, d, indices, ends, draw.alignment, expected if form == "nt" else None, clear
    )
    name = f"m_grouped_fp8_gemm_{form}_contiguous"

    def call() -> None:
        getattr(gemm, name)(a, rhs, d, indices, use_psum_layout=ends, ensure_zero_padding=clear, **hint)

    return Case(name, call, described, operands, ranges, memory, draw)


def masked(draw: Draw) -> Case:
    n, k, rng = draw.n(), draw.k(), draw.rng
    groups = draw.groups(n, k)
    max_m = min(draw.rows(), max(1, ELEMENTS // (groups * max(n, k))))
    draw.limit_tiles(64, 128, 192)
    real = [draw.count(max_m) for _ in range(groups)]
    if rng.random() < 0.3:  # skewed: few groups have nearly all rows
        real = [x if rng.random() < 0.2 else min(x, 2) for x in real]
    counts = [rng.choice((x, -5, -(2**31)) if x == 0 else (x, x + 9, 2**31 - 1) if x == max_m else (x,)) for x in real]
    limits = torch.tensor(real, device=draw.device)
    dead = torch.arange(max_m, device=draw.device) >= limits[:, None]
    a = draw.operand(draw.values(groups, max_m, k), draw.scales(groups, max_m, ceil_div(k, 128)), dead)
    b = draw.weights(groups, n, k)
    d, memory = draw.result(groups, max_m, n)
    masked_m = torch.tensor(counts, dtype=torch.int32, device=draw.device)
    expected = rng.choice((0, 1, 20, max(1, sum(real) // groups), max_m, 10**6))
    described, operands = problem.masked(a, b, d, masked_m, expected)

    def call() -> None:
        gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected)

    ranges = [(0, count) for count in real]
    return Case(f"m_grouped_fp8_gemm_nt_masked, {expected=}", call, described, operands, ranges, memory, draw)


def k_grouped(draw: Draw) -> Case:
    """K of each group by the CPU, the device or both; the device's may be no multiple of 128, and leave some out."""
    rng, groups = draw.rng, draw.rng.randint(1, 5 if draw.device == "cpu" else 40)
    ks = [128 * rng.choice((0, 1, 1, 2, 3, 9 if draw.large else 1)) for _ in range(groups)]
    on_device = [k + rng.choice((0, 0, 0, 5, 127)) if k else rng.choice((0, 0, -7, 100)) for k in ks]
    given = rng.choice(("cpu", "both", "device"))
    size = sum(ks) + (rng.choice((0, 256)) if given == "device" else 0)
    counts = torch.tensor(on_device if given == "device" else ks, dtype=torch.int32, device=draw.device)
    bounds = [(sum(ks[:group]), sum(ks[: group + 1])) for group in range(groups)]
    draw.alignment = 128
    return _along_k(
        draw, bounds, size, None if given == "device" else ks, None if given == "cpu" else counts, ends=False
    )


def k_ends(draw: Draw) -> Case:
    """Running ends along K, with gaps, within blocks as well."""
    rng, groups = draw.rng, draw.rng.randint(1, 5 if draw.device == "cpu" else 40)
    draw.alignment = rng.choice((128, 128, 256))
    ranges = _running(draw.alignment, [rng.choice((0, 16, 100, 128, 256, 300, 1000)) for _ in range(groups)])
    size = align(ranges[-1][1], 128) + rng.choice((0, 0, 256))
    ends = torch.tensor([end for _, end in ranges], dtype=torch.int32, device=draw.device)
    return _along_k(draw, ranges, size, None, ends, ends=True)


def _along_k(
    draw: Draw,
    ranges: list[tuple[int, int]],
    size: int,
    ks: list[int] | None,
    counts: torch.Tensor | None,
    ends: bool,
) -> Case:
    groups, (m, n) = len(ranges), (min(draw.rows(), 2048), min(draw.n(), 2048))
    draw.limit_tiles(64, 128)

    def operand(rows: int) -> Pair:
        """Every group's [rows, K], flat, one behind the other; NaN where columns are nobody's."""
        values = torch.full((size * rows,), NAN_CODE, dtype=torch.uint8, device=draw.device).view(E4M3)
        scales = torch.full((rows, size // 128), float("nan"), device=draw.device)
        for start, end in ranges:
            own = _group_along_k(values, rows, start, end)[:, : end - start]
            _bytes(own).copy_(_bytes(draw.values(rows, end - start)))
            blocks = slice(start // 128, ceil_div(end, 128))
            scales[:, blocks] = draw.scales(rows, blocks.stop - blocks.start) if end > start else 1.0
        return values, draw.placed(scales)

    a, b = operand(m), operand(n)
    d, memory = draw.result(groups, m, n, dtype=torch.float32)
    c = draw.addend(d)
    described, operands = problem.k_grouped(a, b, d, ks, counts, c, ends, draw.alignment)

    def call() -> None:
        gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, counts, c, use_psum_layout=ends)

    return Case("k_grouped_fp8_gemm_nt_contiguous", call, described, operands, ranges, memory, draw)


KINDS = (dense, dense, column_scales, contiguous, ends, masked, masked, k_grouped, k_ends)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def _turned(pair: Pair, turn: bool) -> Pair:
    return (pair[0].mT, pair[1].mT) if turn else pair


def _running(alignment: int, counts: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for count in counts:
        start = align(ranges[-1][1], alignment) if ranges else 0
        ranges.append((start, start + count))
    return ranges


def _group_along_k(x: torch.Tensor, rows: int, start: int, end: int) -> torch.Tensor:
    """A group's [rows, K], in whole blocks, of a flat operand."""
    width = align(end - start, 128)
    return x[start * rows : (start + width) * rows].view(rows, width)


def _picked(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return _bytes(x).index_select(dim, index).view(E4M3) if x.dtype == E4M3 else x.index_select(dim, index)


def _sample(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and blocks of 128 columns to check: all, or for large problems the edges of groups and some between."""
    p, rng, device = case.problem, case.set_up.rng, case.operands.d.device
    rows, blocks = range(p.m), range(ceil_div(p.n, 128))
    if p.m * p.n * p.k * (p.groups if p.kind == Kind.MASKED else 1) > WHOLE:
        if p.kind == Kind.ENDS:  # behind the last group nothing is written, and another kind says it otherwise
            rows = range(min(p.m, align(case.ranges[-1][1], p.alignment))) or rows
        edges = {0, len(rows) - 1}
        if p.kind < Kind.K_GROUPED:
            edges |= {row for start, end in case.ranges for row in (start, end - 1, end) if row in rows}
        rows = sorted({*rng.sample(sorted(edges), min(len(edges), 40)), *rng.choices(rows, k=40)})
        blocks = sorted({rng.choice(blocks), blocks[-1]})
    return torch.tensor(list(rows), device=device), torch.tensor(list(blocks), device=device)


def _columns(blocks: torch.Tensor, n: int) -> torch.Tensor:
    columns = (blocks[:, None] * 128 + torch.arange(128, device=blocks.device)).flatten()
    return columns[columns < n]


def reduced(
    p: Problem, o: Operands, ranges: list[tuple[int, int]], rows: torch.Tensor, blocks: torch.Tensor
) -> tuple[Problem, Operands]:
    """The multiplication of those rows of a and blocks of 128 rows of b alone. ranges: as a Case has them."""
    columns, counts, kind = _columns(blocks, p.n), o.layout, p.kind
    if kind >= Kind.K_GROUPED:

        def regrouped(x: torch.Tensor, size: int, index: torch.Tensor) -> torch.Tensor:
            result = x.new_empty(p.k * len(index))
            for start, end in ranges:
                own = _bytes(_group_along_k(x, size, start, end)).index_select(0, index)
                _bytes(_group_along_k(result, len(index), start, end)).copy_(own)
            return result

        a, b = regrouped(o.a, p.m, rows), regrouped(o.b, p.n, columns)
    else:
        a, b = _picked(o.a, -2, rows), _picked(o.b, -2, columns)
    if counts is not None and kind == Kind.CONTIGUOUS:
        counts = counts[rows]
    elif counts is not None and kind == Kind.MASKED:
        counts = (rows < counts[:, None]).sum(1, dtype=torch.int32)
    elif counts is not None and kind == Kind.ENDS and len(rows) < p.m:
        kind, counts = Kind.CONTIGUOUS, torch.full_like(rows, -1)
        for group, (start, end) in enumerate(ranges):
            counts[(rows >= start) & (rows < end)] = group

    def of_result(x: torch.Tensor) -> torch.Tensor:
        return _picked(_picked(x, -2, rows), -1, columns)

    a_scales, b_scales = _picked(o.a_scales, -2, rows), _picked(o.b_scales, -2, columns if p.column_scales else blocks)
    c = None if o.c is None else of_result(o.c)
    operands = Operands(a, a_scales, b, b_scales, of_result(o.d), counts, c, o.clear_padding)
    return replace(p, m=len(rows), n=len(columns), kind=kind), operands


@contextmanager
def _settings(draw: Draw) -> Generator[None, None, None]:
    before, alignment = config.current(), layout.get_mk_alignment_for_contiguous_layout()
    try:
        config.set_num_sms(draw.num_sms)
        config.set_tc_util(draw.tc_util)
        config.set_pdl(draw.pdl)
        config.set_block_size_multiple_of(draw.block)
        layout.set_mk_alignment_for_contiguous_layout(draw.alignment)
        yield
    finally:
        config.set_num_sms(before.num_sms)
        config.set_tc_util(before.tc_util)
        config.set_pdl(before.pdl)
        config.set_block_size_multiple_of((before.block_m, before.block_n))
        layout.set_mk_alignment_for_contiguous_layout(alignment)


def _wait_for_gpu() -> None:
    event, start = torch.cuda.Event(), time.monotonic()
    event.record()
    while not event.query():
        if time.monotonic() - start > WAIT_SECONDS:
            raise TimeoutError(f"the kernel still runs after {WAIT_SECONDS} seconds")


def make_case(seed: int, number: int, device: str) -> Case:
    draw = Draw(seed, number, device)
    return draw.rng.choice(KINDS)(draw)


def complaint(case: Case) -> str | None:
    """Runs a case; what is wrong with its result."""
    o, on_gpu = case.operands, case.operands.d.is_cuda
    d = o.d
    start = d.clone()  # the call may add to d
    values = _bytes(o.a)
    fresh = values.clone()
    values.fill_(NAN_CODE)
    with _settings(case.set_up):
        split = gemm.plan_of(case.problem).split if on_gpu else 1
        values.copy_(fresh)  # right before the kernel, which with PDL may start early
        case.call()
        if on_gpu:
            _wait_for_gpu()
    rows, blocks = _sample(case)
    before = o._replace(d=start, c=start if o.c is d else o.c)
    smaller, operands = reduced(case.problem, before, case.ranges, rows, blocks)
    reference.multiply(smaller, operands, exact=on_gpu, split=split)
    got, want = _picked(_picked(d, -2, rows), -1, _columns(blocks, case.problem.n)), operands.d
    integers = torch.int32 if d.dtype == torch.float32 else torch.int16
    wrong = got.view(integers) != want.view(integers)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        where = (*at[:-2], int(rows[at[-2]]), int(_columns(blocks, case.problem.n)[at[-1]]))
        return f"{int(wrong.sum())} of {wrong.numel()} differ; d{list(where)} is {got[at]}, expected {want[at]}"
    d.fill_(GUARD)
    around = int((case.memory != GUARD).sum())
    return f"{around} elements around d were written" if around else None


def describe(case: Case) -> str:
    o, s = case.operands, case.set_up
    strides = ", ".join(f"{name} {x.stride()}" for name, x in zip(o._fields[:5], o[:5], strict=True))
    settings = f"num_sms {s.num_sms}, tc_util {s.tc_util}, pdl {s.pdl}, multiples of {s.block}"
    return f"{case.text}: {case.problem}; strides {strides}; {settings}"


def run_case(seed: int, number: int, device: str, verbose: bool = False) -> bool:
    """Whether a case passes; prints what fails, and how to repeat it."""
    text = "while it was made"
    try:
        case = make_case(seed, number, device)
        text = describe(case)
        if verbose:
            print(f"case {number}: {text}", flush=True)
        wrong = complaint(case)
    except Exception as error:
        wrong = "".join(traceback.format_exception(error))
    if wrong is None:
        return True
    option = "" if device == "cuda" else f" --device {device}"
    print(f"FAILED case {number}: {text}\n  {wrong}", flush=True)
    print(f"  repeat with: python -m deep_gemm.testing.fuzz --seed {seed} --case {number}{option}", flush=True)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deep_gemm.testing.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the cases; others with another")
    parser.add_argument("--minutes", type=float, default=1.0, help="to go on for")
    parser.add_argument("--cases", type=int, help="this many, instead of minutes")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device: pass --device cpu to try the CPU backend")
    if options.device == "cuda" and options.case is None:
        compile_many([kernel.source() for columns in (False, True) for kernel in heuristics.kernels(columns)])
    start = said = time.monotonic()
    number = failures = 0
    first = options.case or 0
    limit = 1 if options.case is not None else options.cases
    while number < limit if limit is not None else time.monotonic() - start < options.minutes * 60:
        failures += not run_case(options.seed, first + number, options.device, options.case is not None)
        number += 1
        if failures >= 10:
            break
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{number} cases, {failures} failures, {said - start:.0f} s", flush=True)
    print(f"{number} cases, {failures} failures", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
