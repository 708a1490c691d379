"""The public calls on CPU tensors: forms, strides, names, empty problems, devices that are not Hopper."""

from types import SimpleNamespace

import pytest
import torch

import deep_gemm
from deep_gemm import gemm, reference
from deep_gemm.errors import InvalidInputError, UnsupportedDeviceError
from deep_gemm.runtime import device


def operands(m, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(m, k, generator=generator), use_ue8m0=False)
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(n, k, generator=generator), use_ue8m0=False)
    return a, b, torch.full((m, n), float("nan"), dtype=torch.bfloat16)


def expected(a, b):
    return reference.to_bf16(reference.fp8_gemm_nt(*a, *b))


def equal(x, y):
    return torch.equal(x.view(torch.int16), y.contiguous().view(torch.int16))


@pytest.mark.parametrize("shape", [(1, 8, 16), (7, 24, 128), (65, 136, 272), (128, 256, 512)])
def test_nt(shape):
    a, b, d = operands(*shape)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert equal(d, expected(a, b))
    truth = deep_gemm.per_token_cast_back(*a).double() @ deep_gemm.per_block_cast_back(*b).double().t()
    assert deep_gemm.calc_diff(d, truth) < 1e-4


def test_first_name():
    a, b, d = operands(9, 16, 128)
    deep_gemm.gemm_fp8_fp8_bf16_nt(a, b, d)
    assert equal(d, expected(a, b))


@pytest.mark.parametrize("form", ["nn", "tn", "tt"])
def test_transposed_forms_take_views_of_k_major_memory(form):
    a, b, d = operands(40, 144, 272)
    want = expected(a, b)
    lhs = tuple(x.t() for x in a) if form[0] == "t" else a
    rhs = tuple(x.t() for x in b) if form[1] == "n" else b
    getattr(deep_gemm, f"fp8_gemm_{form}")(lhs, rhs, d)
    assert equal(d, want)


def test_transposed_forms_refuse_other_memory():
    a, b, d = operands(40, 144, 272)
    rhs = b[0].t().contiguous(), b[1].t()
    with pytest.raises(InvalidInputError, match="b has strides \\(1, 144\\), expected inner stride 1"):
        deep_gemm.fp8_gemm_nn(a, rhs, d)
    with pytest.raises(InvalidInputError, match="a is a Tensor, expected a pair"):
        deep_gemm.fp8_gemm_tn(a[0], b, d)


def test_strided_output_leaves_its_neighbours():
    a, b, _ = operands(33, 72, 144)
    memory = torch.full((35, 88), 7.0, dtype=torch.bfloat16)
    d = memory[1:34, 8:80]
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert equal(d.contiguous(), expected(a, b))
    memory[1:34, 8:80] = 7.0
    assert (memory == 7.0).all()


def test_strided_operands():
    a, b, d = operands(33, 72, 144)
    wide = torch.zeros(33, 192, dtype=torch.uint8)
    wide[:, :144] = a[0].view(torch.uint8)
    a_view = wide.view(torch.float8_e4m3fn)[:, :144], a[1].t().contiguous().t()
    b_view = b[0], b[1].t().contiguous().t()
    deep_gemm.fp8_gemm_nt(a_view, b_view, d)
    assert equal(d, expected(a, b))


@pytest.mark.parametrize(("m", "n"), [(0, 64), (16, 0), (0, 0)])
def test_empty_problems_return(m, n):
    a, b, d = operands(max(m, 1), max(n, 8), 128)
    a, b = (a[0][:m], a[1][:m]), (b[0][:n], b[1][: deep_gemm.ceil_div(n, 128)])
    deep_gemm.fp8_gemm_nt(a, b, d[:m, :n])
    deep_gemm.fp8_gemm_nt(a, b, torch.empty(m, n, dtype=torch.bfloat16))


def test_rows_have_the_same_bits_for_every_m():
    a, b, d = operands(64, 72, 512)
    deep_gemm.fp8_gemm_nt(a, b, d)
    for m in (1, 5, 33):
        few = torch.empty(m, 72, dtype=torch.bfloat16)
        reference.run(a[0][:m], a[1][:m], *b, few, exact=True)
        exact = torch.empty(64, 72, dtype=torch.bfloat16)
        reference.run(*a, *b, exact, exact=True)
        assert equal(few, exact[:m])


@pytest.mark.parametrize(("capability", "age"), [((8, 9), "older"), ((10, 0), "newer")])
def test_other_gpus_are_told(capability, age):
    gpu = device.Device("NVIDIA Test", capability, 100, 1 << 17, 2000)
    with pytest.raises(
        UnsupportedDeviceError,
        match=f"NVIDIA Test has compute capability {capability[0]}.{capability[1]}, {age} than Hopper",
    ):
        gpu.require_hopper()
    device.H200.require_hopper()


def test_autograd_sees_nothing():
    a, b, d = operands(9, 16, 128)
    want = expected(a, b)
    a, b, d = (a[0], a[1].requires_grad_()), (b[0], torch.nn.Parameter(b[1])), d.requires_grad_()
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert d.grad_fn is None
    assert equal(d.detach(), want)


def test_the_current_device_is_looked_up_every_time(monkeypatch):
    chips = [SimpleNamespace(name=f"NVIDIA {n}", major=9, minor=0, multi_processor_count=n,
                             shared_memory_per_block_optin=232448) for n in (132, 78)]  # fmt: skip
    now = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chips[index])
    device._describe.cache_clear()
    try:
        assert deep_gemm.get_num_sms() == 132
        now[0] = 1
        assert deep_gemm.get_num_sms() == device.current().num_sms == 78
        assert device.current(0).num_sms == 132
        with pytest.raises(InvalidInputError, match="num_sms is 100, expected 1 to 78, the SMs of NVIDIA 78"):
            deep_gemm.set_num_sms(100)
    finally:
        device._describe.cache_clear()


def test_num_sms_is_set_and_restored():
    everything = deep_gemm.get_num_sms()
    try:
        deep_gemm.set_num_sms(77)
        assert deep_gemm.get_num_sms() == 77
        for wrong in (0, -1, 100_000, 77.5, True, "8"):
            with pytest.raises(InvalidInputError, match=f"num_sms is {wrong}, expected 1 to {everything}"):
                deep_gemm.set_num_sms(wrong)
        assert deep_gemm.get_num_sms() == 77
    finally:
        deep_gemm.set_num_sms(None)
    assert deep_gemm.get_num_sms() == everything


@pytest.mark.parametrize("value", ["0", "1"])
def test_plans_are_printed_once_where_asked_for(value, monkeypatch, capsys):
    monkeypatch.setenv("DG_PRINT_CONFIGS", value)
    monkeypatch.setattr(device, "current", lambda index: device.H200)
    gemm._plan.cache_clear()
    plans = [gemm._plan(4096, 24576, 1536, 0, None) for _ in range(2)]
    assert plans[0] is plans[1]
    line = f"deep_gemm: Problem(m=4096, n=24576, k=1536): {plans[0]}\n"
    assert capsys.readouterr().err == (line if value == "1" else "")
    gemm._plan.cache_clear()
