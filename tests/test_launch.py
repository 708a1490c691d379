"""What the launcher tells the driver, over a driver whose functions only take notes. No GPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_gemm import heuristics
from deep_gemm.errors import LaunchError
from deep_gemm.problem import Operands, Problem
from deep_gemm.runtime import driver, launch
from deep_gemm.runtime.device import H200

cuda = importlib.import_module("cuda.bindings.driver")
SUCCESS = (cuda.CUresult.CUDA_SUCCESS,)


class Notes:
    """Stands for cuda.bindings.driver: its types are the real ones, its functions write down what they are given."""

    def __init__(self) -> None:
        self.encoded: list[SimpleNamespace] = []
        self.replaced: list[tuple[int, int]] = []
        self.launched: list[SimpleNamespace] = []
        self.fail: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(cuda, name)

    def cuTensorMapEncodeTiled(self, dtype, rank, address, shape, strides, box, steps, interleave, swizzle, l2, fill):
        sizes = [[int(x) for x in values] for values in (shape, strides, box)]
        self.encoded.append(SimpleNamespace(address=address, shape=sizes[0], pitch=sizes[1][0], box=sizes[2]))
        return *SUCCESS, cuda.CUtensorMap()

    def cuTensorMapReplaceAddress(self, tensor_map, address):
        self.replaced.append((tensor_map.getPtr(), address))
        return SUCCESS

    def cuLaunchKernelEx(self, config, kernel, parameters, extra):
        if self.fail:
            return (self.fail,)
        args = launch._Args.from_address(ctypes.c_void_p.from_address(parameters).value)
        p = args.problem
        self.launched.append(
            SimpleNamespace(
                kernel=int(kernel), grid=config.gridDimX, threads=config.blockDimX, smem=config.sharedMemBytes,
                stream=int(config.hStream), cluster=config.attrs[0].value.clusterDim.x if config.numAttrs else 1,
                problem=(p.m, p.n, p.k_blocks, p.band, p.stage_bytes),
                b_scales=(p.b_scales, p.b_scale_stride_n, p.b_scale_stride_k), args=ctypes.addressof(args),
            )
        )  # fmt: skip
        return SUCCESS

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
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return notes


def operands(m: int, n: int, k: int) -> Operands:
    blocks = -(-k // 128)
    a, b = (torch.zeros(rows, k, dtype=torch.uint8).view(torch.float8_e4m3fn) for rows in (m, n))
    a_scales = torch.ones(blocks, -(-m // 4) * 4).t()[:m]
    return Operands(a, a_scales, b, torch.ones(-(-n // 128), blocks), torch.empty(m, n, dtype=torch.bfloat16))


def plan(tile: tuple[int, ...], m: int, n: int, k: int):
    return heuristics.plan_for(heuristics.make_tile(*tile), Problem(m, n, k), H200, 132)


def test_structures_have_the_sizes_of_the_kernel():
    assert ctypes.sizeof(launch._ProblemArgs) == 48
    assert ctypes.sizeof(launch._Args) == 576
    assert launch._Args.problem.offset == 512
    assert launch._ProblemArgs.b_scales.offset == 24


def test_operands_are_described(notes: Notes):
    o = operands(300, 264, 400)
    p = plan((128, 256, 2, 1), 300, 264, 400)
    launch.launch(p, o)
    a, b, a_scales, d = notes.encoded
    assert (a.address, a.shape, a.pitch, a.box) == (o.a.data_ptr(), [400, 300], 400, [128, 128])
    assert (b.address, b.shape, b.pitch, b.box) == (o.b.data_ptr(), [400, 264], 400, [128, 128])  # half of 256 rows
    assert (a_scales.address, a_scales.shape, a_scales.pitch) == (o.a_scales.data_ptr(), [300, 4], 1200)
    assert a_scales.box == [128, 1]
    assert (d.address, d.shape, d.pitch, d.box) == (o.d.data_ptr(), [264, 300], 528, [64, 128])
    (launched,) = notes.launched
    assert (launched.grid, launched.threads, launched.smem) == (p.ctas, 384, p.tile.smem_bytes)
    assert (launched.cluster, launched.stream, launched.kernel) == (2, 77, 256)
    assert launched.problem == (300, 264, 4, p.band, (128 + 256) * 128 + 512)
    assert launched.b_scales == (o.b_scales.data_ptr(), 4, 1)


@pytest.mark.parametrize(("m", "rows", "scale_rows"), [(1, 8, 4), (13, 16, 16), (64, 64, 64), (65, 64, 64)])
def test_no_more_rows_are_asked_for_than_there_are(m: int, rows: int, scale_rows: int, notes: Notes):
    launch.launch(plan((64, 32), m, 64, 128), operands(m, 64, 128))
    assert notes.encoded[0].box == [128, rows]
    assert notes.encoded[2].box == [scale_rows, 1]
    assert notes.launched[0].problem[-1] == (rows + 32) * 128 + scale_rows * 4
    assert notes.launched[0].cluster == 1


def test_a_known_layout_replaces_addresses_that_changed(notes: Notes):
    p, first, second = plan((64, 32), 64, 64, 128), operands(64, 64, 128), operands(64, 64, 128)
    launch.launch(p, first)
    launch.launch(p, first)
    assert notes.replaced == []
    mixed = first._replace(b=second.b, d=second.d, b_scales=second.b_scales)
    launch.launch(p, mixed)
    args = notes.launched[0].args
    assert notes.replaced == [(args + 128, second.b.data_ptr()), (args + 384, second.d.data_ptr())]
    assert [x.b_scales[0] for x in notes.launched] == [first.b_scales.data_ptr()] * 2 + [second.b_scales.data_ptr()]
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
    launcher(first, first.a_scales)
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
    assert [x.pitch for x in notes.encoded[::4]] == [128, 256]
    assert notes.replaced == []


def test_scales_of_a_in_another_order_are_put_in_order(notes: Notes):
    o = operands(65, 64, 400)
    rows = torch.arange(65.0 * 4).view(65, 4)
    launch.launch(plan((64, 32), 65, 64, 400), o._replace(a_scales=rows))
    assert notes.encoded[2].address not in (rows.data_ptr(), o.a_scales.data_ptr())
    assert notes.encoded[2].pitch == 68 * 4
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
