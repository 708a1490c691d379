"""What the launcher tells the driver, over a driver whose functions only take notes. No GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_gemm import heuristics
from deep_gemm.config import Config
from deep_gemm.errors import LaunchError
from deep_gemm.plan import Plan, Strip, make_strip, make_tile
from deep_gemm.problem import Kind, Operands, Problem
from deep_gemm.runtime import driver, launch
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

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuTensorMapEncodeTiled(self, dtype, rank, address, shape, strides, box, steps, interleave, swizzle, l2, fill):
        sizes = [[int(x) for x in values] for values in (shape, strides, box)]
        assert (rank, [int(x) for x in steps]) == (3, [1, 1, 1])
        self.encoded.append(SimpleNamespace(address=address, shape=sizes[0], pitches=sizes[1], box=sizes[2]))
        return *SUCCESS, cuda.CUtensorMap()

    def cuTensorMapReplaceAddress(self, tensor_map, address):
        self.replaced.append((tensor_map.getPtr(), address))
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
    monkeypatch.setattr(launch, "_thread", SimpleNamespace(launchers={}))
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


def test_a_known_layout_replaces_addresses_that_changed(notes: Notes):
    p, first, second = plan((64, 32), 64, 64, 128), operands(64, 64, 128), operands(64, 64, 128)
    launch.launch(p, first)
    launch.launch(p, first)
    assert notes.replaced == []
    mixed = first._replace(b=second.b, d=second.d, b_scales=second.b_scales)
    launch.launch(p, mixed)
    args = notes.launched[0].args
    assert notes.replaced == [(args + 128, second.b.data_ptr()), (args + 512, second.d.data_ptr())]
    assert [x.problem["b_scales"] for x in notes.launched] == [first.b_scales.data_ptr()] * 2 + [
        second.b_scales.data_ptr()
    ]
    assert len(notes.encoded) == 4


def test_an_interrupted_replacement_is_mended(notes: Notes, monkeypatch: pytest.MonkeyPatch):
    p, first, second = plan((64, 32), 64, 64, 128), operands(64, 64, 128), operands(64, 64, 128)
    launch.launch(p, first)
    (launcher,) = launch._thread.launchers.values()
    replace = launcher._replace

    def interrupted(tensor_map: Any, address: int) -> Any:
        if notes.replaced:
            raise KeyboardInterrupt
        return replace(tensor_map, address)

    launcher._replace = interrupted
    with pytest.raises(KeyboardInterrupt):
        launch.launch(p, second)
    launcher._replace = replace
    notes.replaced.clear()
    launcher(first)
    assert [address for _, address in notes.replaced] == [
        x.data_ptr() for x in (first.a, first.b, first.a_scales, first.d)
    ]


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
    assert notes.replaced == []


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
    assert [key[0] for key in launch._thread.launchers] == [plans[0], plans[1]]


def test_a_refusal_of_the_driver_is_an_error_by_name(notes: Notes):
    p, o = plan((64, 32), 64, 64, 128), operands(64, 64, 128)
    notes.fail = cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(LaunchError, match=r"launching 64x32, .*: CUDA_ERROR_INVALID_VALUE: invalid argument") as error:
        launch.launch(p, o)
    assert (error.value.code, error.value.name) == (1, "CUDA_ERROR_INVALID_VALUE")
    notes.fail = None
    launch.launch(p, o)
    assert len(notes.launched) == 1
