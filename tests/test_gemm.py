"""The public calls on CPU tensors: forms, groups, strides, names, empty problems, devices that are not Hopper."""

from types import SimpleNamespace

import pytest
import torch

import deep_gemm
from deep_gemm import gemm, heuristics, reference
from deep_gemm.config import Config
from deep_gemm.errors import InvalidInputError, UnsupportedDeviceError
from deep_gemm.problem import Problem
from deep_gemm.runtime import device

FILL = float("nan")  # of what must not be written; no result of these operands is a NaN


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


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("clear", [False, True])
def test_without_groups_all_rows_are_padding(clear, ends):
    a, _, d = operands(5, 16, 128)
    b = torch.empty(0, 16, 128).to(torch.float8_e4m3fn), torch.empty(0, 1, 1)
    layout = torch.full((0 if ends else 5,), -1, dtype=torch.int32)
    d.fill_(7)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, use_psum_layout=ends, ensure_zero_padding=clear)
    assert (d == (0 if clear else 7)).all()


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
    said = "b has strides \\(1, 144\\), expected inner stride 1.*\\(here the last two dimensions of b are swapped\\)"
    with pytest.raises(InvalidInputError, match=said):
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


@pytest.mark.parametrize("value", ["0", "1"])
def test_plans_are_printed_once_where_asked_for(value, monkeypatch, capsys):
    monkeypatch.setenv("DG_PRINT_CONFIGS", value)
    monkeypatch.setattr(device, "current", lambda index: device.H200)
    gemm._plan.cache_clear()
    problem = Problem(4096, 24576, 1536)
    plans = [gemm._plan(problem, 0, Config()) for _ in range(2)]
    assert plans[0] is plans[1]
    assert str(plans[0]) == str(heuristics.choose(problem, device.H200))
    line = f"deep_gemm: {problem}: {plans[0]}\n"
    assert capsys.readouterr().err == (line if value == "1" else "")
    gemm._plan.cache_clear()


# Scales per 1x128 of b as well, FP32 results


def column_operands(m, n, k, seed=0):
    a, _, _ = operands(m, n, k, seed)
    b, _, _ = operands(n, m, k, seed + 1)
    return a, b, torch.full((m, n), FILL)


def column_expected(a, b, c=None):
    total = reference.fp8_gemm_nt_per_column_scales(*a, *b)
    return total if c is None else c + total


def same(x, y):
    """Equal bits of FP32 tensors."""
    return torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


@pytest.mark.parametrize("options", [{"recipe": (1, 1, 128)}, {"recipe_a": (1, 128), "recipe_b": (1, 128)}], ids=str)
@pytest.mark.parametrize("form", ["nt", "nn", "tn", "tt"])
def test_column_scales(form, options):
    a, b, d = column_operands(40, 72, 272)
    want = column_expected(a, b)
    lhs = tuple(x.t() for x in a) if form[0] == "t" else a
    rhs = tuple(x.t() for x in b) if form[1] == "n" else b
    getattr(deep_gemm, f"fp8_gemm_{form}")(lhs, rhs, d, **options)
    assert same(d, want)


def test_column_scales_added_to_c():
    a, b, d = column_operands(40, 72, 272)
    start = torch.randn(40, 72)
    want = column_expected(a, b, start)
    for c in (start, start.t().contiguous().t(), start.repeat(1, 2)[:, :72]):
        d.fill_(FILL)
        deep_gemm.fp8_gemm_nt(a, b, d, c, recipe=(1, 1, 128))
        assert same(d, want), c.stride()
    deep_gemm.fp8_gemm_nt(a, b, start, start, recipe=(1, 1, 128))
    assert same(start, want)


# Groups along M


N, K, GROUPS = 136, 272, 3


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return deep_gemm.per_block_cast_to_fp8(torch.randn(GROUPS, N, K, generator=generator))


def tokens(m, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return deep_gemm.per_token_cast_to_fp8(torch.randn(m, K, generator=generator))


def spoilt(a, rows):
    """NaN in values and scales of some rows."""
    values, scales = (x.clone() for x in a)
    values.view(torch.uint8)[rows] = 0x7F
    scales[rows] = float("nan")
    return values, scales


def group_by_group(a, b, groups):
    """A plain loop: the rows of every group, zeros where groups has None, FILL where it has `-`."""
    d = torch.full((len(groups), N), FILL, dtype=torch.bfloat16)
    for group in range(GROUPS):
        rows = [row for row, owner in enumerate(groups) if owner == group]
        picked = a[0].view(torch.uint8)[rows].view(a[0].dtype), a[1][rows]
        d[rows] = reference.to_bf16(reference.fp8_gemm_nt(*picked, b[0][group], b[1][group]))
    d[[row for row, owner in enumerate(groups) if owner is None]] = 0
    return d


# Indices of rows, and the group of each: of 128 rows a group, the last ones padding; M is no multiple of 128.
CONTIGUOUS = {
    "whole groups": [0] * 128 + [1] * 128 + [2] * 128,
    "padding": [0] * 100 + [-1] * 28 + [1] * 1 + [-1] * 127 + [2] * 65,
    "a group without rows": [0] * 128 + [2] * 128 + [-1] * 128,
    "trailing padding": [1] * 64 + [-1] * 600,
    "out of range": [0] * 127 + [GROUPS] + [1] * 126 + [2**31 - 1, -(2**31)] + [2] * 5,
    "padding first": [-1] * 128 + [2] * 128 + [1] * 7,
    "two blocks of a group": [1] * 200 + [-1] * 56 + [0] * 3,
    "none": [-1] * 130,
}


@pytest.mark.parametrize("form", ["nt", "nn"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "untouched"])
@pytest.mark.parametrize("case", CONTIGUOUS)
def test_contiguous(case, zeros, form):
    indices = CONTIGUOUS[case]
    groups = [index if 0 <= index < GROUPS else None if zeros else "-" for index in indices]
    dead = [row for row, group in enumerate(groups) if group in (None, "-")]
    a, b = tokens(len(indices)), weights()
    rhs = tuple(x.mT for x in b) if form == "nn" else b
    layout = torch.tensor(indices, dtype=torch.int32)
    d = torch.full((len(indices), N), FILL, dtype=torch.bfloat16)
    getattr(deep_gemm, f"m_grouped_fp8_gemm_{form}_contiguous")(
        spoilt(a, dead), rhs, d, layout, ensure_zero_padding=zeros
    )
    assert equal(d, group_by_group(a, b, groups))


# Running ends, and the group of each row; `-` is behind the last group, where nothing is written.
ENDS = {
    "whole groups": ([128, 256, 384], [0] * 128 + [1] * 128 + [2] * 128),
    "gaps": ([100, 129, 300], [0] * 100 + [None] * 28 + [1] + [None] * 127 + [2] * 44 + [None] * 84),
    "groups without rows": ([0, 70, 70], [1] * 70 + [None] * 58),
    "the last without rows": ([70, 128, 128], [0] * 70 + [None] * 58),
    "rows behind": ([5, 134, 256], [0] * 5 + [None] * 123 + [1] * 6 + [None] * 122 + ["-"] * 40),
    "M within the padding": ([5, 134, 263], [0] * 5 + [None] * 123 + [1] * 6 + [None] * 122 + [2] * 7 + [None] * 2),
    "past M": ([100, 2**31 - 1, 2**31 - 1], [0] * 100 + [None] * 28 + [1] * 72),
    "negative": ([-5, -(2**31), 60], [2] * 60 + [None] * 68 + ["-"]),
}  # fmt: skip


@pytest.mark.parametrize("form", ["nt", "nn"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "untouched"])
@pytest.mark.parametrize("case", ENDS)
def test_running_ends(case, zeros, form):
    ends, groups = ENDS[case]
    groups = ["-" if group is None and not zeros else group for group in groups]
    dead = [row for row, group in enumerate(groups) if group in (None, "-")]
    a, b = tokens(len(groups)), weights()
    rhs = tuple(x.mT for x in b) if form == "nn" else b
    d = torch.full((len(groups), N), FILL, dtype=torch.bfloat16)
    getattr(deep_gemm, f"m_grouped_fp8_gemm_{form}_contiguous")(
        spoilt(a, dead), rhs, d, torch.tensor(ends, dtype=torch.int32), use_psum_layout=True, ensure_zero_padding=zeros
    )
    assert equal(d, group_by_group(a, b, groups))


@pytest.mark.parametrize("alignment", [64, 192])
def test_running_ends_follow_the_alignment(alignment):
    groups = [0] * 10 + [None] * (alignment - 10) + [1] * alignment + [2] * 3 + [None] * (alignment - 3) + ["-"] * 9
    ends = torch.tensor([10, 2 * alignment, 2 * alignment + 3], dtype=torch.int32)
    a, b = tokens(len(groups)), weights()
    d = torch.full((len(groups), N), FILL, dtype=torch.bfloat16)
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    try:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            a, b, d, ends, use_psum_layout=True, expected_m_for_psum_layout=alignment
        )
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    assert equal(d, group_by_group(a, b, groups))


@pytest.mark.parametrize("max_m", [1, 8, 100, 128])
@pytest.mark.parametrize("expected_m", [0, 1, 10**6])
def test_masked(max_m, expected_m):
    b = weights()
    for counts in ([0, 0, 0], [1, 0, max_m], [-1, max_m // 2, max_m + 1], [2**31 - 1, -(2**31), max_m - 1]):
        real = [min(max(count, 0), max_m) for count in counts]
        a = tuple(torch.stack(x) for x in zip(*(tokens(max_m, seed) for seed in range(GROUPS)), strict=True))
        d = torch.full((GROUPS, max_m, N), FILL, dtype=torch.bfloat16)
        want = d.clone()
        for group, count in enumerate(real):
            x = (v[group, :count] for v in a)
            want[group, :count] = reference.to_bf16(reference.fp8_gemm_nt(*x, b[0][group], b[1][group]))
        dead = torch.tensor([[row >= count for row in range(max_m)] for count in real])
        masked_m = torch.tensor(counts, dtype=torch.int32)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(spoilt(a, dead), b, d, masked_m, expected_m)
        assert equal(d, want), counts


def test_groups_in_any_strides():
    """Scales of b transposed, those of a token by token over all groups, d in wider rows."""
    b, counts = weights(), [3, 16, 0]
    a = tuple(torch.stack(x) for x in zip(*(tokens(16, seed) for seed in range(GROUPS)), strict=True))
    want = torch.full((GROUPS, 16, N), FILL, dtype=torch.bfloat16)
    masked_m = torch.tensor(counts, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, want, masked_m, 8)
    memory = torch.full((GROUPS, 18, N + 16), 7.0, dtype=torch.bfloat16)
    d = memory[:, 1:17, 8 : N + 8]
    d.fill_(FILL)
    a_scales = torch.empty_strided(a[1].shape, (16 * 3, 1, 16)).copy_(a[1])
    deep_gemm.m_grouped_fp8_gemm_nt_masked((a[0], a_scales), (b[0], b[1].mT.contiguous().mT), d, masked_m, 8)
    assert equal(d, want)
    d.fill_(7.0)
    assert (memory == 7.0).all()


# Groups along K


def k_grouped(ks, m=24, n=40, alignment=128, seed=2):
    """Every group's (a, b); and a and b of them all, as the call takes them, padding NaN."""
    generator = torch.Generator().manual_seed(seed)
    groups, packed = [], []
    for rows in (m, n):
        values = [torch.randint(0, 126, (rows, k), generator=generator, dtype=torch.uint8) for k in ks]
        scales = [torch.rand(rows, -(-k // 128), generator=generator) for k in ks]
        groups.append([(v.view(torch.float8_e4m3fn), s) for v, s in zip(values, scales, strict=True)])
        all_values, all_scales = [], []
        for v, s in zip(values, scales, strict=True):
            width = -(-v.shape[1] // 128) * 128
            room = -(-v.shape[1] // alignment) * alignment
            wide = torch.full((rows, width), 0x7F, dtype=torch.uint8)
            wide[:, : v.shape[1]] = v
            all_values += [wide.flatten(), torch.full((rows * (room - width),), 0x7F, dtype=torch.uint8)]
            all_scales += [s, torch.full((rows, (room - width) // 128), FILL)]
        packed.append((torch.cat(all_values).view(torch.float8_e4m3fn), torch.cat(all_scales, 1)))
    return list(zip(*groups, strict=True)), *packed


def k_grouped_expected(groups, c=None):
    products = torch.stack([reference.fp8_gemm_nt_per_column_scales(*a, *b) for a, b in groups])
    return products if c is None else c + products


KS = [[128, 256, 384], [0, 256, 0, 128], [128], [0, 0]]


@pytest.mark.parametrize("ks", KS, ids=str)
@pytest.mark.parametrize("given", ["both", "ks_cpu", "grouped_layout"])
def test_k_grouped(given, ks):
    groups, a, b = k_grouped(ks)
    d = torch.full((len(ks), 24, 40), FILL)
    on_cpu, on_device = ks, torch.tensor(ks, dtype=torch.int32)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
        a, b, d, None if given == "grouped_layout" else on_cpu, None if given == "ks_cpu" else on_device
    )
    assert same(d, k_grouped_expected(groups))


@pytest.mark.parametrize("ks", KS, ids=str)
def test_k_grouped_added_to_c(ks):
    groups, a, b = k_grouped(ks)
    layout, c = torch.tensor(ks, dtype=torch.int32), torch.randn(len(ks), 24, 40)
    want = k_grouped_expected(groups, c)
    for addend in (c, c.mT.contiguous().mT, c.repeat(1, 1, 2)[:, :, 40:]):
        d = torch.full_like(c, FILL)
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, layout, addend)
        assert same(d, want), addend.stride()
        assert same(addend, c)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, c, ks, layout, c)
    assert same(c, want)


def test_k_grouped_by_the_device_s_ks():
    """grouped_layout is what counts; negatives in it, parts of blocks and what is past the end fall away."""
    groups, a, b = k_grouped([128, 256, 384])
    nothing = (groups[0][0][0][:, :0], groups[0][0][1][:, :0]), (groups[0][1][0][:, :0], groups[0][1][1][:, :0])
    for layout, want in (
        ([128, 256, 384], groups),
        ([128, 256, 2**31 - 1], groups),
        ([128 + 127, 256, 384], groups),
        ([128, -256, 0], [groups[0], nothing, nothing]),
    ):
        d = torch.full((3, 24, 40), FILL)
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, None, torch.tensor(layout, dtype=torch.int32))
        assert same(d, k_grouped_expected(want)), layout


@pytest.mark.parametrize("alignment", [128, 256])
@pytest.mark.parametrize("counts", [[128, 256, 384], [100, 0, 130, 256], [0, 16]], ids=str)
def test_k_grouped_by_running_ends(counts, alignment):
    """A group's last block may be a part of one; what fills it up is not read for meaning."""
    groups, a, b = k_grouped(counts, alignment=alignment)
    ends, start = [], 0
    for count in counts:
        ends.append(start + count)
        start = -(-ends[-1] // alignment) * alignment
    c = torch.randn(len(counts), 24, 40)
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    try:
        for addend in (None, c):
            d = torch.full_like(c, FILL)
            layout = torch.tensor(ends, dtype=torch.int32)
            deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, None, layout, addend, use_psum_layout=True)
            assert same(d, k_grouped_expected(groups, addend))
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)


# Empty problems of every kind


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(("m", "groups", "n"), [(0, 3, 64), (16, 3, 0), (0, 3, 0), (16, 0, 64)])
def test_empty_contiguous(m, groups, n, ends):
    a = torch.zeros(m, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(m, 1)
    b = torch.zeros(groups, n, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(groups, -(-n // 128), 1)
    d = torch.full((m, n), FILL, dtype=torch.bfloat16)
    layout = torch.zeros(groups if ends else m, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, use_psum_layout=ends, ensure_zero_padding=False)
    assert d.isnan().all()


@pytest.mark.parametrize(("groups", "m", "n"), [(0, 16, 64), (3, 0, 64), (3, 16, 0), (0, 0, 0)])
def test_empty_masked(groups, m, n):
    a = torch.zeros(groups, m, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(groups, m, 1)
    b = torch.zeros(groups, n, 128, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(groups, -(-n // 128), 1)
    d = torch.empty(groups, m, n, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, torch.zeros(groups, dtype=torch.int32), 0)


@pytest.mark.parametrize(("groups", "m", "n"), [(0, 16, 64), (2, 0, 64), (2, 16, 0), (0, 0, 0)])
def test_empty_k_grouped(groups, m, n):
    ks = [128] * groups
    a = torch.zeros(sum(ks) * m, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(m, groups)
    b = torch.zeros(sum(ks) * n, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(n, groups)
    d = torch.empty(groups, m, n)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, torch.tensor(ks, dtype=torch.int32))
