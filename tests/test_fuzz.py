"""The fuzzer: a slice of its cases, and that it catches what is broken, by a command that repeats it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch

import deep_gemm
from deep_gemm import gemm, heuristics, reference
from deep_gemm.problem import Kind
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.testing import fuzz

FAULTS = [
    ("fp8_gemm_nt", "bit"),
    ("fp8_gemm_nt", "around"),
    ("fp8_gemm_nt", "raises"),
    ("m_grouped_fp8_gemm_nt_contiguous", "bit"),
    ("m_grouped_fp8_gemm_nt_masked", "bit"),
    ("k_grouped_fp8_gemm_nt_contiguous", "bit"),
]


def test_a_slice_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "1", "--cases", "50", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "50 cases, 0 failures"


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_what_to_do_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz.main(["--cases", "1"])
    assert "PyTorch sees no CUDA device: pass --device cpu" in capsys.readouterr().err


def test_minutes_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seed", "2", "--minutes", "0.01", "--device", "cpu"]) == 0
    cases = re.fullmatch(r"(\d+) cases, 0 failures", capsys.readouterr().out.splitlines()[-1])
    assert cases and int(cases[1]) > 0


def test_all_kinds_occur() -> None:
    cases = [fuzz.make_case(3, number, "cpu") for number in range(150)]
    assert Counter(case.problem.kind for case in cases).keys() == set(Kind)
    assert {case.problem.column_scales for case in cases if case.problem.kind == Kind.DENSE} == {True, False}
    assert {case.set_up.pdl for case in cases} == {True, False}


def bytes_of(x: torch.Tensor) -> bytes:
    return x.double().numpy().tobytes()


def test_a_case_follows_from_its_seed_and_number() -> None:
    for number in range(40):
        first, again = (fuzz.make_case(4, number, "cpu") for _ in range(2))
        assert fuzz.describe(first) == fuzz.describe(again)
        for x, y in zip(first.operands, again.operands, strict=True):
            if isinstance(x, torch.Tensor):
                assert bytes_of(x) == bytes_of(y)
    descriptions = {fuzz.describe(fuzz.make_case(seed, 0, "cpu")) for seed in range(20)}
    assert len(descriptions) == 20


def test_settings_are_restored() -> None:
    before = deep_gemm.config.current(), deep_gemm.get_mk_alignment_for_contiguous_layout()
    for number in range(20):
        assert fuzz.run_case(5, number, "cpu")
    assert (deep_gemm.config.current(), deep_gemm.get_mk_alignment_for_contiguous_layout()) == before


def test_samples_of_large_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case taken for a large one; exact, for fewer rows may get another order of summation from torch."""
    multiply = partial(reference.multiply, exact=True)
    monkeypatch.setattr(gemm, "reference", type("", (), {"multiply": staticmethod(multiply)}))
    monkeypatch.setattr(
        fuzz, "reference", type("", (), {"multiply": staticmethod(lambda p, o, exact, split: multiply(p, o))})
    )
    monkeypatch.setattr(fuzz, "WHOLE", 0)
    numbers = [n for n in range(80) if cost(fuzz.make_case(6, n, "cpu")) < 2e6]
    assert len(numbers) > 15
    assert all(fuzz.run_case(6, number, "cpu") for number in numbers)


def cost(case: fuzz.Case) -> int:
    p = case.problem
    return p.m * p.n * p.k * (p.groups if p.kind == Kind.MASKED else 1)


@pytest.mark.parametrize(("function", "fault"), FAULTS)
def test_what_is_broken_is_caught_and_repeated(
    function: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of the result, or an element before it, or an exception; now and then."""
    works = getattr(gemm, function)

    def broken(a, b, d, *args, **keywords):
        works(a, b, d, *args, **keywords)
        if d.shape[-1] % 16:
            return
        if fault == "raises":
            raise RuntimeError("broken")
        if fault == "bit":
            element = d[(-1,) * d.dim()]
            element.copy_(-element if element != 0 and not element.isnan() else torch.ones_like(element))
        else:
            d.as_strided((1,), (1,), d.storage_offset() - 1).fill_(7)

    monkeypatch.setattr(gemm, function, broken)
    assert fuzz.main(["--seed", "7", "--cases", "25", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    command = re.search(r"repeat with: python -m deep_gemm.testing.fuzz (.+)", said)
    assert command and re.search(r"\d+ cases, \d+ failures$", said)
    expected = {"bit": "differ; d[", "around": "elements around d were written", "raises": "RuntimeError: broken"}
    assert expected[fault] in said

    first = re.search(r"FAILED case .*\n", said)
    assert fuzz.main(shlex.split(command[1])) == 1
    again = capsys.readouterr().out
    assert first and first[0] in again and again.splitlines()[-1] == "1 cases, 1 failures"
    monkeypatch.setattr(gemm, function, works)
    assert fuzz.main(shlex.split(command[1])) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_a_slice_on_the_gpu(
    seed: int,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    compile_many([kernel.source() for columns in (False, True) for kernel in heuristics.kernels(columns)])
    minutes = request.config.getoption("--fuzz-minutes")
    outcome = fuzz.main(["--seed", str(seed), *(("--minutes", str(minutes)) if minutes else ("--cases", "40"))])
    said = capsys.readouterr().out
    assert outcome == 0, said
    cases = re.fullmatch(r"(\d+) cases, 0 failures", said.splitlines()[-1])
    assert cases and (minutes or cases[1] == "40")
    record_property("cases", int(cases[1]))
