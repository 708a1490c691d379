"""bench and bench_kineto: what they call, what they add up, and, on a GPU, that the times are true."""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deep_gemm
from deep_gemm.errors import InvalidInputError, UnsupportedDeviceError
from deep_gemm.testing import bench, bench_kineto

module = importlib.import_module("deep_gemm.testing.bench")  # the attribute of that name is the function

KERNELS = [("fp8_gemm", 30), ("fp8_gemm", 50), ("reduce_a", 8), ("reduce_b", 4)]


class Profiler:
    """A GPU that runs KERNELS, whatever is called; the CPU's events have the same names."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __enter__(self) -> Profiler:
        self.log.append("start")
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.append("stop")

    def step(self) -> None:
        self.log.append("step")

    def export_chrome_trace(self, path: str) -> None:
        self.log.append(f"trace {path}")

    def events(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                name=name,
                device_type=SimpleNamespace(name=device),
                time_range=SimpleNamespace(elapsed_us=lambda us=us: us),
            )
            for device in ("CUDA", "CPU")
            for name, us in KERNELS
        ]


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> Profiler:
    result = Profiler()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: result.log.append("wait"))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: result)
    monkeypatch.setattr(module, "_empty_l2", lambda: result.log.append("flush"))
    monkeypatch.delenv("DG_USE_NVIDIA_TOOLS", raising=False)
    return result


def test_bench_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls: list[int] = []

    def fn() -> None:
        calls.append(1)
        time.sleep(0.5 if len(calls) <= 2 else 0.01)

    assert 0.01 <= bench(fn, num_warmups=2, num_tests=3) < 0.3
    assert len(calls) == 5
    assert bench(lambda: calls.append(1), high_precision=True) < 0.3
    assert len(calls) == 20


def test_kineto_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedDeviceError) as error:
        bench_kineto(lambda: None, "fp8_gemm")
    assert str(error.value) == (
        "bench_kineto measures kernels, and PyTorch sees no CUDA device: call bench, which measures the CPU too"
    )


@pytest.mark.parametrize("name", ["fp8_gemm", "gemm_"])
def test_kineto_adds_up_a_kernel(name: str, profiler: Profiler):
    seconds = bench_kineto(lambda: None, name, num_tests=2)
    assert isinstance(seconds, float) and seconds == pytest.approx(40e-6)


def test_kineto_takes_several_names(profiler: Profiler):
    assert bench_kineto(lambda: None, ("reduce_b", "fp8_gemm"), num_tests=2) == pytest.approx((2e-6, 40e-6))
    assert bench_kineto(lambda: None, ("absent",)) == (0.0,)


def test_kineto_with_several_kernels_of_a_name(profiler: Profiler):
    with pytest.raises(InvalidInputError) as error:
        bench_kineto(lambda: None, "reduce")
    assert str(error.value) == (
        "'reduce' is in the names of 2 kernels (reduce_a, reduce_b), expected one: pass more of the name, or "
        "with_multiple_kernels=True"
    )
    assert bench_kineto(lambda: None, "reduce", num_tests=2, with_multiple_kernels=True) == pytest.approx(6e-6)


@pytest.mark.parametrize("flush", [[], ["flush"]])
@pytest.mark.parametrize("barrier", [[], ["barrier"]])
@pytest.mark.parametrize("trace", [None, "t.json"])
def test_what_kineto_calls(flush: list[str], barrier: list[str], trace: str | None, profiler: Profiler):
    log = profiler.log
    bench_kineto(
        lambda: log.append("fn"),
        "fp8_gemm",
        num_tests=3,
        trace_path=trace,
        flush_l2=bool(flush),
        barrier=(lambda: log.append("barrier")) if barrier else None,
    )
    round_ = [*flush, *barrier, "fn"] * 3 + ["wait", "step"]
    assert log == ["fn", "start", *round_, *round_, "stop", *([f"trace {trace}"] if trace else [])]


@pytest.mark.parametrize(("value", "want"), [("0", (0.0,)), ("1", (1.0,))])
def test_kineto_leaves_the_gpu_to_other_tools(
    value: str, want: tuple[float], profiler: Profiler, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DG_USE_NVIDIA_TOOLS", value)
    calls: list[int] = []
    assert bench_kineto(lambda: calls.append(1), ("absent",)) == want
    assert (len(calls) == 1) == (value == "1") == (profiler.log == [])


@pytest.mark.parametrize("suppress", [False, True])
def test_kineto_can_be_silent(suppress: bool, profiler: Profiler, capfd: pytest.CaptureFixture[str]):
    def fn() -> None:
        if profiler.log:
            os.write(1, b"out ")
            os.write(2, b"error ")

    bench_kineto(fn, "fp8_gemm", num_tests=1, suppress_kineto_output=suppress)
    os.write(1, b"after")
    out, error = capfd.readouterr()
    assert (out, error) == (("after", "") if suppress else ("out out after", "error error "))


def test_kineto_speaks_again_after_an_error(profiler: Profiler, capfd: pytest.CaptureFixture[str]):
    def fn() -> None:
        if profiler.log:
            raise KeyError("fn")

    with pytest.raises(KeyError, match="fn"):
        bench_kineto(fn, "fp8_gemm", suppress_kineto_output=True)
    print("heard")
    assert capfd.readouterr().out == "heard\n"


@pytest.mark.gpu
@pytest.mark.parametrize("high_precision", [False, True])
def test_bench_on_the_gpu(high_precision: bool):
    x = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
    assert 50e-6 < bench(lambda: x.add_(1), high_precision=high_precision) < 2e-3  # 512 MiB at 0.25 to 10 TB/s


@pytest.mark.gpu
@pytest.mark.parametrize("flush_l2", [False, True])
def test_kineto_on_the_gpu(flush_l2: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(4096, 7168, device="cuda"))
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(4096, 7168, device="cuda"))
    d = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
    trace = tmp_path / "trace.json"
    seconds, again, absent = bench_kineto(
        lambda: deep_gemm.fp8_gemm_nt(a, b, d),
        ("fp8_gemm", "gemm_", "absent"),
        suppress_kineto_output=True,
        trace_path=str(trace),
        flush_l2=flush_l2,
    )
    assert 2 * 4096 * 4096 * 7168 / 2e15 < seconds < 2e-3
    assert (again, absent) == (seconds, 0.0)
    assert json.loads(trace.read_text())["traceEvents"]
    assert capfd.readouterr() == ("", "")
