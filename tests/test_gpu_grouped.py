"""Groups along M and along K on a Hopper GPU: equal bits with the exact reference, and what broke in other libraries.

Dead rows always hold NaN or 1e38, in values and scales, and d lies between guards.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import late
import pytest
import sanitizer
import tiles
import torch

import deep_gemm
from deep_gemm import gemm, heuristics, reference
from deep_gemm import problem as checks
from deep_gemm.config import Config
from deep_gemm.plan import describing_source
from deep_gemm.problem import E4M3, Kind, Operands, Problem
from deep_gemm.runtime import device
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.runtime.launch import launch
from deep_gemm.testing import fuzz

pytestmark = pytest.mark.gpu
GUARD, NAN = 12345.0, float("nan")
KINDS = ["contiguous", "ends", "masked", "columns", "k_grouped", "k_ends"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_many([*(tile.source() for tile in tiles.EVERY), describing_source()])


@pytest.fixture(autouse=True)
def everything_restored():
    torch.manual_seed(0)
    yield
    deep_gemm.set_num_sms(None)
    deep_gemm.set_tc_util(100)
    deep_gemm.set_pdl(False)
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)


class Case(NamedTuple):
    """ranges: rows of every group that are real, or columns along K; memory: what d lies in."""

    problem: Problem
    operands: Operands
    ranges: list[tuple[int, int]]
    memory: torch.Tensor


def values(*shape):
    """Every E4M3 pattern but NaN."""
    x = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
    return x.sub_(((x & 0x7F) == 0x7F).to(torch.uint8)).view(E4M3)


def scales(*shape):
    return torch.rand(shape, device="cuda") * 0.01 + 0.005


def blocks(size):
    return deep_gemm.ceil_div(size, 128)


def weights(groups, n, k):
    return values(groups, n, k), scales(groups, blocks(n), blocks(k))


def result(*shape, dtype=torch.bfloat16):
    """A NaN-filled d, and what it lies in."""
    memory = torch.full((*shape[:-2], shape[-2] + 4, shape[-1] + 32), GUARD, dtype=dtype, device="cuda")
    d = memory[..., 2 : shape[-2] + 2, 16 : shape[-1] + 16]
    return d.fill_(NAN), memory


def spoilt(a, dead, code=0x7F, scale=NAN):
    a[0].view(torch.uint8)[dead] = code
    a[1][dead] = scale
    return a


def int32(x):
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def running(counts, alignment):
    ranges = []
    for count in counts:
        start = deep_gemm.align(ranges[-1][1], alignment) if ranges else 0
        ranges.append((start, start + count))
    return ranges


def contiguous(
    counts, n=136, k=400, trailing=0, clear=True, spoil=True, indices=None, alignment=128, code=0x7F, scale=NAN
):
    if indices is None:
        indices = []
        for group, count in enumerate(counts):
            indices += [group] * count + [-1] * (-count % alignment)
        indices += [-1] * trailing
    layout, groups = int32(indices), len(counts)
    a = values(len(indices), k), scales(len(indices), blocks(k))
    if spoil:
        spoilt(a, (layout < 0) | (layout >= groups), code, scale)
    d, memory = result(len(indices), n)
    case = checks.contiguous(a, weights(groups, n, k), d, layout, False, alignment, None, clear)
    return Case(*case, [], memory)


def ends(counts, n=136, k=400, trailing=0, clear=True, spoil=True, alignment=128, expected=None, code=0x7F, scale=NAN):
    ranges = running(counts, alignment)
    m = deep_gemm.align(ranges[-1][1], alignment) + trailing
    layout = int32([end for _, end in ranges])
    a = values(m, k), scales(m, blocks(k))
    if spoil:
        dead = torch.ones(m, dtype=torch.bool, device="cuda")
        for start, end in ranges:
            dead[start:end] = False
        spoilt(a, dead, code, scale)
    d, memory = result(m, n)
    case = checks.contiguous(a, weights(len(counts), n, k), d, layout, True, alignment, expected, clear)
    return Case(*case, ranges, memory)


def masked(counts, max_m, n=136, k=400, expected=64, spoil=True, code=0x7F, scale=NAN):
    layout, groups = int32(counts), len(counts)
    a = values(groups, max_m, k), scales(groups, max_m, blocks(k))
    if spoil:
        spoilt(a, torch.arange(max_m, device="cuda") >= layout[:, None], code, scale)
    d, memory = result(groups, max_m, n)
    case = checks.masked(a, weights(groups, n, k), d, layout, expected)
    return Case(*case, [(0, min(max(count, 0), max_m)) for count in counts], memory)


def columns(m, n=136, k=400, c=True):
    d, memory = result(m, n, dtype=torch.float32)
    c = torch.randn(m, n, device="cuda") if c else None
    case = checks.dense((values(m, k), scales(m, blocks(k))), (values(n, k), scales(n, blocks(k))), d, c, True)
    return Case(*case, [(0, m)], memory)


def k_grouped(ks, m=192, n=136, c=False, psum=False):
    """psum: running ends; what fills up the last block of a group is NaN."""
    ranges, groups = running(ks, 128), len(ks)
    size = deep_gemm.align(ranges[-1][1], 128)
    pairs = []
    for rows in (m, n):
        flat = values(size * rows)
        for start, end in ranges if psum else []:
            width = deep_gemm.align(end - start, 128)
            flat.view(torch.uint8)[start * rows : (start + width) * rows].view(rows, width)[:, end - start :] = 0x7F
        pairs.append((flat, scales(rows, size // 128)))
    d, memory = result(groups, m, n, dtype=torch.float32)
    c = torch.randn(groups, m, n, device="cuda") if c else None
    layout = int32([end for _, end in ranges] if psum else list(ks))
    case = checks.k_grouped(*pairs, d, None if psum else ks, layout, c, psum, 128)
    return Case(*case, ranges, memory)


def typical(kind) -> Case:
    """A small problem of that kind, with much of what makes it hard."""
    counts = [129, 0, 1, 128, 63, 200, 64]
    if kind == "contiguous":
        return contiguous(counts, 264, 400, trailing=130)
    if kind == "ends":
        return ends(counts, 264, 400, trailing=130)
    if kind == "masked":
        return masked([-3, 0, 1, 7, 64, 65, 129, 200, 500], 200, 264, 400)
    if kind == "columns":
        return columns(300, 264, 400)
    return (
        k_grouped([128, 0, 384, 256, 1152], c=True) if kind == "k_grouped" else k_grouped([100, 0, 300, 256], psum=True)
    )


def call(case: Case) -> None:
    """By the public function."""
    p, o = case.problem, case.operands
    a, b = (o.a, o.a_scales), (o.b, o.b_scales)
    if p.kind == Kind.DENSE:
        gemm.fp8_gemm_nt(a, b, o.d, o.c, recipe=(1, 1, 128) if p.column_scales else None)
    elif p.kind in (Kind.CONTIGUOUS, Kind.ENDS):
        options: dict[str, Any] = {"use_psum_layout": p.kind == Kind.ENDS, "ensure_zero_padding": o.clear_padding}
        hint = p.expected_m
        gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, o.d, o.layout, expected_m_for_psum_layout=hint, **options)
    elif p.kind == Kind.MASKED:
        gemm.m_grouped_fp8_gemm_nt_masked(a, b, o.d, o.layout, p.expected_m or 1)
    else:
        psum = p.kind == Kind.K_ENDS
        gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, o.d, None, o.layout, o.c, use_psum_layout=psum)


def exact(case: Case) -> torch.Tensor:
    d = torch.full_like(case.operands.d, NAN, memory_format=torch.contiguous_format)
    reference.multiply(case.problem, case.operands._replace(d=d), exact=True, split=gemm.plan_of(case.problem).split)
    return d


def differing(x, y):
    integers = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return (x.contiguous().view(integers) != y.contiguous().view(integers)).sum()


def untouched(case: Case) -> bool:
    """Whether all around d is as it was. d is gone then."""
    case.operands.d.fill_(GUARD)
    return bool((case.memory == GUARD).all())


def check(case: Case, run: Callable[[Case], object] = call, note: object = None) -> None:
    want = exact(case)
    case.operands.d.fill_(NAN)
    run(case)
    assert differing(case.operands.d, want) == 0, (case.problem, note)
    assert untouched(case), (case.problem, note)


def check_sample(case: Case, rows: Sequence[int], column_blocks: Sequence[int]) -> None:
    """Of a large problem, some rows of every group and some blocks of 128 columns."""
    o, at, of = case.operands, *(torch.tensor(x, device="cuda") for x in (rows, column_blocks))
    call(case)
    before = o._replace(d=torch.full((1,), NAN, dtype=o.d.dtype, device="cuda").expand(o.d.shape))
    problem, want = fuzz.reduced(case.problem, before, case.ranges, at, of)
    reference.multiply(problem, want, exact=True, split=gemm.plan_of(case.problem).split)
    got = o.d.index_select(-2, at)
    got = torch.cat([got[..., block * 128 : block * 128 + 128] for block in column_blocks], -1)
    assert differing(got, want.d) == 0, case.problem
    assert untouched(case), case.problem


@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_gives_the_exact_bits(kind):
    """Every BLOCK_N at many offsets to the columns of scales; clusters beside other groups; many tiles per SM."""
    hopper, ran = device.current(0), 0
    cases = [typical(kind)]
    if kind == "contiguous":
        indices = [3] * 5 + [2**31 - 1, -(2**31)] + [3] * 121 + [0] * 128 + [4] * 64 + [5] * 64 + [1] * 128 + [2] * 7
        cases += [contiguous([0] * 4, 808, 272, indices=indices, clear=False), contiguous([128] * 6, 520, 144)]
        cases += [contiguous([64, 1, 64, 200, 63, 64, 5], 264, 272, alignment=64)]  # clusters of 64-row tiles
    elif kind == "ends":
        cases += [ends([1, 100, 128, 3], 808, 272, clear=False), ends([5] * 40, 72, 144, expected=5)]
    elif kind == "masked":
        cases += [masked([40, 41, 3, 0], 40, 808, 272, 20), masked([1, 0] * 20, 48, 72, 144, 1)]
    for case in cases:
        want = exact(case)
        for tile in tiles.of(case.problem.column_scales):
            for num_sms in (132, 3):
                settings = Config(num_sms=num_sms)
                if heuristics.is_legal(tile, case.problem, hopper, settings):
                    case.operands.d.fill_(NAN)
                    launch(heuristics.plan_for(tile, case.problem, hopper, settings), case.operands)
                    assert differing(case.operands.d, want) == 0, (case.problem, tile, num_sms)
                    assert untouched(case), (case.problem, tile, num_sms)
                    ran += 1
    assert ran >= (12 if cases[0].problem.column_scales else 100)


@pytest.mark.parametrize("kind", ["contiguous", "ends", "masked"])
def test_groups_have_the_bits_of_a_dense_multiplication(kind):
    case = typical(kind)
    o = case.operands
    call(case)
    for group in range(case.problem.groups):
        if kind == "masked":
            count = case.ranges[group][1]
            a, a_scales, got = (x[group, :count] for x in (o.a, o.a_scales, o.d))
        else:
            rows = (o.layout == group).nonzero()[:, 0] if kind == "contiguous" else torch.arange(*case.ranges[group])
            index = rows.to("cuda")
            a, a_scales, got = o.a.view(torch.uint8)[index].view(E4M3), o.a_scales[index], o.d[index]
        d = torch.empty_like(got, memory_format=torch.contiguous_format)
        gemm.fp8_gemm_nt((a, a_scales), (o.b[group], o.b_scales[group]), d)
        assert differing(got, d) == 0, group


def test_k_grouped_has_the_bits_of_dense_multiplications():
    case = k_grouped([128, 384, 1152], 192, 136)
    o = case.operands
    call(case)
    for group, (start, end) in enumerate(case.ranges):
        pairs = [
            (x[start * rows : end * rows].view(rows, -1), s[:, start // 128 : end // 128])
            for x, s, rows in ((o.a, o.a_scales, 192), (o.b, o.b_scales, 136))
        ]
        d = torch.empty(192, 136, device="cuda")
        gemm.fp8_gemm_nt(*pairs, d, recipe=(1, 1, 128))
        assert differing(o.d[group], d) == 0, group


@pytest.mark.parametrize("m", [1, 7, 32, 63])
def test_store_box_past_the_matrix(m):
    check(contiguous([0], indices=[0] * m))
    check(ends([m]))
    check(masked([m, m], m))
    check(columns(m))
    check(k_grouped([128, 256], m))


def test_odd_numbers_of_k_blocks():
    check_sample(contiguous([100, 300], 7168, 1152), range(0, 512, 9), range(0, 56, 5))
    check_sample(masked([100, 300], 300, 7168, 1152), range(0, 300, 9), range(0, 56, 5))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("max_m", [7, 4097])
def test_scale_layout_helper(groups, max_m):
    check_sample(masked([max_m] * groups, max_m, 128, 7296), sorted({*range(0, max_m, 200), max_m - 1}), [0])


@pytest.mark.parametrize("n", [8, 16, 576, 2112, 24640])
def test_n_out_of_range_in_the_last_tile(n):
    last = [0, (n - 1) // 128] if n > 128 else [0]
    check_sample(contiguous([100, 28], n, 256), range(256), last)
    check_sample(masked([100, 28], 128, n, 256), range(128), last)
    check_sample(columns(100, n, 256), range(100), last)
    check_sample(k_grouped([128, 256], 100, n), range(100), last)


@pytest.mark.parametrize("num_sms", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_thousand_repeats_give_equal_bits(kind, num_sms):
    """On few SMs every CTA has many tiles."""
    deep_gemm.set_num_sms(num_sms)
    if kind == "contiguous":
        case = contiguous([1000, 3, 0, 500], 2112, 896)
    elif kind == "ends":
        case = ends([1000, 3, 0, 500], 2112, 896)
    elif kind == "masked":
        case = masked([1000, 3, 0, 500], 1000, 2112, 896)
    elif kind == "columns":
        case = columns(1000, 2112, 896)
    else:
        case = k_grouped([896, 128, 0, 256], 500, 1032, psum=kind == "k_ends")
    d, want, differences = case.operands.d, exact(case), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        d.fill_(NAN)
        call(case)
        differences += differing(d, want)
    assert int(differences) == 0


@pytest.mark.parametrize("k", [128, 256, 384, 192, 576, 7296])
@pytest.mark.parametrize("n", [64, 192, 448])
def test_short_k_and_tails(k, n):
    check(contiguous([65, 3], n, k))
    check(masked([65, 3], 100, n, k))
    check(columns(65, n, k))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 129, 191, 255])
def test_group_sizes(rows):
    check(contiguous([rows, 128 - rows % 128, rows], 264, 272))
    check(ends([rows, 128 - rows % 128, rows], 264, 272))
    check(masked([rows, 1, rows], 300, 264, 272))


def test_hang_at_few_columns():
    check_sample(contiguous([576], 16, 7168), range(0, 576, 9), [0])
    check_sample(masked([576], 576, 16, 7168), range(0, 576, 9), [0])


@pytest.mark.parametrize(("n", "k"), [(3072, 4096), (4096, 1536)])
def test_hang_of_skewed_masked_groups(n, k):
    counts = [4001, 1425, 0, 0, 0, 0, 0, 571, 503, 0, 26, 12, 1232, 0, 0, 224]
    rows = sorted({0, 1, 11, 12, 25, 26, 223, 224, 502, 503, 570, 571, 1231, 1232, 1424, 1425, 4000, 4001, 4095})
    check_sample(masked(counts, 4096, n, k, 114), rows, [0, n // 128 - 1])


def test_masked_multicast_with_an_odd_number_of_column_tiles():
    hopper = device.current(0)
    case = masked([300, 5, 200], 300, 3 * 128, 400)
    want = exact(case)
    for shape in ((64, 128, 1, 2), (128, 128, 1, 2), (128, 128, 2, 1), (192, 128, 1, 2), (64, 128, 2, 1)):
        case.operands.d.fill_(NAN)
        launch(heuristics.plan_for(tiles.made(*shape), case.problem, hopper), case.operands)
        assert differing(case.operands.d, want) == 0, shape
        assert untouched(case), shape


@pytest.mark.parametrize("num_sms", [132, 6])
@pytest.mark.parametrize("n, k", [(2112, 896), (4096, 128)])
def test_ten_thousand_repeats_of_results_in_parts(n: int, k: int, num_sms: int):
    """Both halves of a result take the same shared memory: with short K one is sent while the next is converted."""
    case = masked([200, 3, 0, 256, 130, 129, 241], 300, n, k)
    tile = tiles.made(128, 256, 2, parts=2)
    plan = heuristics.plan_for(tile, case.problem, device.current(0), Config(num_sms=num_sms))
    d, want, differences = case.operands.d, exact(case), torch.zeros((), dtype=torch.int64, device="cuda")
    launch(plan, case.operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            d.fill_(NAN)
            launch(plan, case.operands)
            differences += differing(d, want)
    for _ in range(100):
        graph.replay()
    assert int(differences) == 0 and untouched(case)


@pytest.mark.parametrize("max_m", [8, 16, 32, 48, 96, 100, 192])
def test_masked_tile_stays_in_its_group(max_m):
    for expected in (1, max_m):
        check(masked([max_m] * 5, max_m, expected=expected))


@pytest.mark.parametrize(
    "counts", [[0, 5, 9], [7, 0, 0], [0, 0, 0], [1000, 1000, 0], [-1, -(2**31), 2**31 - 1]], ids=str
)
def test_zero_tokens_and_wrong_hints(counts):
    for expected in (0, 1, 10**6):
        check(masked(counts, 1000, expected=expected))
    if min(counts) >= 0:
        check(ends(counts, trailing=70, expected=1))
        check(contiguous(counts, trailing=70))


@pytest.mark.parametrize("code", [0x7F, 0x7E])
@pytest.mark.parametrize("scale", [NAN, 1e38, float("inf")])
def test_garbage_in_dead_rows(code, scale):
    counts = [3, 0, 64, 65, 130]
    check(masked(counts, 200, code=code, scale=scale))
    check(contiguous(counts, trailing=70, code=code, scale=scale))
    check(ends(counts, trailing=70, code=code, scale=scale))


def test_offsets_past_2_to_the_31():
    """G * N * K; rows times columns of d; of a; sum(K) * M; G * M * N of an FP32 d."""
    edges = [0, 1, 127, 128, 129]
    check_sample(contiguous([128] * 20, 16384, 8192), range(0, 2560, 61), [127])
    check_sample(masked([3, 0, 2, 32768], 32768, 20480, 128), [*edges, 32767], [0, 159])
    check_sample(masked([3, 70, 131072], 131072, 64, 8192), [*edges, 131071], [0])
    check_sample(contiguous([0], 32768, 128, indices=[0] * 70_000), [*edges, 69_999], [0, 255])
    check_sample(k_grouped([32768] * 8, 8448, 64), [*edges, 8447], [0])
    check_sample(k_grouped([128] * 40, 8192, 8192), [*edges, 8191], [0, 63])


@pytest.mark.parametrize("alignment", [64, 128, 192, 256])
def test_alignments(alignment):
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    counts = [1, alignment, 0, alignment + 1, 300]
    for clear in (True, False):
        check(contiguous(counts, 264, 272, alignment=alignment, clear=clear))
        check(ends(counts, 264, 272, alignment=alignment, clear=clear, trailing=70))


@pytest.mark.parametrize("num_sms", [1, 2, 77, 78, 114, 130, 131, 132])
def test_numbers_of_sms(num_sms):
    deep_gemm.set_num_sms(num_sms)
    for kind in KINDS:
        check(typical(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_tensor_cores_gives_equal_bits(kind):
    deep_gemm.set_tc_util(50)
    check(typical(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_producer_right_before_an_early_launch(kind):
    """What a, its scales and the layout are, is written by kernels right before, the first of which take long."""
    case = typical(kind)
    o, want = case.operands, exact(case)
    fresh = [None if x is None else x.clone() for x in (o.a, o.a_scales, o.layout, o.c)]
    for early in (True, False):
        deep_gemm.set_pdl(early)
        for _ in range(20):
            o.a.view(torch.uint8).fill_(0x7F)
            o.a_scales.fill_(NAN)
            if o.layout is not None:
                o.layout.fill_(1)
            o.d.fill_(NAN)
            torch.cuda._sleep(100_000)
            for x, new in zip((o.a, o.a_scales, o.layout, o.c), fresh, strict=True):
                if x is not None:
                    x.copy_(new)
            call(case)
            assert differing(o.d, want) == 0, early
    assert untouched(case)


@pytest.mark.parametrize("kind", ["dense", "contiguous", "ends", "masked", "columns"])
def test_an_early_launch_waits_for_its_producer(kind):
    """A kernel that lets ours start before it has written a. Nothing else runs in between."""
    if kind == "dense":
        d, memory = result(300, 264)
        described = checks.dense((values(300, 400), scales(300, 4)), (values(264, 400), scales(3, 4)), d)
        case = Case(*described, [], memory)
    else:
        case = typical(kind)
    aligned = {"a_scales": deep_gemm.get_mn_major_tma_aligned_tensor(case.operands.a_scales)}
    if kind == "columns":
        aligned["b_scales"] = deep_gemm.get_mn_major_tma_aligned_tensor(case.operands.b_scales)
    case = case._replace(operands=case.operands._replace(**aligned))
    a, want = case.operands.a, exact(case)
    fresh = a.clone()
    produce = late.copier(a, fresh)
    deep_gemm.set_pdl(True)
    call(case)  # is compiled
    for _ in range(20):
        a.view(torch.uint8).fill_(0x7F)
        case.operands.d.fill_(NAN)
        torch.cuda.synchronize()
        produce()
        call(case)
        assert differing(case.operands.d, want) == 0
    assert untouched(case)


def layouts(kind):
    """Contents of the layout, one after the other, for a problem of four groups and 512 rows (or columns)."""
    if kind == "contiguous":
        owners = ([0, 1, 2, 3], [3, 3, -1, 0], [-1, -1, -1, -1], [2, 0, 1, 4])
        return [int32([owner for owner in x for _ in range(128)]) for x in owners]
    if kind in ("ends", "k_ends"):
        return [int32(x) for x in ([128, 256, 384, 512], [1, 129, 384, 400], [0, 0, 0, 0], [512, 512, 512, 512])]
    if kind == "masked":
        return [int32(x) for x in ([200, 200, 200, 200], [0, 1, 65, 128], [0, 0, 0, 0], [200, 0, 0, 300])]
    return [int32(x) for x in ([128, 128, 128, 128], [0, 512, 0, 0], [0, 0, 0, 0], [256, 0, 128, 128])]


def for_layouts(kind):
    if kind == "contiguous":
        return contiguous([128] * 4, spoil=False)
    if kind == "ends":
        return ends([128] * 4, spoil=False)
    if kind == "masked":
        return masked([200] * 4, 200, spoil=False)
    return k_grouped([128] * 4, psum=kind == "k_ends")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["contiguous", "ends", "masked", "k_grouped", "k_ends"])
def test_graph_replays_with_another_layout(kind, early):
    deep_gemm.set_pdl(early)
    case = for_layouts(kind)
    o = case.operands
    call(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(case)
        call(case)
    for layout in layouts(kind):
        o.layout.copy_(layout)
        o.d.fill_(NAN)
        graph.replay()
        assert differing(o.d, exact(case)) == 0, layout[::128] if kind == "contiguous" else layout
    assert untouched(case)


@pytest.mark.parametrize("clear", [True, False])
def test_trailing_padding_under_capture(clear):
    case = contiguous([128, 70], 512, 512, trailing=10240, clear=clear)
    want = exact(case)
    graph = torch.cuda.CUDAGraph()
    call(case)
    with torch.cuda.graph(graph):
        call(case)
    for _ in range(3):
        case.operands.d.fill_(NAN)
        graph.replay()
        assert differing(case.operands.d, want) == 0
    assert untouched(case)


FIRST_CALL_CAPTURED = """
import sys
import torch, deep_gemm
def values(*shape): return torch.randint(0, 126, shape, device="cuda").to(torch.uint8).view(torch.float8_e4m3fn)
def scales(*shape): return torch.rand(shape, device="cuda")
graph, kind = torch.cuda.CUDAGraph(), sys.argv[1]
if kind == "masked":
    a, b = (values(3, 100, 512), scales(3, 100, 4)), (values(3, 264, 512), scales(3, 3, 4))
    d, layout = torch.zeros(3, 100, 264, dtype=torch.bfloat16, device="cuda"), torch.tensor([100, 3, 64]).int().cuda()
    problem, operands = deep_gemm.problem.masked(a, b, d, layout, 50)
    call = lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, layout, 50)
elif kind == "ends":
    a, b = (values(300, 512), scales(300, 4)), (values(3, 264, 512), scales(3, 3, 4))
    d, layout = torch.zeros(300, 264, dtype=torch.bfloat16, device="cuda"), torch.tensor([100, 129, 300]).int().cuda()
    problem, operands = deep_gemm.problem.contiguous(a, b, d, layout, True, 128, 50, True)
    call = lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        a, b, d, layout, use_psum_layout=True, expected_m_for_psum_layout=50
    )
elif kind == "columns":
    a, b = (values(300, 512), scales(300, 4)), (values(264, 512), scales(264, 4))
    d = torch.zeros(300, 264, device="cuda")
    problem, operands = deep_gemm.problem.dense(a, b, d, None, True)
    call = lambda: deep_gemm.fp8_gemm_nt(a, b, d, recipe=(1, 1, 128))
elif kind == "contiguous":
    a, b = (values(300, 512), scales(300, 4)), (values(3, 264, 512), scales(3, 3, 4))
    d, layout = torch.zeros(300, 264, dtype=torch.bfloat16, device="cuda"), (torch.arange(300) // 128).int().cuda()
    problem, operands = deep_gemm.problem.contiguous(a, b, d, layout, False, 128, None, True)
    call = lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)
else:
    a, b = (values(512 * 72), scales(72, 4)), (values(512 * 264), scales(264, 4))
    d, layout = torch.zeros(2, 72, 264, device="cuda"), torch.tensor([128, 384]).int().cuda()
    problem, operands = deep_gemm.problem.k_grouped(a, b, d, None, layout, None, False, 128)
    call = lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, None, layout)
with torch.cuda.graph(graph):
    call()
assert not d.any(), "the call ran while it was captured"
graph.replay()
want = torch.zeros_like(d)
deep_gemm.reference.multiply(problem, operands._replace(d=want), exact=True)
assert torch.equal(d.view(torch.uint8), want.view(torch.uint8))
print("ran")
"""


@pytest.mark.parametrize("kind", ["masked", "ends", "contiguous", "columns", "k_grouped"])
def test_first_call_inside_a_capture(kind, tmp_path):
    environment = os.environ | {"DG_JIT_CACHE_DIR": str(tmp_path), "DG_JIT_STRICT": "0"}
    command = [sys.executable, "-c", FIRST_CALL_CAPTURED, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_rows_have_the_same_bits_whatever_is_around_them():
    case = masked([200, 200], 200, 2112, 1024)
    o = case.operands
    call(case)
    want = o.d.clone()
    for count in (1, 17, 64, 65, 128, 199):
        o.layout.fill_(count)
        for expected in (1, 50, 200):
            o.d.fill_(NAN)
            gemm.m_grouped_fp8_gemm_nt_masked((o.a, o.a_scales), (o.b, o.b_scales), o.d, o.layout, expected)
            assert differing(o.d[:, :count], want[:, :count]) == 0, (count, expected)
            assert o.d[:, count:].isnan().all()


def test_streams_and_threads():
    cases = [(case, exact(case)) for case in map(typical, KINDS)]
    torch.cuda.synchronize()

    def work(i):
        case, want = cases[i]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                case.operands.d.fill_(NAN)
                call(case)
                if differing(case.operands.d, want):
                    return False
        return True

    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(work, range(len(cases))))


def claiming(num_sms, *shape):
    """A masked multiplication that many CTAs claim tiles of, its plan, and the exact result."""
    case = masked([0, 129, 3, 200, 64] * 8, 200, 520, 272)
    settings = Config(num_sms=num_sms)
    plan = heuristics.plan_for(tiles.made(*shape), case.problem, device.current(0), settings)
    assert plan.claims
    return case, plan, exact(case)


@pytest.mark.parametrize("shape", [(64, 32), (128, 256), (128, 64, 2, 1), (192, 128, 1, 2)])
def test_launches_of_one_tile_at_the_same_time(shape):
    """Two graphs, each with two launches, and eager launches in two streams: all with a counter of their own."""
    sides = [(*claiming(60, *shape), torch.cuda.Stream(), torch.cuda.CUDAGraph()) for _ in range(2)]
    for case, plan, _, _, graph in sides:
        launch(plan, case.operands)
        with torch.cuda.graph(graph):
            launch(plan, case.operands)
            launch(plan, case.operands)
    torch.cuda.synchronize()
    for _ in range(50):
        for (case, plan, _, stream, graph), eager in zip(sides, (False, True), strict=True):
            with torch.cuda.stream(stream):
                case.operands.d.fill_(NAN)
                launch(plan, case.operands) if eager else graph.replay()
        torch.cuda.synchronize()
        for case, _, want, *_ in sides:
            assert differing(case.operands.d, want) == 0
    assert all(untouched(case) for case, *_ in sides)


def test_no_counter_is_left(monkeypatch):
    """Then the share of each CTA is fixed beforehand."""
    case, plan, want = claiming(5, 64, 48)
    monkeypatch.setattr("deep_gemm.runtime.launch.COUNTERS", 0)
    monkeypatch.setattr("deep_gemm.runtime.launch._counters", {})
    for i in range(3):
        case.operands.d.fill_(NAN)
        with pytest.warns(RuntimeWarning) if i == 0 else contextlib.nullcontext():
            launch(plan, case.operands)
        assert differing(case.operands.d, want) == 0
    assert untouched(case)


@pytest.mark.parametrize("kind", ["dense", "columns", "contiguous"])
def test_last_tiles_are_halved(kind):
    """Where few tiles are left for many CTAs; half of the last row of tiles is out of range, or padding."""
    hopper, ran = device.current(0), 0
    if kind == "dense":
        a, b = (values(684, 400), scales(684, 4)), (values(520, 400), scales(5, 4))
        d, memory = result(684, 520)
        case = Case(*checks.dense(a, b, d, None, False), [], memory)
    elif kind == "columns":
        case = columns(684, 520, 400)
    else:
        indices = [0] * 128 + [1] * 188 + [-1] * 132 + [2] * 64 + [-1] * 3 + [3] * 100 + [-1] * 25 + [3] * 44
        case = contiguous([0] * 4, 520, 400, indices=indices)
    want = exact(case)
    for tile in (tile for tile in tiles.of(case.problem.column_scales) if tile.block_m == 128):
        for num_sms in range(4, 24):
            settings = Config(num_sms=num_sms)
            if heuristics.is_legal(tile, case.problem, hopper, settings):
                case.operands.d.fill_(NAN)
                launch(heuristics.plan_for(tile, case.problem, hopper, settings), case.operands)
                assert differing(case.operands.d, want) == 0, (tile, num_sms)
                ran += 1
    assert ran >= (60 if kind == "columns" else 400)


def test_k_grouped_of_many_groups():
    """G=128, M=2048, N=768, K=4096 in all; M=768, N=1536."""
    some = [0, 1, 63, 64, 127, 128, 500, 767]
    check_sample(k_grouped([0, 32, 64, 0, 32] * 25 + [0] * 3, 2048, 768, psum=True), [*some, 2047], [0, 5])
    check_sample(k_grouped([0, 128, 0, 0] * 32, 2048, 768), [*some, 2047], [0, 5])
    check_sample(k_grouped([128] * 128, 2048, 768), [*some, 2047], [0, 5])
    check_sample(k_grouped([256, 0, 1024, 128], 768, 1536, c=True), some, [0, 11])


@pytest.mark.parametrize("c", [False, True])
def test_k_grouped_of_two_groups(c):
    check(k_grouped([128, 256], 192, 3072, c))


def test_k_grouped_two_thousand_repeats_of_one_block():
    case = k_grouped([128] * 16, 192, 264)
    want, d = exact(case), case.operands.d
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        d.fill_(NAN)
        call(case)
        differences += differing(d, want)
    assert int(differences) == 0


REPORTED = """
import torch, deep_gemm
a = torch.ones(256, 128).to(torch.float8_e4m3fn).cuda(), torch.ones(256, 1).cuda()
b = torch.ones(2, 64, 128).to(torch.float8_e4m3fn).cuda(), torch.ones(2, 1, 1).cuda()
d, layout = torch.ones(256, 64, dtype=torch.bfloat16).cuda(), torch.zeros(256, dtype=torch.int32)
layout[5], layout[9], layout[200], layout[220] = 2, -7, 1, -1
deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout.cuda())
assert [int(x) for x in (d[:, 0] == 0).nonzero()] == [5, 9, 220]
"""


@pytest.mark.parametrize("value", ["0", "1"])
def test_strange_rows_are_reported_in_debug_mode(value):
    environment = os.environ | {"DG_JIT_DEBUG": value}
    command = [sys.executable, "-c", REPORTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    padding = "expected -1 to 1: the row is treated as padding"
    lines = [
        f"deep_gemm: grouped_layout[5] is 2, {padding}",
        f"deep_gemm: grouped_layout[9] is -7, {padding}",
        "deep_gemm: grouped_layout[200] is 1, but 0 where its block of 128 rows starts: "
        "groups start at multiples of 128",
    ]
    assert sorted(done.stdout.splitlines()) == (sorted(lines) if value == "1" else [])


SANITIZED = """
import torch, deep_gemm
from deep_gemm import heuristics, problem
from deep_gemm.config import Config
from deep_gemm.runtime import device
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.runtime.launch import launch
hopper = device.current(0)
G, m, n, k = 3, 130, 136, 400
# Copied from the host: initcheck knows of no other kernel that could have written them.
def values(*shape): return torch.ones(shape).to(torch.float8_e4m3fn).cuda()
def scales(*shape): return torch.ones(*shape[:-2], shape[-1], -(-shape[-2] // 4) * 4).cuda().mT[..., :shape[-2], :]
def int32(x): return torch.tensor(x, dtype=torch.int32).cuda()
def zeros(*shape, dtype=torch.bfloat16): return torch.zeros(shape, dtype=dtype).cuda()
a, b = (values(3 * 128, k), scales(3 * 128, 4)), (values(G, n, k), scales(G, 2, 4))
owners = [0] * 100 + [-1] * 28 + [2] * 128 + [1] * 64 + [7] * 64
flat = (values(512 * m), scales(m, 4)), (values(512 * n), scales(n, 4))
c = torch.ones(G, m, n).cuda()
cases = [
    problem.contiguous(a, b, zeros(3 * 128, n), int32(owners), False, 128, None, True),
    problem.contiguous(a, b, zeros(3 * 128, n), int32([100, 129, 384]), True, 128, 20, True),
    problem.masked((values(G, m, k), scales(G, m, 4)), b, zeros(G, m, n), int32([130, 0, 65]), 20),
    problem.dense(*((values(x, k), scales(x, 4)) for x in (m, n)), zeros(m, n, dtype=torch.float32), c[0], True),
    problem.k_grouped(*flat, zeros(G, m, n, dtype=torch.float32), None, int32([128, 0, 384]), c, False, 128),
    problem.k_grouped(*flat, zeros(G, m, n, dtype=torch.float32), None, int32([100, 128, 500]), None, True, 128),
]
plain = ((64, 16), (64, 48, 1, 2), (128, 112), (128, 256, 2), (128, 256, 2, 1, False, 2), (192, 128, 1, 2))
for described, operands in cases:
    column = described.column_scales
    shapes = [(64, 32, 1, 1, True), (128, 128, 1, 1, True)] if column else plain
    # Scales are not contiguous, and all 1. To copy such a tensor takes a kernel that initcheck knows nothing of.
    tensors = {name: x for name, x in operands._asdict().items() if torch.is_tensor(x)}
    on_host = operands._replace(
        **{name: x.cpu() if x.is_contiguous() else torch.ones(x.shape) for name, x in tensors.items()}
    )
    want = on_host._replace(d=torch.zeros_like(on_host.d))
    deep_gemm.reference.multiply(described, want)
    for shape in shapes:
        tile, settings = heuristics.make_tile(*shape), Config(num_sms=8)
        compile_many([tile.source()])
        if heuristics.is_legal(tile, described, hopper, settings):
            launch(heuristics.plan_for(tile, described, hopper, settings), operands)
            assert torch.equal(operands.d.cpu(), want.d), (described, tile)
print("ran")
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    sanitizer.check(tool, SANITIZED)
