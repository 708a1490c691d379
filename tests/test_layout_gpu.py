"""The kernel that puts scales in order, on a GPU: every stride, streams, threads, graphs, sizes past 2^31."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import captured
import pytest
import sanitizer
import torch
from test_layout import strided

from deep_gemm import layout
from deep_gemm.layout import align, get_mn_major_tma_aligned_tensor, transform_sf_into_required_layout
from deep_gemm.runtime import transpose
from deep_gemm.runtime.compiler import obtain

pytestmark = pytest.mark.gpu


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides; what lies between them is NaN."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    memory = torch.full((size,), float("nan"), device="cuda")
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def check(x: torch.Tensor, name: str = "") -> None:
    got, padded = get_mn_major_tma_aligned_tensor(x), align(x.shape[-2], 4)
    assert torch.equal(got.view(torch.int32), x.view(torch.int32)), name
    assert got.stride() == (x.shape[-1] * padded, 1, padded)[-x.dim() :], name
    assert got.device == x.device and got.data_ptr() % 16 == 0, name
    assert get_mn_major_tma_aligned_tensor(got) is got, name


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, so that what the kernel leaves out shows; and nothing else copies."""

    def new_empty(x: torch.Tensor, shape: Any) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)

    def launched(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        assert transpose.prepare(x.device.index) is not None
        return transpose.to_mn_major(x, out)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(layout, "to_mn_major", launched)


def test_the_kernel_compiles_clean_with_the_compiler_of_this_machine() -> None:
    cubin = obtain(transpose.source())
    assert (cubin.warnings, cubin.local_bytes) == ([], 0)


@pytest.mark.parametrize("k", [1, 7, 56, 57])
@pytest.mark.parametrize("mn", [1, 7, 128, 4097])
@pytest.mark.parametrize("groups", [(), (1,), (2,), (4,)], ids=str)
def test_every_order(groups: tuple[int, ...], mn: int, k: int) -> None:
    for name, x in strided((*groups, mn, k)).items():
        check(on_gpu(x), name)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 128])
def test_every_tile(k: int) -> None:
    """Columns about a multiple of each tile's, so that tiles are cut everywhere."""
    for mn in (31, 33, 127, 128, 129, 511, 513, 1025, 2047, 4095, 4096, 8193):
        x = torch.randn(mn, k, device="cuda")
        check(x, f"row-major {mn}")
        check(x.mT.contiguous().mT, f"M-major {mn}")


def test_strides_of_zero() -> None:
    for shape in ((1, 57), (300, 1), (1, 1)):
        check(torch.randn(shape, device="cuda").expand(300, 57))
    for shape in ((1, 300, 57), (4, 1, 57), (4, 300, 1), (1, 1, 1)):
        check(torch.randn(shape, device="cuda").expand(4, 300, 57))


def test_a_base_off_16_bytes() -> None:
    for offset in (1, 2, 3):
        check(torch.randn(57 * 300 + offset, device="cuda")[offset:].view(300, 57))
        check(torch.randn(57 * 300 + offset, device="cuda")[offset:].view(57, 300).mT)


def test_many_groups() -> None:
    x = torch.randn(70000, 3, 9, device="cuda")  # more than a grid has along y
    check(x)
    check(x.mT.contiguous().mT)


def test_empty() -> None:
    for shape in ((0, 4), (4, 0), (2, 0, 4), (0, 4, 4)):
        assert get_mn_major_tma_aligned_tensor(torch.zeros(shape, device="cuda")).shape == shape


def test_powers_of_two() -> None:
    x = torch.ldexp(torch.ones((), device="cuda"), torch.randint(-126, 128, (2, 300, 57), device="cuda"))
    for groups, sf in ((2, x), (None, x[0])):
        got = transform_sf_into_required_layout(sf, 300, 57 * 128, (1, 128, 128), groups, is_sfa=True)
        assert torch.equal(got, sf) and got.stride()[-2:] == (1, 300)


def test_every_bit_pattern_passes() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (300, 57), dtype=torch.int32, device="cuda")
    check(bits.view(torch.float32))


def test_strides_past_2_31() -> None:
    memory = torch.zeros(2**31 + 2**12, device="cuda")
    for strides in ((2**30, 1), (1, 2**30), (2**30, 7), (5, 2**30)):
        x = memory.as_strided((3, 3), strides).copy_(torch.randn(3, 3, device="cuda"))
        check(x, str(strides))
        check(memory.as_strided((3, 1, 3), (strides[0], 0, strides[1])), str(strides))


def test_tensors_past_2_31() -> None:
    mn, k = 2**25 + 3, 64
    x = torch.rand(mn, k, device="cuda")
    got = get_mn_major_tma_aligned_tensor(x)
    assert got.stride() == (1, mn + 1)
    step = 2**22
    for start in range(0, mn, step):
        assert torch.equal(got[start : start + step], x[start : start + step]), start


def test_the_stream_is_the_current_one() -> None:
    x = torch.zeros(4097, 57, device="cuda")
    get_mn_major_tma_aligned_tensor(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # an earlier copy, or one on another stream, would find zeros
        x.fill_(3)
        got = get_mn_major_tma_aligned_tensor(x)
        assert bool((got == 3).all())


def test_threads() -> None:
    xs = [torch.randn(100 + i, 57, device="cuda") for i in range(8)]
    torch.cuda.synchronize()

    def work(x: torch.Tensor) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(get_mn_major_tma_aligned_tensor(x), x) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, xs))


def test_graph_replays_with_new_contents() -> None:
    x = torch.zeros(4097, 57, device="cuda")
    get_mn_major_tma_aligned_tensor(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = get_mn_major_tma_aligned_tensor(x)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(got, x)


FIRST_CALL_CAPTURED = """
import torch, deep_gemm
x, graph = torch.rand(300, 57, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = deep_gemm.get_mn_major_tma_aligned_tensor(x)
graph.replay()
assert torch.equal(got, x)
print("ran")
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
def test_first_call_inside_a_capture(loading: str, tmp_path: Path) -> None:
    """Compiled, loaded and launched for the first time in a new process while a CUDA graph is captured."""
    captured.check(FIRST_CALL_CAPTURED, loading, tmp_path)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(300, 57, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check(x)
    assert torch.cuda.current_device() == 0


SANITIZED = """
import torch, deep_gemm
for shape in ((1, 1), (300, 57), (4097, 7), (3, 130, 56)):
    x = torch.rand(shape)
    for view in (x.cuda(), x.mT.contiguous().cuda().mT):
        # Not compared: over the copies that this takes initcheck ran for minutes without an end.
        deep_gemm.get_mn_major_tma_aligned_tensor(view)
torch.cuda.synchronize()
print("ran")
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool: str) -> None:
    sanitizer.check(tool, SANITIZED, "to_mn_major")
