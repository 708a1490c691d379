"""Plans of the kernel for few rows, and the kernels compiled for it. No GPU."""

import random
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from test_plan import MAX_MOVES, moves_to_uniform_registers

from deep_gemm import decode, heuristics, measured, reference
from deep_gemm.config import Config
from deep_gemm.errors import InvalidInputError
from deep_gemm.plan import Strip, Tile
from deep_gemm.problem import Kind, Problem
from deep_gemm.quantize import per_block_cast_to_fp8, per_token_cast_to_fp8
from deep_gemm.runtime import sass
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.runtime.device import H200, Device, named


@pytest.mark.parametrize("wait_limit", [0, 2], ids=["release", "debug"])
def test_every_strip_compiles_clean(wait_limit: int):
    """As every tile does; and several CTAs of them find registers on an SM."""
    strips = decode.strips()
    for strip, cubin in zip(strips, compile_many([strip.source(wait_limit) for strip in strips]), strict=True):
        assert cubin.performance_warnings == [], strip
        info = sass.read(cubin.image)
        blocks = strip.unroll + (strip.unroll // 2 if strip.unroll > 4 else 0) + 1  # turns, halves of them, one by one
        assert (info.qgmma, info.ffma) == (4 * blocks, blocks * strip.width // 2), strip
        assert info.local_bytes == info.local_loads == info.local_stores == 0, strip
        assert info.registers * strip.threads * strip.ctas_per_sm <= 65536, strip
        assert moves_to_uniform_registers(cubin.image) <= MAX_MOVES, strip


def test_strips_are_distinct_and_variants_fit():
    strips, variants = decode.strips(), decode.variants()
    assert len(set(strips)) == len(strips) == len({strip.name for strip in strips})
    assert len(set(variants)) == len(variants)
    assert {variant.strip for variant in variants} == set(strips)
    assert {variant.split for variant in variants} == set(decode.SPLITS)
    for strip, split, residents, stages in variants:
        size = strip.smem_bytes_of(stages, split)
        assert residents * (size + 1024) <= 228 * 1024 and size <= H200.smem_bytes
        assert stages >= 2
        assert 4 * strip.warpgroups % split == 0  # every CTA of a cluster has the same share of a tile


def few(count: int):
    rng = random.Random(3)
    for _ in range(count):
        yield Problem(rng.randint(1, 128), 8 * rng.randint(1, 2000), 16 * rng.randint(1, 500))


def test_plans_of_few_rows_are_legal():
    chosen: set[str] = set()
    for problem in few(300):
        plans = heuristics.ranked(problem, H200, every_split=True)
        assert len({plan.name for plan in plans}) == len(plans)
        for plan in plans:
            strip, blocks = plan.tile, problem.k_blocks
            if not isinstance(strip, Strip):
                assert (plan.split, plan.stages) == (1, strip.stages)
                continue
            rows = -(-problem.m // strip.block_m)
            assert rows <= 2  # which the kernel relies on
            tiles = rows * -(-problem.n // strip.block_n)
            pairs = plan.split == 1 and problem.m > strip.block_m
            assert (plan.ctas, plan.cluster) == (tiles * plan.split, 2 if pairs else plan.split)
            assert plan.ctas % plan.cluster == 0 and plan.name.endswith(" in pairs") is pairs
            assert 1 <= plan.split <= blocks
            most = -(-blocks // plan.split)  # K blocks of a CTA; fewer stages are used again, a turn's at a time
            assert plan.stages == most or (1 <= plan.stages < most and plan.stages % strip.unroll == 0)
            assert plan.smem_bytes <= H200.smem_bytes
            assert plan.cost.us > 0
        chosen.add(heuristics.choose(problem, H200).tile.name)
    assert len(chosen) > 10


def test_overlap_does_not_change_bits():
    """K is split in the same way with programmatic dependent launch and without."""
    splits: set[int] = set()
    for problem in few(300):
        plans = [heuristics.choose(problem, H200, Config(pdl=pdl)) for pdl in (False, True)]
        assert plans[0].split == plans[1].split
        splits.add(plans[0].split)
    assert splits >= {1, 2, 4}


def test_plans_that_were_measured_are_chosen():
    """For every M of their lines, alone and overlapping, on the GPUs that have as many SMs as those measured."""
    for gpu, layers in measured.PLANS.items():
        for (n, k), lines in layers.items():
            assert all(a[1] < b[0] for a, b in pairwise(lines))
            for first, last, alone, overlapping in lines:
                assert 1 <= first <= last <= decode.MOST_ROWS
                for m in range(first, last + 1):
                    assert_chosen(Problem(m, n, k), named(f"NVIDIA {gpu}", measured.NUM_SMS), alone, overlapping)


def test_tiles_that_were_measured_for_many_groups_are_chosen():
    """For every number of rows of their lines, overlapping or not; by the whole of such a GPU alone."""
    for gpu, layers in measured.MASKED.items():
        device = named(f"NVIDIA {gpu}", measured.NUM_SMS)
        for (n, k), lines in layers.items():
            for (first, last, name), groups in product(lines, (measured.MANY, 32)):
                for rows in (first, (first + last) // 2, last):
                    problem = Problem(4096, n, k, Kind.MASKED, groups, rows)
                    assert {heuristics.choose(problem, device, Config(pdl=pdl)).name for pdl in (False, True)} == {name}
                    assert measured.fastest(problem, device, Config(num_sms=measured.NUM_SMS - 2)) == (None, None)


def assert_chosen(problem: Problem, device: Device, alone: str | None, overlapping: str | None):
    plans = [heuristics.choose(problem, device, Config(pdl=pdl)) for pdl in (False, True)]
    assert alone in (plans[0].name, None) and plans[0].split == plans[1].split
    if overlapping:
        assert plans[1].name == overlapping and (plans[1].pdl or isinstance(plans[1].tile, Tile))


@pytest.mark.parametrize(
    ("problem", "device", "settings"),
    [
        (Problem(8, 24576, 1536), replace(H200, num_sms=114), Config()),
        (Problem(8, 24576, 1536), H200, Config(num_sms=131)),
        (Problem(8, 24576, 1536), H200, Config(tc_util=50)),
        (Problem(8, 24576, 1536, column_scales=True), H200, Config()),
        (Problem(8, 24576, 1536, Kind.MASKED, groups=4, expected_m=8), H200, Config()),
        (Problem(129, 32768, 512), H200, Config()),
        (Problem(8, 24576, 1664), H200, Config()),
    ],
    ids=["GPU", "SMs", "power", "column scales", "groups", "rows", "layer"],
)
def test_what_was_not_measured_is_left_to_the_model(problem: Problem, device: Device, settings: Config):
    assert measured.fastest(Problem(8, 24576, 1536), H200, Config()) != (None, None)
    assert measured.fastest(problem, device, settings) == (None, None)


def test_what_was_measured_may_not_be_what_is_asked_for():
    """A plan that settings rule out is not chosen, though it was the fastest."""
    problem = Problem(64, 2112, 7168)
    alone, _ = measured.fastest(problem, H200, Config())
    assert heuristics.choose(problem, H200).name == alone and "K/2" in str(alone)
    assert heuristics.choose(problem, H200, Config(batch_invariant=True)).split == 1
    assert heuristics.choose(problem, H200, Config(block_n=128)).tile.block_n == 128


def test_invariant_batches_never_split():
    assert all(heuristics.choose(x, H200, Config(batch_invariant=True)).split == 1 for x in few(100))
    assert any(heuristics.choose(x, H200).split > 1 for x in few(100))


@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        (Problem(8, 2112, 7168), Config(num_sms=131)),
        (Problem(8, 2112, 7168), Config(tc_util=50)),
        (Problem(8, 2112, 7168, column_scales=True), Config()),
        (Problem(8, 2112, 7168, Kind.MASKED, groups=4, expected_m=8), Config()),
        (Problem(256, 2112, 7168), Config()),
    ],
    ids=["SMs", "power", "column scales", "groups", "many rows"],
)
def test_what_only_tiles_can_do(problem: Problem, settings: Config):
    plans = heuristics.ranked(problem, H200, settings, every_split=True)
    assert plans and not any(isinstance(plan.tile, Strip) for plan in plans)


def test_block_sizes_hold_for_strips():
    plans = heuristics.ranked(Problem(64, 2112, 7168), H200, Config(block_m=64, block_n=64), every_split=True)
    assert {plan.tile.name for plan in plans if isinstance(plan.tile, Strip)} == {"64x64 strip", "64x128 strip"}


def test_all_sms_by_their_number_are_all():
    problem = Problem(1, 2112, 7168)
    by_number = heuristics.choose(problem, H200, Config(num_sms=132))
    assert isinstance(by_number.tile, Strip) and by_number.split == heuristics.choose(problem, H200).split


def test_two_rows_of_strips_come_in_pairs():
    """The CTAs of a column are neighbours in a cluster, but where K is split, or there is but one SM."""
    clusters = {
        m: {p.cluster for p in strips_of(m, H200) if p.split == 1 and p.tile.block_m == 64} for m in (64, 65, 128)
    }
    assert clusters == {64: {1}, 65: {2}, 128: {2}}
    assert all(p.cluster == p.split for p in strips_of(128, H200) if p.split > 1 or p.tile.block_m == 128)
    assert {p.tile.block_m for p in strips_of(128, replace(H200, num_sms=1))} == {128}


def strips_of(m: int, device: Device) -> list[Any]:
    plans = heuristics.ranked(Problem(m, 2112, 7168), device, every_split=True)
    return [plan for plan in plans if isinstance(plan.tile, Strip)]


def test_a_part_of_a_gpu_has_no_larger_clusters():
    plans = heuristics.ranked(Problem(1, 2112, 7168), replace(H200, num_sms=4), every_split=True)
    assert {plan.split for plan in plans} == {1, 2, 4}


@pytest.mark.parametrize(
    ("m", "k", "pdl"), [(64, 16384, True), (65, 4095, True), (65, 4096, False), (4096, 7168, False)]
)
def test_tiles_overlap_where_it_pays(m: int, k: int, pdl: bool):
    tile = heuristics.make_tile(64, 64)
    assert heuristics.plan_for(tile, Problem(m, 7168, k), H200, Config(pdl=True)).pdl is pdl


@pytest.mark.parametrize("split", [0, -1, 2.0, True, None])
def test_what_is_no_split(split: Any):
    a, b = per_token_cast_to_fp8(torch.randn(2, 256)), per_block_cast_to_fp8(torch.randn(8, 256))
    for call in (reference.fp8_gemm_nt, reference.truth_and_bound):
        with pytest.raises(InvalidInputError) as error:
            call(*a, *b, split=split)
        assert str(error.value) == (
            f"split is {split!r}, expected a whole number from 1 on: that of the plan, gemm.plan_of"
        )
    d = torch.empty(2, 8, dtype=torch.bfloat16)
    reference.run(*a, *b, d, split=2)
    assert not d.isnan().any()


@pytest.mark.parametrize("split", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_the_reference_follows_a_split(split: int, exact: bool):
    """Part i has the K blocks from blocks * i // split on; parts are added up one after the other."""
    k, blocks = 1200, 10
    a = per_token_cast_to_fp8(torch.randn(5, k))
    b = per_block_cast_to_fp8(torch.randn(136, k))
    got = reference.fp8_gemm_nt(*a, *b, exact=exact, split=split)
    ends = [blocks * i // split for i in range(split + 1)]
    total = None
    for first, last in pairwise(ends):
        columns = slice(first * 128, last * 128)
        parts = (a[0][:, columns], a[1][:, first:last], b[0][:, columns], b[1][:, first:last])
        part = reference.fp8_gemm_nt(*parts, exact=exact)
        total = part if total is None else total + part
    assert torch.equal(got, total)
    assert (split == 1) == torch.equal(got, reference.fp8_gemm_nt(*a, *b, exact=exact))
