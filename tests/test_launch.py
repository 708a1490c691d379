"""What the launcher tells the driver, over a driver whose functions only take notes. No GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deep_gemm
from deep_gemm import config, heuristics, settings
from deep_gemm.config import Config
from deep_gemm.errors import LaunchError
from deep_gemm.plan import Plan, Strip, make_strip, make_tile
from deep_gemm.problem import Kind, Operands, Problem
from deep_gemm.runtime import driver, guard, launch
from deep_gemm.runtime.compiler import compile
from deep_gemm.runtime.device import H200

cuda = importlib.import_module("cuda.bindings.driver")
SUCCESS = (cuda.CUresult.CUDA_SUCCESS,)


REPORT = 99  # the number of the kernel that reports


def cluster_of(config: Any) -> int:
    attribute = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    return next((each.value.clusterDim.x for each in config.attrs or () if each.id == attribute), 1)


class Notes:
    """Stands for cuda.bindings.driver: its types are the real ones, its functions write down what they are given."""

    def __init__(self) -> None:
        self.encoded: list[SimpleNamespace] = []
        self.replaced: list[tuple[int, int]] = []
        self.launched: list[SimpleNamespace] = []
        self.fail: Any = None
        self.reported: list[list[int]] = []
        self.stream, self.capturing = 77, False
        self.address_at = 0  # bytes from the beginning of a tensor map

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuTensorMapEncodeTiled(self, dtype, rank, address, shape, strides, box, steps, interleave, swizzle, l2, fill):
        sizes = [[int(x) for x in values] for values in (shape, strides, box)]
        assert (rank, [int(x) for x in steps]) == (3, [1, 1, 1])
        self.encoded.append(SimpleNamespace(address=address, shape=sizes[0], pitches=sizes[1], box=sizes[2]))
        tensor_map = cuda.CUtensorMap()
        ctypes.memset(tensor_map.getPtr(), sum(map(sum, sizes)) % 251, 128)
        ctypes.c_uint64.from_address(tensor_map.getPtr() + self.address_at).value = address
        return *SUCCESS, tensor_map

    def cuTensorMapReplaceAddress(self, tensor_map, address):
        self.replaced.append((tensor_map.getPtr(), address))
        ctypes.c_uint64.from_address(tensor_map.getPtr() + self.address_at).value = address
        return SUCCESS

    def cuLaunchKernelEx(self, config, kernel, parameters, extra):
        if self.fail:
            return (self.fail,)
        if int(kernel) == REPORT:
            pointers = (ctypes.c_void_p * 4).from_address(parameters)
            types = (ctypes.c_uint64, *[ctypes.c_uint32] * 3)
            self.reported.append([t.from_address(p).value for t, p in zip(types, pointers, strict=True)])
            return SUCCESS
        args = launch._Args.from_address(ctypes.c_void_p.from_address(parameters).value)
        p = args.problem
        self.launched.append(
            SimpleNamespace(
                kernel=int(kernel), grid=config.gridDimX, threads=config.blockDimX, smem=config.sharedMemBytes,
                stream=int(config.hStream), cluster=cluster_of(config),
                problem={name: getattr(p, name) for name, _ in p._fields_}, args=ctypes.addressof(args),
                maps=ctypes.string_at(ctypes.addressof(args), 640),
                attributes=[int(attribute.id) for attribute in config.attrs] if config.numAttrs else [],
            )
        )  # fmt: skip
        return SUCCESS

    def cuStreamGetId(self, stream):
        return *SUCCESS, stream * 1000

    def cuGetErrorName(self, code):
        return SUCCESS[0], b"CUDA_ERROR_INVALID_VALUE"

    def cuGetErrorString(self, code):
        return SUCCESS[0], b"invalid argument"


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    for module in (launch, driver):
        monkeypatch.setattr(module, "driver", lambda: notes)
    monkeypatch.setattr(launch, "kernel_for", lambda tile, index: cuda.CUfunction(tile.block_n))
    monkeypatch.setattr(launch, "_thread", launch._Thread())
    monkeypatch.setattr(launch, "bind_context", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index that CPU tensors have
    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: notes.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: notes.stream, raising=False)
    return notes


def operands(m: int, n: int, k: int) -> Operands:
    blocks = -(-k // 128)
    a, b = (torch.zeros(rows, k, dtype=torch.uint8).view(torch.float8_e4m3fn) for rows in (m, n))
    a_scales = torch.ones(blocks, -(-m // 4) * 4).t()[:m]
    return Operands(a, a_scales, b, torch.ones(-(-n // 128), blocks), torch.empty(m, n, dtype=torch.bfloat16))


def plan(tile: tuple[int, ...], m: int, n: int, k: int, settings: Config = heuristics.DEFAULT, **of_problem: Any):
    problem = Problem(m, n, k, **of_problem)
    columns = {"column_scales": True} if problem.column_scales else {}
    return heuristics.plan_for(heuristics.make_tile(*tile, **columns), problem, H200, settings)


SIZES = """
#include "scheduler.cuh"
static_assert(sizeof(Problem) == {problem} && sizeof(Args) == {args} && __builtin_offsetof(Args, problem) == {at});
{fields}
extern "C" __global__ void nothing() {{}}
"""


def test_structures_are_those_of_the_kernel():
    """Every field is where the kernel's compiler puts it."""
    fields = "".join(
        f"static_assert(__builtin_offsetof(Problem, {name}) == {getattr(launch._ProblemArgs, name).offset});\n"
        for name, _ in launch._ProblemArgs._fields_
    )
    sizes = {"problem": ctypes.sizeof(launch._ProblemArgs), "args": ctypes.sizeof(launch._Args)}
    text = SIZES.format(**sizes, at=launch._Args.problem.offset, fields=fields)
    compile(replace(heuristics.make_tile(64, 32).source(), name="sizes.cu", text=text))


def test_operands_are_described(notes: Notes):
    o = operands(300, 264, 400)
    p = plan((128, 256, 2, 1), 300, 264, 400)
    launch.launch(p, o)
    a, b, a_scales, d = notes.encoded
    assert [x.address for x in notes.encoded] == [x.data_ptr() for x in (o.a, o.b, o.a_scales, o.d)]
    assert (a.shape, a.pitches[0], a.box) == ([400, 300, 1], 400, [128, 128, 1])
    assert (b.shape, b.pitches[0], b.box) == ([400, 264, 1], 400, [128, 128, 1])  # half of 256 rows
    assert (a_scales.shape, a_scales.pitches[0], a_scales.box) == ([300, 4, 1], 1200, [128, 1, 1])
    assert (d.shape, d.pitches[0], d.box) == ([264, 300, 1], 528, [64, 32, 1])
    (launched,) = notes.launched
    assert (launched.grid, launched.threads, launched.smem) == (p.ctas, 384, p.tile.smem_bytes)
    assert (launched.cluster, launched.stream, launched.kernel) == (2, 77, 256)
    assert fields(launched, "kind", "m", "n", "k", "groups", "band") == [Kind.DENSE, 300, 264, 400, 1, p.band]
    assert fields(launched, "box_rows", "scale_rows", "pace", "clear_padding") == [128, 128, 0, 0]
    assert fields(launched, "b_scales", "b_scale_stride_n", "b_scale_stride_k") == [o.b_scales.data_ptr(), 4, 1]
    assert fields(launched, "layout", "c", "maps", "counter") == [0, 0, 0, 0]


@pytest.mark.parametrize(("m", "box", "scales"), [(1, 1, 4), (7, 7, 8), (20, 20, 20), (64, 64, 64)])
def test_operands_of_a_strip_are_described(m: int, box: int, scales: int, notes: Notes):
    """As many rows of a as there are; d has no description, for the kernel stores by itself."""
    o = operands(m, 264, 4000)
    every = heuristics.ranked(Problem(m, 264, 4000), H200, every_split=True)
    p = next(plan for plan in every if isinstance(plan.tile, Strip) and plan.split == 4)
    launch.launch(p, o)
    a, b, a_scales = notes.encoded
    assert (a.shape, a.box) == ([4000, m, 1], [128, box, 1])
    assert (b.shape, b.box) == ([4000, 264, 1], [128, p.tile.block_n, 1])
    assert (a_scales.shape, a_scales.box) == ([m, 32, 1], [scales, 1, 1])
    (launched,) = notes.launched
    assert (launched.grid, launched.threads, launched.smem) == (p.ctas, p.tile.threads, p.smem_bytes)
    assert (launched.cluster, launched.grid % 4) == (4, 0)
    assert fields(launched, "box_rows", "scale_rows", "stages", "counter", "band") == [box, scales, p.stages, 0, 4]
    assert fields(launched, "d", "d_stride_m") == [o.d.data_ptr(), 264]


def test_few_rows_of_tiles_share_rows_evenly(notes: Notes):
    """No copy of theirs brings rows that are not there, but for those that make up a multiple of 8."""
    low, high, dense, strip = make_tile(64, 64), make_tile(128, 64), Problem(96, 264, 400), make_strip(False, 64)
    found = {m: heuristics.tile_rows(low, replace(dense, m=m)) for m in (1, 64, 65, 96, 128, 129, 200, 256, 257)}
    assert found == {1: 64, 64: 64, 65: 40, 96: 48, 128: 64, 129: 48, 200: 56, 256: 64, 257: 64}
    found = {m: heuristics.tile_rows(high, replace(dense, m=m)) for m in (96, 129, 160, 200, 256, 300, 340)}
    assert found == {96: 128, 129: 128, 160: 128, 200: 104, 256: 128, 300: 128, 340: 120}
    assert heuristics.tile_rows(strip, dense) == heuristics.tile_rows(make_tile(64, 64, 2, 1), dense) == 48
    for tile, problem in (
        (make_tile(64, 64, 1, 2), dense),
        (low, replace(dense, kind=Kind.MASKED, groups=2)),
        (low, replace(dense, kind=Kind.CONTIGUOUS, groups=2, alignment=64)),
    ):
        assert heuristics.tile_rows(tile, problem) == 64
    for tile in (low, strip):
        every = heuristics.ranked(Problem(96, 264, 400), H200, every_split=True)
        launch.launch(next(plan for plan in every if plan.tile == tile), operands(96, 264, 400))
        assert notes.encoded[0].box == [128, 48, 1]
        assert fields(notes.launched[0], "tile_rows", "box_rows") == [48, 48]
        assert notes.launched[0].cluster == (1 if tile is low else 2)  # strips of a column side by side
        notes.encoded.clear(), notes.launched.clear()


@pytest.mark.parametrize("columns", [False, True])
def test_what_may_be_fetched_early(columns: bool, notes: Notes):
    """b of a launch that overlaps; but not if its scales are per row: then b is as new as a."""
    described = {"column_scales": True} if columns else {}
    o = operands(300, 264, 400)
    if columns:
        o = o._replace(b_scales=torch.ones(4, 264).t(), d=torch.empty(300, 264))
    for pdl in (False, True):
        launch.launch(plan((128, 128), 300, 264, 400, Config(pdl=pdl), **described), o)
    assert [bool(x.problem["overlaps"]) for x in notes.launched] == [False, not columns]
    assert [len(x.attributes) for x in notes.launched] == [0, 1]


def fields(launched: SimpleNamespace, *names: str) -> list[int]:
    return [launched.problem[name] for name in names]


def weights(groups: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.zeros(groups, n, k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return values, torch.ones(groups, -(-n // 128), -(-k // 128))


def test_operands_of_groups_are_described(notes: Notes):
    """MASKED: a and d have groups as well; d's lie within wider rows."""
    values, scales = weights(3, 264, 400)
    a = torch.zeros(3, 40, 400, dtype=torch.uint8).view(torch.float8_e4m3fn)
    d = torch.empty(3, 42, 272, dtype=torch.bfloat16)[:, 1:41, :264]
    counts = torch.zeros(3, dtype=torch.int32)
    o = Operands(a, torch.ones(3, 4, 40).mT, values, scales, d, counts)
    launch.launch(plan((64, 32), 40, 264, 400, kind=Kind.MASKED, groups=3, expected_m=20), o)
    a, b, a_scales, d = notes.encoded
    assert (a.shape, a.pitches, a.box) == ([400, 40, 3], [400, 16000], [128, 32, 1])
    assert (b.shape, b.pitches, b.box) == ([400, 264, 3], [400, 105600], [128, 32, 1])
    assert (a_scales.shape, a_scales.pitches, a_scales.box) == ([40, 4, 3], [160, 640], [40, 1, 1])
    assert (d.shape, d.pitches, d.box) == ([264, 40, 3], [544, 22848], [32, 32, 1])
    (launched,) = notes.launched
    assert fields(launched, "kind", "groups", "layout") == [Kind.MASKED, 3, counts.data_ptr()]
    assert fields(launched, "b_scale_stride_g", "d_stride_g", "d_stride_m") == [12, 42 * 272, 272]


def masked(kind: Kind = Kind.MASKED) -> tuple[Plan, Operands]:
    """A launch whose tiles are claimed, if kind is one whose groups only the device knows."""
    values, scales = weights(3, 264, 400)
    o = operands(512, 264, 400)._replace(b=values, b_scales=scales, layout=torch.zeros(3, dtype=torch.int32))
    return plan((128, 32), 512, 264, 400, kind=kind, groups=3, alignment=128), o


def counters(notes: Notes) -> list[int]:
    return [launched.problem["counter"] for launched in notes.launched]


@pytest.mark.parametrize("kind", [Kind.CONTIGUOUS, Kind.ENDS, Kind.MASKED])
def test_tiles_are_claimed_where_the_device_alone_knows_how_many_there_are(kind: Kind, notes: Notes):
    launch.launch(*masked(kind))
    assert bool(*counters(notes)) == (kind != Kind.CONTIGUOUS)


def test_launches_that_may_run_at_the_same_time_count_apart(notes: Notes):
    for notes.stream, notes.capturing in [(77, False), (77, False), (78, False), (77, True), (77, True), (77, False)]:
        launch.launch(*masked())
    first, again, other, captured, captured_too, last = counters(notes)
    assert first == again == last
    assert len({0, first, other, captured, captured_too}) == 5


def test_tiles_are_shared_out_beforehand_where_no_counter_is_left(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "COUNTERS", 3)
    with pytest.warns(RuntimeWarning, match="2 streams and captured launches have a counter") as said:
        for notes.stream in (5, 6, 7, 8, 5, 6, 7):
            launch.launch(*masked())
    assert len(said) == 1
    assert counters(notes) == [1, 2, 0, 0, 1, 2, 0]


@pytest.mark.parametrize(("expected", "box"), [(1, 16), (16, 16), (17, 32), (33, 64), (500, 64)])
def test_small_groups_bring_few_rows_at_a_time(expected: int, box: int, notes: Notes):
    values, scales = weights(3, 264, 400)
    o = operands(512, 264, 400)._replace(b=values, b_scales=scales, layout=torch.zeros(3, dtype=torch.int32))
    launch.launch(plan((128, 32), 512, 264, 400, kind=Kind.ENDS, groups=3, expected_m=expected, alignment=128), o)
    assert notes.encoded[0].box == [128, box, 1]
    assert fields(notes.launched[0], "box_rows", "alignment") == [box, 128]


@pytest.mark.parametrize("clear", [False, True])
def test_padding_is_cleared_where_asked_for(clear: bool, notes: Notes):
    values, scales = weights(3, 264, 400)
    layout = torch.zeros(256, dtype=torch.int32)
    o = operands(256, 264, 400)._replace(b=values, b_scales=scales, layout=layout, clear_padding=clear)
    p = plan((128, 32), 256, 264, 400, kind=Kind.CONTIGUOUS, groups=3, alignment=128)
    launch.launch(p, o)
    launch.launch(p, o._replace(clear_padding=not clear))
    assert [launched.problem["clear_padding"] for launched in notes.launched] == [clear, not clear]


def test_column_scales_are_described(notes: Notes):
    o = operands(300, 264, 400)
    c = torch.zeros(300, 264)
    o = o._replace(b_scales=torch.ones(264, 4), d=torch.zeros(300, 264), c=c)
    launch.launch(plan((128, 64), 300, 264, 400, column_scales=True), o)
    a, b, _, b_scales = notes.encoded
    assert (a.box, b.box) == ([128, 128, 1], [128, 64, 1])
    assert (b_scales.shape, b_scales.pitches[0], b_scales.box) == ([264, 4, 1], 1056, [64, 1, 1])
    assert fields(notes.launched[0], "d", "c", "d_stride_m") == [o.d.data_ptr(), c.data_ptr(), 264]


def test_groups_along_k_are_described_by_a_kernel(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_small_kernel", lambda source, index: cuda.CUfunction(1))
    flat = [torch.zeros(384 * rows, dtype=torch.uint8).view(torch.float8_e4m3fn) for rows in (64, 48)]
    layout, d = torch.zeros(5, dtype=torch.int32), torch.empty(5, 64, 48)
    o = Operands(flat[0], torch.ones(64, 3), flat[1], torch.ones(48, 3), d, layout)
    launch.launch(plan((64, 32), 64, 48, 384, kind=Kind.K_GROUPED, groups=5, alignment=128, column_scales=True), o)
    describing, launched = notes.launched
    assert (describing.kernel, describing.grid, describing.threads, describing.smem) == (1, 1, 32, 0)
    assert launched.kernel == 32 and launched.args == describing.args
    assert fields(launched, "a", "b", "layout") == [flat[0].data_ptr(), flat[1].data_ptr(), layout.data_ptr()]
    assert launched.problem["maps"] and launched.problem["maps"] == describing.problem["maps"]
    assert [x.shape for x in notes.encoded[:2]] == [[384, 64, 1], [384, 48, 1]]


@pytest.mark.parametrize("value", ["0", "1"])
def test_layouts_are_reported_on_in_debug_mode(value: str, notes: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_DEBUG", value)
    monkeypatch.setattr(launch, "_small_kernel", lambda source, index: cuda.CUfunction(REPORT))
    layout, plain = torch.zeros(256, dtype=torch.int32), operands(256, 48, 128)
    o = plain._replace(b=plain.b.view(1, 48, 128), b_scales=plain.b_scales.view(1, 1, 1), layout=layout)
    launch.launch(plan((64, 32), 256, 48, 128, kind=Kind.CONTIGUOUS, alignment=128), o)
    assert notes.reported == [[layout.data_ptr(), 256, 1, 128]] * int(value)
    assert [launched.kernel for launched in notes.launched] == [32]


@pytest.mark.parametrize(("tile", "pdl", "count"), [((64, 32), False, 0), ((64, 32), True, 1), ((128, 64, 2), True, 2)])
def test_launches_may_start_early(tile: tuple[int, ...], pdl: bool, count: int, notes: Notes):
    launch.launch(plan(tile, 300, 64, 128, Config(pdl=pdl)), operands(300, 64, 128))
    early = int(cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
    assert len(notes.launched[0].attributes) == count
    assert (early in notes.launched[0].attributes) == pdl


def test_a_share_of_the_tensor_cores_is_a_pace(notes: Notes):
    """A K block of 64x32 takes 64 clocks of them."""
    for share in (100, 50, 1):
        launch.launch(plan((64, 32), 64, 64, 128, Config(tc_util=share)), operands(64, 64, 128))
    assert [launched.problem["pace"] for launched in notes.launched] == [0, 128, 6400]


@pytest.mark.parametrize(
    ("m", "rows", "scale_rows"), [(1, 8, 4), (13, 16, 16), (64, 64, 64), (65, 40, 64), (257, 64, 64)]
)
def test_no_more_rows_are_asked_for_than_there_are(m: int, rows: int, scale_rows: int, notes: Notes):
    launch.launch(plan((64, 32), m, 64, 128), operands(m, 64, 128))
    assert notes.encoded[0].box == [128, rows, 1]
    assert notes.encoded[2].box == [scale_rows, 1, 1]
    assert fields(notes.launched[0], "box_rows", "scale_rows") == [rows, scale_rows]
    assert notes.launched[0].cluster == 1


def addresses(launched: SimpleNamespace, at: int = 0) -> list[int]:
    """Those of the tensor maps of a, b, a_scales and d."""
    return [int.from_bytes(launched.maps[start + at : start + at + 8], "little") for start in (0, 128, 256, 512)]


def others(launched: SimpleNamespace, at: int = 0) -> bytes:
    """All else that these maps hold."""
    return b"".join(launched.maps[i : i + at] + launched.maps[i + at + 8 : i + 128] for i in (0, 128, 256, 512))


@pytest.mark.parametrize("at", [0, 8], ids=["by hand", "by the driver"])
def test_a_known_layout_replaces_addresses(at: int, notes: Notes):
    """By hand where a tensor map begins with its address, and else by the driver, who alone knows where it is."""
    notes.address_at = at
    p, first, second = plan((64, 32), 64, 64, 128), operands(64, 64, 128), operands(64, 64, 128)
    launch.launch(p, first)
    before = len(notes.replaced)
    mixed = first._replace(b=second.b, d=second.d, b_scales=second.b_scales)
    launch.launch(p, mixed)
    assert len(notes.encoded) == 4
    assert (len(notes.replaced) > before) == (at > 0)
    for launched, o in zip(notes.launched, (first, mixed), strict=True):
        assert addresses(launched, at) == [x.data_ptr() for x in (o.a, o.b, o.a_scales, o.d)]
        assert fields(launched, "b_scales", "d") == [o.b_scales.data_ptr(), o.d.data_ptr()]
    assert others(notes.launched[0], at) == others(notes.launched[1], at)


def test_what_an_interrupt_leaves_is_mended(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    p, first, second = plan((64, 32), 64, 64, 128), operands(64, 64, 128), operands(64, 64, 128)
    launch.launch(p, first)

    def interrupted(index: int) -> int:
        raise KeyboardInterrupt

    ((launcher,),) = launch._thread.launchers.known.values()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(launcher, "current_stream", interrupted)
        launch.launch(p, second)
    launch.launch(p, first)
    assert addresses(notes.launched[1]) == addresses(notes.launched[0])
    assert notes.launched[1].problem == notes.launched[0].problem


def test_tensor_maps_are_aligned(notes: Notes):
    for m in range(1, 60):
        launch.launch(plan((64, 32), m, 64, 128), operands(m, 64, 128))
    assert all(launched.args % 128 == 0 for launched in notes.launched)


def test_another_layout_is_described_anew(notes: Notes):
    p, o = plan((64, 32), 64, 64, 128), operands(64, 64, 128)
    launch.launch(p, o)
    wide = torch.zeros(64, 256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :128]
    launch.launch(p, o._replace(a=wide))
    assert [x.pitches[0] for x in notes.encoded[::4]] == [128, 256]


def test_scales_of_a_in_another_order_are_put_in_order(notes: Notes):
    o = operands(65, 64, 400)
    rows = torch.arange(65.0 * 4).view(65, 4)
    launch.launch(plan((64, 32), 65, 64, 400), o._replace(a_scales=rows))
    assert notes.encoded[2].address not in (rows.data_ptr(), o.a_scales.data_ptr())
    assert notes.encoded[2].pitches[0] == 68 * 4
    assert torch.equal(launch.mn_major(rows), rows)


def test_operands_of_another_device_are_launched_there(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    now: list[int | None] = [3]

    @contextlib.contextmanager
    def on(index: int | None) -> Iterator[None]:
        before, now[0] = now[0], index
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5 if now[0] == index else 6)
    launch.launch(plan((64, 32), 64, 64, 128), operands(64, 64, 128))
    assert [launched.stream for launched in notes.launched] == [5]
    assert now == [3]


def test_launches_are_bounded_and_the_least_recently_used_goes(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "MAX_LAUNCHERS", 2)
    plans = [plan((64, 32), m, 64, 128) for m in (1, 2, 3)]
    for i in (0, 1, 0, 2, 0, 1):
        launch.launch(plans[i], operands(plans[i].problem.m, 64, 128))
    assert len(notes.encoded) == 4 * 4  # 0, 1, 2, and 1 again; 0 was in use all the time
    assert [launcher.plan for (launcher,) in launch._thread.launchers.known.values()] == [plans[0], plans[1]]


def test_a_refusal_of_the_driver_is_an_error_by_name(notes: Notes):
    p, o = plan((64, 32), 64, 64, 128), operands(64, 64, 128)
    notes.fail = cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(LaunchError, match=r"launching 64x32, .*: CUDA_ERROR_INVALID_VALUE: invalid argument") as error:
        launch.launch(p, o)
    assert (error.value.code, error.value.name) == (1, "CUDA_ERROR_INVALID_VALUE")
    notes.fail = None
    launch.launch(p, o)
    assert len(notes.launched) == 1


# Calls of a kind that came before: `again`


def stack(o: Operands, groups: int) -> Operands:
    """With as many b, all alike."""
    b = o.b.view(torch.uint8).repeat(groups, 1, 1).view(o.b.dtype)
    return o._replace(b=b, b_scales=o.b_scales.repeat(groups, 1, 1))


def of_kind(kind: Kind, m: int = 256) -> tuple[Plan, Operands, int]:
    """What launch is told for a call: a plan, operands and the option."""
    o, groups = operands(m, 64, 128), 2
    if kind == Kind.DENSE:
        return plan((64, 32), m, 64, 128), o, launch.DENSE
    o = stack(o, groups)
    if kind == Kind.CONTIGUOUS:
        o = o._replace(layout=torch.zeros(m, dtype=torch.int32), clear_padding=True)
        return plan((64, 32), m, 64, 128, kind=kind, groups=groups, alignment=128), o, 128
    a = torch.zeros(groups, m, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    a_scales, d = torch.ones(groups, 1, m).mT, torch.empty(groups, m, 64, dtype=torch.bfloat16)
    o = o._replace(a=a, a_scales=a_scales, d=d, layout=torch.zeros(groups, dtype=torch.int32))
    return plan((64, 32), m, 64, 128, kind=kind, groups=groups, expected_m=20), o, 20


def call(o: Operands, **more: Any) -> None:
    """The public function of operands of_kind."""
    pairs = (o.a, o.a_scales), (o.b, o.b_scales), o.d
    if o.layout is None:
        deep_gemm.fp8_gemm_nt(*pairs, **more)
    elif o.a.dim() == 2:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*pairs, o.layout, **more)
    else:
        deep_gemm.m_grouped_fp8_gemm_nt_masked(*pairs, o.layout, **{"expected_m": 20, **more})


def again(o: Operands, option: Any = launch.DENSE) -> bool:
    return launch.again((o.a, o.a_scales), (o.b, o.b_scales), o.d, o.layout, option)


PUBLIC = (Kind.DENSE, Kind.CONTIGUOUS, Kind.MASKED)


@pytest.fixture(autouse=True)
def as_set_before() -> Iterator[None]:
    yield
    deep_gemm.set_compile_mode(0)
    deep_gemm.set_pdl(False)
    deep_gemm.set_num_sms(None)


@pytest.fixture
def own_guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch.compile had no guards to borrow."""
    if request.param:
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)


either_guard = pytest.mark.parametrize("own_guard", [False, True], ids=["torch's guard", "own guard"], indirect=True)


@either_guard
@pytest.mark.parametrize("kind", PUBLIC)
def test_a_call_like_one_before_is_launched_at_once(kind: Kind, own_guard: None, notes: Notes):
    """With the arguments that a launch of its own would have: nothing is described, allocated or looked up."""
    p, first, option = of_kind(kind)
    _, second, _ = of_kind(kind)
    launch.launch(p, second, option, config.current())
    wanted = notes.launched.pop()
    launch._thread.launchers.known.clear()
    launch.launch(p, first, option, config.current())
    described = len(notes.encoded)
    with pytest.MonkeyPatch.context() as patch:
        for forbidden in ((settings, "get"), (torch, "empty"), (launch, "driver"), (launch, "kernel_for")):
            patch.setattr(*forbidden, lambda *args, **keywords: pytest.fail("not here"))
        call(second)
    assert len(notes.encoded) == described and len(notes.launched) == 2
    assert addresses(notes.launched[1]) == addresses(wanted)
    assert others(notes.launched[1]) == others(wanted)
    assert notes.launched[1].problem == wanted.problem
    assert (notes.launched[1].grid, notes.launched[1].stream) == (wanted.grid, wanted.stream)


def misplaced(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    flat = torch.empty(x.numel() + 16, dtype=x.dtype).view(torch.uint8)
    start = 4 if flat.data_ptr() % 16 == 0 else 0
    flat = flat[start : start + x.numel() * x.element_size()].view(x.dtype)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def freed(x: torch.Tensor) -> torch.Tensor:
    y = x.clone(memory_format=torch.preserve_format)
    y.untyped_storage().resize_(0)
    return y


class Subclass(torch.Tensor):
    pass


CHANGES: dict[str, Callable[[Operands], Operands]] = {
    "a is FP32": lambda o: o._replace(a=o.a.float()),
    "a is E5M2": lambda o: o._replace(a=o.a.view(torch.float8_e5m2)),
    "b has other strides": lambda o: o._replace(b=o.b.view(torch.uint8).mT.contiguous().mT.view(o.b.dtype)),
    "b's scales have other strides": lambda o: o._replace(b_scales=o.b_scales.expand(3, *o.b_scales.shape)[..., 0]),
    "a's scales are BF16": lambda o: o._replace(a_scales=o.a_scales.bfloat16()),
    "d is FP32": lambda o: o._replace(d=o.d.float()),
    "d has fewer rows": lambda o: o._replace(d=o.d[..., :-1, :]),
    "d has wider rows": lambda o: o._replace(d=torch.cat([o.d, o.d], -1)[..., : o.d.shape[-1]]),
    "d is elsewhere": lambda o: o._replace(d=o.d.to("meta")),
    "d is of a subclass": lambda o: o._replace(d=o.d.as_subclass(Subclass)),
    "d wants gradients": lambda o: o._replace(d=o.d.clone().requires_grad_()),
    "a is no tensor": lambda o: o._replace(a=[1.0]),  # type: ignore[arg-type]
    "b is None": lambda o: o._replace(b=None),  # type: ignore[arg-type]
    "a starts askew": lambda o: o._replace(a=misplaced(o.a.view(torch.uint8)).view(o.a.dtype)),
    "a's scales start askew": lambda o: o._replace(a_scales=misplaced(o.a_scales)),
    "d starts askew": lambda o: o._replace(d=misplaced(o.d)),
    "layout has no memory": lambda o: o._replace(layout=None if o.layout is None else freed(o.layout)),
    "b has no memory": lambda o: o._replace(b=freed(o.b.view(torch.uint8)).view(o.b.dtype)),
    "b's scales have no memory": lambda o: o._replace(b_scales=freed(o.b_scales)),
    "d has no memory": lambda o: o._replace(d=freed(o.d)),
}  # fmt: skip


@either_guard
@pytest.mark.parametrize("kind", PUBLIC)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_unlike_is_for_the_check(change: str, kind: Kind, own_guard: None, notes: Notes):
    if change.startswith("layout") and kind == Kind.DENSE:
        pytest.skip("has none")
    p, o, option = of_kind(kind)
    launch.launch(p, o, option, config.current())
    assert again(o, option)
    assert not again(CHANGES[change](o), option)
    assert len(notes.launched) == 2
    assert again(o, option)


@either_guard
def test_layouts_of_groups_are_compared_as_well(own_guard: None, notes: Notes):
    p, o, option = of_kind(Kind.MASKED)
    launch.launch(p, o, option, config.current())
    assert o.layout is not None
    for layout in (o.layout.long(), o.layout[:1], o.layout.repeat_interleave(2)[::2], None, 5):
        assert not again(o._replace(layout=layout), option)  # type: ignore[arg-type]
    assert not again(o, option + 1)
    assert again(o, option)


@pytest.mark.parametrize("pairs", [(None, None), (1, 2), ((), ()), ("ab", "cd"), ((1, 2), (3, 4))])
def test_what_is_no_pair_is_for_the_check(pairs: Any, notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    assert not launch.again(*pairs, o.d)
    assert not launch.again((o.a, o.a_scales, o.a), (o.b, o.b_scales), o.d)
    assert not launch.again(torch.stack([o.a_scales] * 2), (o.b, o.b_scales), o.d)
    with pytest.raises(deep_gemm.errors.InvalidInputError):
        deep_gemm.fp8_gemm_nt(*pairs, o.d)


@pytest.mark.parametrize("kind", PUBLIC)
@pytest.mark.parametrize(
    "option",
    [{"recipe": (1, 2, 3)}, {"recipe_a": (1, 1)}, {"recipe_b": 7}, {"compiled_dims": "x"}],
    ids=lambda option: next(iter(option)),
)
def test_options_are_checked_every_time(option: dict[str, Any], kind: Kind, notes: Notes):
    p, o, known = of_kind(kind)
    launch.launch(p, o, known, config.current())
    call(o)
    for _ in range(2):
        with pytest.raises(deep_gemm.errors.InvalidInputError):
            call(o, **option)
    assert len(notes.launched) == 2


@pytest.mark.parametrize("hint", [True, 20.0, "20", None])
def test_hints_are_checked_every_time(hint: Any, notes: Notes):
    p, o, known = of_kind(Kind.MASKED)
    launch.launch(p, o, known, config.current())
    launch.launch(p, o, 1, config.current())
    with pytest.raises(deep_gemm.errors.InvalidInputError, match="expected_m is"):
        call(o, expected_m=hint)


def test_settings_have_launches_of_their_own(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    deep_gemm.set_pdl(True)
    assert not again(o)
    launch.launch(plan((64, 32), 256, 64, 128, config.current()), o, option, config.current())
    for enable in (False, True) * 3:
        deep_gemm.set_pdl(enable)
        if launch._thread.launchers.settings is not config.current():
            assert not again(o)  # until a call has been planned
            launch.launch(p, o, option, config.current())
        assert again(o)
        assert bool(notes.launched[-1].attributes) == enable or launch._thread.launchers.last.plan is p
    deep_gemm.set_compile_mode(1)
    assert not again(o)
    deep_gemm.set_compile_mode(0)
    assert again(o)


def test_settings_are_bounded(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    for num_sms in range(1, 40):
        deep_gemm.set_num_sms(num_sms)
        launch.launch(p, o, option, config.current())
        assert again(o)
    assert len(launch._thread._of) == launch.MAX_SETTINGS


def test_modes_see_operators(notes: Notes):
    """And a launch that was made in one is none for calls outside."""
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    with FlopCounterMode(display=False):
        assert not again(o)
        ((launcher,),) = launch._thread.launchers.known.values()
        launcher.fits_again = lambda *tensors: True  # whatever the guard makes of what a mode does to dispatching
        assert not again(o)
    assert again(o)


def test_another_current_device_is_for_the_check(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    current: list[int | None] = [None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    assert again(o)
    current[0] = 1
    assert not again(o)


def test_calls_in_any_order(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    """Whatever came before, and however much has been forgotten since, what is launched is what was called."""
    monkeypatch.setattr(launch, "MAX_LAUNCHERS", 4)
    rng = random.Random(0)
    made = [of_kind(kind, m) for kind in PUBLIC for m in (64, 128, 192)] * 2
    alike = of_kind(Kind.DENSE, 64)  # of the same sizes as another, with d in wider rows
    wide = torch.empty(64, 128, dtype=torch.bfloat16)[:, :64]
    made += [(alike[0], alike[1]._replace(d=wide), launch.DENSE)] * 3
    hits = 0
    for turn in range(3000):
        p, o, option = made[turn % 5 if turn < 1000 else rng.randrange(len(made))]
        notes.stream = rng.choice((77, 78))
        if again(o, option):
            hits += 1
        else:
            launch.launch(p, o, option, config.current())
        (launched,) = notes.launched
        assert addresses(launched)[:3] == [x.data_ptr() for x in (o.a, o.b, o.a_scales)]
        assert fields(launched, "kind", "m", "d", "d_stride_m", "b_scales") == [
            p.problem.kind, p.problem.m, o.d.data_ptr(), o.d.stride(-2), o.b_scales.data_ptr()
        ]  # fmt: skip
        assert fields(launched, "layout") == [0 if o.layout is None else o.layout.data_ptr()]
        assert launched.stream == notes.stream
        notes.launched.clear()
    assert 500 < hits < 2999
    assert len(launch._thread.launchers.known) <= 4
    # What is forgotten is kept by nothing: at most each of those left, and the last one, knows of one more.
    gc.collect()
    assert sum(type(x) is launch._Launcher for x in gc.get_objects()) <= 4 * launch.MAX_ALIKE * 2 + 1


def test_what_is_forgotten_is_not_launched(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    """Not even as what is likely to come next, whatever the option is."""
    monkeypatch.setattr(launch, "MAX_LAUNCHERS", 1)
    (p, o, _), (q, other, _) = of_kind(Kind.CONTIGUOUS, 128), of_kind(Kind.CONTIGUOUS, 256)
    for _ in range(3):
        launch.launch(p, o, 128, config.current())
    launch.launch(q, other, 128, config.current())
    assert again(other, 128), "the new one stays, however often the old one was used"
    for option in (128, -128, None, 0):
        assert not again(o, option)
        launch._thread.launchers.last.next = launch._Launcher(p, o, 128, lambda *tensors: True)
        launch._thread.launchers._forget((launch._thread.launchers.last.next,))
        assert not again(o, option)


def test_what_a_warning_multiplies_changes_no_launch(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    """Whoever hears of it may call again, with the same launcher."""
    monkeypatch.setattr(launch, "COUNTERS", 1)
    (p, o, option), (_, other, _) = of_kind(Kind.MASKED), of_kind(Kind.MASKED)
    with pytest.warns(RuntimeWarning, match="have a counter"):
        launch.launch(p, o, option, config.current())
    for call_it in (lambda: again(o, option), lambda: launch.launch(p, o, option, config.current())):
        launch._counters[p.tile, None]._warned = False  # type: ignore[index]
        notes.launched.clear()
        with monkeypatch.context() as patch:
            patch.setattr(launch.warnings, "warn", lambda *args, **keywords: again(other, option))
            call_it()
        assert [addresses(x)[0] for x in notes.launched] == [other.a.data_ptr(), o.a.data_ptr()]


def test_wrappers_are_not_launched(notes: Notes):
    """Even where the result is a plain tensor: they are operators' business, or nobody's."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, x: torch.Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError(f"seen: {func}")

    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    for name in ("a", "a_scales", "b", "b_scales"):
        wrapped = o._replace(**{name: Wrapper(getattr(o, name))})
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"seen: deep_gemm\.fp8_gemm_nt\.out"):
                call(wrapped)
    assert len(notes.launched) == 1


def test_tensors_are_not_kept(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    assert again(o)
    gone = [weakref.ref(x) for x in (o.a, o.b, o.d)]
    del o
    gc.collect()
    assert [x() for x in gone] == [None] * 3


def test_refusals_of_the_driver_are_errors_again(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    notes.fail = cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(LaunchError, match="launching 64x32"):
        again(o)
    notes.fail = None
    assert again(o)


def test_threads_have_launches_of_their_own(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    seen: list[Any] = []

    def work() -> None:
        seen.append(again(o))
        launch.launch(p, o, option, config.current())
        seen.append(again(o))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [False] * 4 + [True] * 4
    assert len({launched.args for launched in notes.launched}) == 5


def test_a_forked_child_knows_nothing_of_its_parent(notes: Notes):
    p, o, option = of_kind(Kind.DENSE)
    launch.launch(p, o, option, config.current())
    launch._kernels[p.tile, 0, False] = "a kernel of the parent's context"
    with launch._lock:
        child = os.fork()
        if not child:
            fresh = launch._lock.acquire(blocking=False) and not again(o)
            os._exit(0 if fresh and not launch._kernels and not launch._counters else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    launch._kernels.clear()
    assert again(o)


@pytest.mark.parametrize("change", ["type", "dtype", "shape", "stride", "negation", "gradient", "mode"])
def test_both_guards_agree(change: str, monkeypatch: pytest.MonkeyPatch):
    x, y = torch.zeros(4, 6), torch.zeros(6)
    other = {
        "type": torch.nn.Parameter(x, requires_grad=False),
        "dtype": x.view(torch.int32),
        "shape": x[:, :5],
        "stride": torch.zeros(6, 4).t(),
        "negation": torch._neg_view(x),
        "gradient": x.clone().requires_grad_(),
        "mode": x,
    }[change]
    guards = [guard.guard([x, y])]
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    guards.append(guard.guard([x, y]))
    for fits in guards:
        assert fits(x, y) and fits(x.clone(), y.clone())
        with FlopCounterMode(display=False) if change == "mode" else contextlib.nullcontext():
            assert not fits(other, y)
