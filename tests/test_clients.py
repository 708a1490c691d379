"""The calls of vLLM and SGLang (clients.py), on CPU tensors and on a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import clients
import pytest

import deep_gemm


@pytest.fixture(autouse=True)
def all_sms_again() -> Iterator[None]:
    """SGLang sets back what it was told, a number."""
    yield
    deep_gemm.set_num_sms(None)


def run(name: str, device: str) -> None:
    try:
        clients.paths(device)[name]()
    except clients.Skipped as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("name", clients.paths("cpu"))
def test_on_the_cpu(name: str):
    run(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", clients.paths("cuda"))
def test_on_the_gpu(name: str):
    run(name, "cuda")


def test_a_wrong_bit_is_seen():
    for kind in ("dense", "contiguous", "masked"):
        o = clients.Operands(kind, "cpu")
        for call in clients.sglang_calls(o):
            call()
        o.check()
        o.out.view(-1)[5] = 7.0
        with pytest.raises(AssertionError, match=r"^1 of \d+ values differ$"):
            o.check()


def test_the_cache_is_named_before_the_import():
    script = "import os, sys, clients; before = 'deep_gemm' in sys.modules; clients.vllm()\n"
    script += "print(before, 'deep_gemm' in sys.modules, os.environ['DG_JIT_CACHE_DIR'].endswith('deep_gemm'))"
    folder = Path(clients.__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "DG_JIT_CACHE_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent)])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_script(fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def third() -> None:
        raise clients.Skipped("no compiler")

    ways = {"first": lambda: None, "second": lambda: clients.check(not fails, "7 differ") or "fast", "third": third}
    monkeypatch.setattr(clients, "paths", lambda device: ways if device == "cpu" else {})
    monkeypatch.setattr(sys, "argv", ["clients.py", "--device", "cpu"])
    assert clients.main() == int(fails)
    second = "FAILED: AssertionError: 7 differ" if fails else "OK (fast)"
    assert capsys.readouterr().out == f"first: OK\nsecond: {second}\nthird: skipped: no compiler\n"
