"""The settings of a process: values, rejections by their text, and that they act on plans and on calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch

import deep_gemm
from deep_gemm import config, gemm, heuristics
from deep_gemm.config import Config
from deep_gemm.errors import InvalidInputError
from deep_gemm.heuristics import choose, is_legal, plan_for, tiles
from deep_gemm.plan import Strip
from deep_gemm.problem import Kind, Problem
from deep_gemm.runtime import device
from deep_gemm.runtime.device import H200

DENSE = Problem(4096, 7168, 2048)
PROBLEMS = [
    DENSE,
    Problem(1, 576, 7168),
    Problem(4096, 4096, 7168, Kind.CONTIGUOUS, groups=8, alignment=128),
    Problem(4096, 4096, 7168, Kind.ENDS, groups=8, expected_m=100, alignment=128),
    Problem(4096, 4096, 7168, Kind.MASKED, groups=8, expected_m=100),
    Problem(2048, 768, 4096, Kind.K_GROUPED, groups=4, alignment=128, column_scales=True),
]
FEW = Problem(1, 2112, 7168)
COLUMNS = Problem(256, 512, 1024, column_scales=True)


@pytest.fixture(autouse=True)
def everything_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "best", lambda: H200)
    monkeypatch.setattr(device, "current", lambda index=None: H200)
    gemm._plan.cache_clear()
    yield
    deep_gemm.set_num_sms(None)
    deep_gemm.set_tc_util(100)
    deep_gemm.set_pdl(False)
    deep_gemm.set_block_size_multiple_of(1)
    deep_gemm.set_compile_mode(0)
    deep_gemm.set_batch_invariant(False)
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    gemm._plan.cache_clear()
    assert config.current() == Config() == heuristics.DEFAULT


def planned(problem: Problem = DENSE):
    """As a call plans it now."""
    return gemm._plan(problem, 0, config.current())


def operands():
    a = torch.ones(24, 256).to(torch.float8_e4m3fn), torch.ones(24, 2)
    b = torch.ones(136, 256).to(torch.float8_e4m3fn), torch.ones(2, 2)
    return a, b, torch.full((24, 136), float("nan"), dtype=torch.bfloat16)


# Values


@pytest.mark.parametrize(
    ("name", "default", "values"),
    [
        ("num_sms", 132, (1, 77, 78, 114, 130, 131, 132)),
        ("tc_util", 100, (1, 50, 99, 100)),
        ("pdl", False, (True, False)),
        ("compile_mode", 0, (1, 0)),
        ("batch_invariant", False, (True, False)),
    ],
)
def test_what_is_set_is_got(name: str, default: Any, values: tuple[Any, ...]):
    setter, getter = getattr(deep_gemm, f"set_{name}"), getattr(deep_gemm, f"get_{name}")
    assert getter() == default
    for value in values:
        assert setter(value) is None
        assert getter() == value and type(getter()) is type(default)


def test_all_sms_again():
    for everything in (None, 0):
        deep_gemm.set_num_sms(7)
        deep_gemm.set_num_sms(everything)
        assert deep_gemm.get_num_sms() == 132
        assert config.current() == Config()


def test_flags():
    deep_gemm.set_pdl(1)  # type: ignore[arg-type]
    deep_gemm.set_batch_invariant(0)  # type: ignore[arg-type]
    assert deep_gemm.get_pdl() is True
    assert deep_gemm.get_batch_invariant() is False
    for value in ("0", None, 2, [], torch.tensor(1)):
        for setter in (deep_gemm.set_pdl, deep_gemm.set_batch_invariant):
            with pytest.raises(InvalidInputError) as error:
                setter(value)  # type: ignore[arg-type]
            assert str(error.value) == f"{setter.__name__} got {value!r}, expected True or False: pass one of them"
    assert deep_gemm.get_pdl() is True


def test_whole_numbers_of_numpy():
    deep_gemm.set_num_sms(np.int64(7))
    deep_gemm.set_tc_util(np.int32(50))
    deep_gemm.set_block_size_multiple_of(np.int64(64))
    deep_gemm.set_compile_mode(np.int64(0))
    assert config.current() == Config(num_sms=7, tc_util=50, block_m=64, block_n=64)
    assert all(type(x) in (int, bool) for x in astuple(config.current()))


def test_nothing_depends_on_this():
    before = config.current()
    for value in (True, False):
        deep_gemm.set_ignore_compile_dims(value)
        assert config.current() is before


def test_invariant_batches_are_never_split():
    assert planned(FEW).split > 1
    deep_gemm.set_batch_invariant(True)
    assert deep_gemm.get_batch_invariant() and planned(FEW).split == 1


# Rejections


@pytest.mark.parametrize("value", [-1, 133, 100_000, 77.5, 8.0, True, "8"])
def test_num_sms_rejected(value: Any):
    deep_gemm.set_num_sms(7)
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.set_num_sms(value)
    assert str(error.value) == f"num_sms is {value!r}, expected 1 to 132, the SMs of NVIDIA H200, or None for all"
    assert deep_gemm.get_num_sms() == 7


@pytest.mark.parametrize("value", [0, -1, 101, 50.0, True, None, "50"])
def test_tc_util_rejected(value: Any):
    deep_gemm.set_tc_util(50)
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.set_tc_util(value)
    assert str(error.value) == f"tc_util is {value!r}, expected a whole number of percent, 1 to 100"
    assert deep_gemm.get_tc_util() == 50


@pytest.mark.parametrize(
    "value", [0, -16, 5, 512, 16.0, True, None, "16", (64,), (64, 0), (256, 16), (64, 17), (1, 2, 3)]
)
def test_block_size_multiple_rejected(value: Any):
    deep_gemm.set_block_size_multiple_of((64, 32))
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.set_block_size_multiple_of(value)
    assert str(error.value) == (
        f"the block size is to be a multiple of {value!r}, expected divisors of 64, 128 or 192 (rows) "
        "and of a multiple of 16 up to 256 (columns)"
    )
    assert config.current() == Config(block_m=64, block_n=32)


@pytest.mark.parametrize("value", [2, -1, None, "1"])
def test_compile_mode_rejected(value: Any):
    deep_gemm.set_compile_mode(1)
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.set_compile_mode(value)
    assert str(error.value) == (
        f"the compile mode is {value!r}, expected 0 (multiply) or 1 (compile, and launch nothing)"
    )
    assert deep_gemm.get_compile_mode() == 1


# What they do to plans


@pytest.mark.parametrize("num_sms", [1, 2, 3, 77, 78, 114, 130, 131, 132])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.kind.name)
def test_num_sms_caps_the_grid(problem: Problem, num_sms: int):
    deep_gemm.set_num_sms(num_sms)
    plan = planned(problem)
    assert 1 <= plan.ctas <= num_sms or (num_sms == H200.num_sms and isinstance(plan.tile, Strip))
    assert plan.ctas % plan.cluster == 0
    assert plan.ctas > 0.95 * num_sms - 2 or problem.m < 64  # there is work for all of them
    for tile in tiles(problem.column_scales):
        if is_legal(tile, problem, H200, config.current()):
            assert plan_for(tile, problem, H200, config.current()).ctas <= num_sms


def test_one_sm_has_no_clusters():
    deep_gemm.set_num_sms(1)
    assert {plan.tile.cluster for plan in heuristics.ranked(DENSE, H200, config.current())} == {1}
    deep_gemm.set_num_sms(2)
    assert {plan.tile.cluster for plan in heuristics.ranked(DENSE, H200, config.current())} == {1, 2}


@pytest.mark.parametrize(
    ("multiple", "block_m", "block_n"),
    [
        (1, 1, 1),
        (16, 16, 16),
        (64, 64, 64),
        (128, 128, 128),
        ((128, 1), 128, 1),
        ((1, 48), 1, 48),
        ([64, 256], 64, 256),
    ],
    ids=str,
)
def test_block_size_multiple_leaves_some_tiles(multiple: Any, block_m: int, block_n: int):
    deep_gemm.set_block_size_multiple_of(multiple)
    left = {plan.tile for plan in heuristics.ranked(DENSE, H200, config.current())}
    assert left == {t for t in tiles() if t.block_m % block_m == 0 and t.block_n % block_n == 0}
    assert planned().tile in left


@pytest.mark.parametrize(
    ("multiple", "problem"), [((192, 1), PROBLEMS[2]), ((1, 48), COLUMNS)], ids=["rows", "columns"]
)
def test_no_tile_may_be_left_for_a_problem(multiple: tuple[int, int], problem: Problem):
    deep_gemm.set_block_size_multiple_of(multiple)
    with pytest.raises(InvalidInputError) as error:
        planned(problem)
    assert str(error.value) == (f"no tile is left for {problem}: allow smaller ones by set_block_size_multiple_of(1)")
    deep_gemm.set_block_size_multiple_of(1)
    assert planned(problem).problem == problem


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.kind.name)
def test_tc_util_and_pdl_go_into_the_plan(problem: Problem):
    plain = planned(problem)
    assert (plain.tc_util, plain.pdl) == (100, False)
    deep_gemm.set_tc_util(60)
    deep_gemm.set_pdl(True)
    plan = planned(problem)
    assert (plan.tc_util, plan.pdl) == (60, True)
    assert (plan.tile, plan.ctas, plan.band) == (plain.tile, plain.ctas, plain.band) or isinstance(plain.tile, Strip)


def test_plans_are_made_once_for_each_setting():
    first = planned()
    deep_gemm.set_num_sms(78)
    fewer = planned()
    assert fewer is not first and fewer is planned()
    deep_gemm.set_num_sms(None)
    assert planned() is first
    assert (first.tile, first.ctas) == (choose(DENSE, H200).tile, choose(DENSE, H200).ctas)


# The alignment of contiguous layouts


def contiguous_problem(monkeypatch: pytest.MonkeyPatch, m: int = 384, **options: Any) -> Problem:
    """As a call describes it now."""
    seen: list[Problem] = []
    a = torch.ones(m, 128).to(torch.float8_e4m3fn), torch.ones(m, 1)
    b = torch.ones(2, 64, 128).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    layout = torch.zeros(2 if options.get("use_psum_layout") else m, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_run", lambda problem, operands, option: seen.append(problem))
        d = torch.empty(m, 64, dtype=torch.bfloat16)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, **options)
    return seen[0]


@pytest.mark.parametrize(
    ("alignment", "rows"), [(64, {64}), (128, {64, 128}), (192, {64, 192}), (256, {64, 128}), (384, {64, 128, 192})]
)
def test_tiles_fit_the_alignment(alignment: int, rows: set[int], monkeypatch: pytest.MonkeyPatch):
    before = contiguous_problem(monkeypatch)
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    problem = contiguous_problem(monkeypatch)
    assert (problem.kind, problem.alignment) == (Kind.CONTIGUOUS, alignment)
    legal = {tile for tile in tiles() if is_legal(tile, problem, H200)}
    assert {tile.block_m for tile in legal} == rows
    assert planned(problem).tile in legal
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    assert contiguous_problem(monkeypatch) == before


@pytest.mark.parametrize("alignment", [64, 192])
def test_running_ends_start_at_the_alignment(alignment: int, monkeypatch: pytest.MonkeyPatch):
    """Tiles start where the group does, so every height is legal."""
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    problem = contiguous_problem(monkeypatch, use_psum_layout=True, expected_m_for_psum_layout=30)
    assert (problem.kind, problem.alignment, problem.expected_m) == (Kind.ENDS, alignment, 30)
    assert {tile.block_m for tile in tiles() if is_legal(tile, problem, H200)} == {64, 128, 192}


# Calls


def test_compile_mode_launches_nothing():
    a, b, d = operands()
    deep_gemm.set_compile_mode(1)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert d.isnan().all()
    with pytest.raises(InvalidInputError, match=r"^d has dtype torch\.float32"):
        deep_gemm.fp8_gemm_nt(a, b, d.float())
    layout = torch.zeros(24, dtype=torch.int32)
    stacked = b[0][None], b[1][None]
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, stacked, d, layout)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, stacked, d, layout[:1] + 24, use_psum_layout=True)
    deep_gemm.m_grouped_fp8_gemm_nt_masked((a[0][None], a[1][None]), stacked, d[None], layout[:1] + 24, 24)
    assert d.isnan().all()
    deep_gemm.set_compile_mode(0)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert (d == 256).all()


@pytest.mark.parametrize("ks", [[128, 128], [0, 0]], ids=str)
def test_compile_mode_launches_nothing_along_k(ks: list[int]):
    a = torch.ones(sum(ks) * 16).to(torch.float8_e4m3fn), torch.ones(16, sum(ks) // 128)
    b = torch.ones(sum(ks) * 24).to(torch.float8_e4m3fn), torch.ones(24, sum(ks) // 128)
    d = torch.full((2, 16, 24), float("nan"))
    deep_gemm.set_compile_mode(1)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, torch.tensor(ks, dtype=torch.int32))
    assert d.isnan().all()
    deep_gemm.set_compile_mode(0)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, torch.tensor(ks, dtype=torch.int32))
    assert (d == ks[0]).all()


def test_compile_mode_compiles_what_a_call_would_launch(monkeypatch: pytest.MonkeyPatch):
    """Of a GPU's tensor the call asks the device alone, and a meta tensor has one that is not the CPU."""
    asked: list[Any] = []
    monkeypatch.setattr(gemm, "prepare", lambda tile, kind, index: asked.append(tile))
    monkeypatch.setattr(gemm, "launch", lambda plan, *rest: asked.append("launch"))
    problem, checked = gemm.problem.dense(*operands())
    checked = checked._replace(d=checked.d.to("meta"))
    for mode, last in ((1, planned(problem).tile), (0, "launch")):
        deep_gemm.set_compile_mode(mode)
        gemm._run(problem, checked)
        assert asked.pop() == last and not asked


@pytest.mark.parametrize("pdl", [False, True])
def test_compile_mode_asks_for_the_kernel_of_the_plan(pdl: bool):
    """Problems are planned in blocks then: at the edges of these, and where the device alone knows how many rows."""
    deep_gemm.set_pdl(pdl)
    problems = [
        Problem(m, n, k) for m in (1, 8, 9, 127, 128, 129, 256, 257, 4096) for n, k in ((2112, 7168), (24, 400))
    ]
    problems += [
        Problem(m, 4096, 7168, Kind.CONTIGUOUS, 8, alignment=a) for m in (1, 128, 129, 20000) for a in (64, 128)
    ]
    problems += [Problem(4096, 7168, 2048, Kind.MASKED, 32, hint) for hint in (0, 1, 20, 128, 129, 192, 4096, 9999)]
    problems += [Problem(4096, 7168, 2048, Kind.ENDS, 32, hint, 128) for hint in (None, 0, 1, 20, 200)]
    problems += [Problem(m, 7168, 2048, Kind.ENDS, 8, None, 128) for m in range(1, 900, 37)]
    for kind in (Kind.K_GROUPED, Kind.K_ENDS):
        problems += [Problem(m, 2048, 32768, kind, 8, None, 128, column_scales=True) for m in range(16, 900, 44)]
    for problem in problems:
        assert gemm._kernel_of(problem, 0) == planned(problem).tile, problem


@pytest.mark.parametrize("num_sms", [1, 78, 131])
def test_results_do_not_depend_on_settings(num_sms: int):
    a, b, d = operands()
    deep_gemm.set_num_sms(num_sms)
    deep_gemm.set_tc_util(10)
    deep_gemm.set_pdl(True)
    deep_gemm.set_block_size_multiple_of(64)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert (d == 256).all()


@pytest.mark.gpu
def test_results_do_not_depend_on_settings_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    """The same bits, whatever is set."""
    monkeypatch.undo()
    generator = torch.Generator(device="cuda").manual_seed(0)
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(700, 1024, generator=generator, device="cuda"))
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(2112, 1024, generator=generator, device="cuda"))
    want = torch.empty(700, 2112, dtype=torch.bfloat16, device="cuda")
    deep_gemm.fp8_gemm_nt(a, b, want)
    everything = deep_gemm.get_num_sms()
    for setter, value, restored in (
        *((deep_gemm.set_num_sms, n, None) for n in (1, 3, 78, everything - 1, everything)),
        *((deep_gemm.set_tc_util, percent, 100) for percent in (5, 50, 99)),
        *((deep_gemm.set_block_size_multiple_of, multiple, 1) for multiple in (64, (128, 1), (1, 48), (64, 256))),
        (deep_gemm.set_pdl, True, False),
        (deep_gemm.set_batch_invariant, True, False),
    ):
        setter(value)
        for _ in range(3):
            d = torch.full_like(want, float("nan"))
            deep_gemm.fp8_gemm_nt(a, b, d)
            assert torch.equal(d.view(torch.int16), want.view(torch.int16)), (setter.__name__, value)
        setter(restored)
