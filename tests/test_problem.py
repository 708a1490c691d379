"""Every input that is rejected, by the text of its error; after each rejection the next good call works."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import deep_gemm
from deep_gemm import problem
from deep_gemm.errors import InvalidInputError

M, N, K = 24, 136, 272
E4M3 = torch.float8_e4m3fn
COPY = "pass a copy, x.clone(memory_format=torch.contiguous_format), or of x.t() in the transposed forms"
FRESH = "allocate it with torch.empty((24, 136), dtype=torch.bfloat16)"


def good(m=M, n=N, k=K, device="cpu"):
    blocks = deep_gemm.ceil_div(k, 128)
    a = torch.ones(m, k, device=device).to(E4M3), torch.ones(m, blocks, device=device)
    b = torch.ones(n, k, device=device).to(E4M3), torch.ones(deep_gemm.ceil_div(n, 128), blocks, device=device)
    return a, b, torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=device)


def misaligned(x):
    """The same values, starting one element behind a 16-byte boundary."""
    memory = torch.zeros(x.numel() + 1, dtype=torch.uint8 if x.dtype == E4M3 else x.dtype)
    return memory[1:].view(x.dtype).view(x.shape)


def wide(x, extra):
    """The same values in rows that are `extra` elements longer."""
    rows = torch.zeros(x.shape[0], x.shape[1] + extra, dtype=torch.uint8 if x.dtype == E4M3 else x.dtype)
    return rows.view(x.dtype)[:, : x.shape[1]]


def bad_cases():
    a, b, d = good()
    (av, asc), (bv, bsc) = a, b
    cases = {
        "a is a Tensor, expected a pair (values, scales): call per_token_cast_to_fp8(a)": (av, b, d),
        "b is a tuple of 3, expected a pair (values, scales): call per_block_cast_to_fp8(b)": (a, (bv, bsc, bsc), d),
        "a values is a list, expected a torch.Tensor of torch.float8_e4m3fn: call per_token_cast_to_fp8(a)": (([1.0], asc), b, d),
        "a values has dtype torch.float32, expected torch.float8_e4m3fn: call per_token_cast_to_fp8(a)": ((av.float(), asc), b, d),
        "b values has dtype torch.float8_e5m2, expected torch.float8_e4m3fn: call per_block_cast_to_fp8(b)": (
            a, (bv.float().to(torch.float8_e5m2), bsc), d),
        "a scales has dtype torch.int32, expected torch.float32: packed UE8M0 scales are for Blackwell": ((av, asc.int()), b, d),
        "b scales has dtype torch.float64, expected torch.float32: call per_block_cast_to_fp8(b)": (a, (bv, bsc.double()), d),
        "d has dtype torch.float32, expected torch.bfloat16: allocate it with torch.empty((24, 136), dtype=torch.bfloat16)": (a, b, d.float()),
        "a values has 3 dimensions, expected 2 for a dense GEMM: flatten the leading ones with .view()": ((av[None], asc), b, d),
        "d has 1 dimensions, expected 2 for a dense GEMM: flatten the leading ones with .view()": (a, b, d[0]),
        "b has shape (136, 256), expected (N, 272) for a of shape (24, 272): K must agree, and both are K-major": (a, (bv[:, :256], bsc), d),
        "d has shape (136, 24), expected (24, 136), M of a and N of b: allocate it with torch.empty((24, 136), dtype=torch.bfloat16)": (a, b, d.t().contiguous()),
        "N is 132, expected a multiple of 8: pad b, its scales and d, and slice the result": (a, (bv[:132], bsc), d[:, :132]),
        "K is 264, expected a positive multiple of 16: pad a and b with zeros": ((av[:, :264], asc), (bv[:, :264], bsc), d),
        "K is 0, expected a positive multiple of 16: pad a and b with zeros": ((av[:, :0], asc), (bv[:, :0], bsc), d),
        "a scales have shape (24, 2), expected (24, 3) for a of shape (24, 272): call per_token_cast_to_fp8(a)": ((av, asc[:, :2]), b, d),
        "b scales have shape (136, 3), expected (2, 3) for b of shape (136, 272): call per_block_cast_to_fp8(b)": (
            a, (bv, torch.ones(136, 3)), d),
        "a has strides (1, 24), expected inner stride 1 (Hopper's FP8 tensor cores read K-major operands only): " + COPY: (
            (av.t().contiguous().t(), asc), b, d),
        "b has row stride 280, expected a multiple of 16 elements (16 bytes), at least 272: " + COPY: (a, (wide(bv, 8), bsc), d),
        "a has row stride 0, expected a multiple of 16 elements (16 bytes), at least 272: " + COPY: (
            (av[:1].expand(24, K), asc), b, d),
        "d has row stride 140, expected a multiple of 8 elements (16 bytes), at least 136: " + FRESH: (a, b, wide(d, 4)),
        "d starts at an address that is 2 bytes past a multiple of 16, expected 16-byte alignment: " + FRESH: (a, b, misaligned(d)),
        "a starts at an address that is 1 bytes past a multiple of 16, expected 16-byte alignment: " + COPY: ((misaligned(av), asc), b, d),
        "the operands are on cpu, meta, expected one device: move them with .to()": (a, b, d.to("meta")),
        "the operands are on meta, expected a CUDA or the CPU device: move them with .to()": good(device="meta"),
    }  # fmt: skip
    return [pytest.param(*operands, message, id=message[:40]) for message, operands in cases.items()]


@pytest.mark.parametrize(("a", "b", "d", "message"), bad_cases())
def test_rejected(a, b, d, message):
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.fp8_gemm_nt(a, b, d)
    assert str(error.value) == message
    a, b, d = good()
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert (d == K).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"c": torch.zeros(M, N)},
            InvalidInputError,
            "c was given, expected None: with block scales nothing is accumulated into d; add c afterwards",
        ),
        (
            {"recipe": (1, 1, 128), "recipe_b": (128, 128)},
            InvalidInputError,
            "recipe_b is (128, 128), expected (1, 128) or None: quantise a per 1x128 and b per 1x128",
        ),
        (
            {"recipe": (1, 128, 128), "recipe_b": (1, 128)},
            InvalidInputError,
            "recipe_b is (1, 128), expected (128, 128) or None: quantise a per 1x128 and b per 128x128",
        ),
        (
            {"recipe": (1, 64, 128)},
            InvalidInputError,
            "recipe is (1, 64, 128), expected (1, 128, 128) or None: quantise a per 1x128 and b per 128x128",
        ),
        (
            {"recipe_a": (128, 128)},
            InvalidInputError,
            "recipe_a is (128, 128), expected (1, 128) or None: quantise a per 1x128 and b per 128x128",
        ),
        (
            {"recipe_b": (64, 128)},
            InvalidInputError,
            "recipe_b is (64, 128), expected (128, 128) or None: quantise a per 1x128 and b per 128x128",
        ),
        (
            {"recipe": 128},
            InvalidInputError,
            "recipe is 128, expected (1, 128, 128) or None: quantise a per 1x128 and b per 128x128",
        ),
        (
            {"compiled_dims": None},
            InvalidInputError,
            "compiled_dims is None, expected letters out of 'mnk': it is a hint, and one kernel serves every shape",
        ),
        (
            {"compiled_dims": "xy"},
            InvalidInputError,
            "compiled_dims is 'xy', expected letters out of 'mnk': it is a hint, and one kernel serves every shape",
        ),
    ],
)
def test_options_rejected(options, error, message):
    a, b, d = good()
    with pytest.raises(error) as caught:
        deep_gemm.fp8_gemm_nt(a, b, d, **options)
    assert str(caught.value) == message
    assert d.isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": (1, 128, 128)},
        {"recipe": [1, 128, 128]},
        {"recipe_a": (1, 128), "recipe_b": (128, 128)},
        {"compiled_dims": ""},
        {"compiled_dims": "mnk"},
    ],
)
def test_options_accepted(options):
    a, b, d = good()
    deep_gemm.fp8_gemm_nt(a, b, d, disable_ue8m0_cast=True, **options)
    assert (d == K).all()


# Scales per 1x128 of b as well


def good_columns():
    a, b, _ = good()
    return a, (b[0], torch.ones(N, 3)), torch.full((M, N), float("nan"))


def column_cases():
    _, b, d = good_columns()
    cases = {
        "b scales have shape (2, 3), expected (136, 3) for b of shape (136, 272): call per_token_cast_to_fp8(b)": {"b": (b[0], torch.ones(2, 3))},
        "d has dtype torch.bfloat16, expected torch.float32: allocate it with torch.empty((24, 136), dtype=torch.float32)": {"d": d.bfloat16()},
        "d has row stride 138, expected a multiple of 4 elements (16 bytes), at least 136: allocate it with torch.empty((24, 136), dtype=torch.float32)": {"d": wide(d, 2)},
        "c is torch.bfloat16 of shape (24, 136), expected torch.float32 of shape (24, 136), or None: pass d itself to add to it": {"c": d.bfloat16()},
        "c is torch.float32 of shape (136, 24), expected torch.float32 of shape (24, 136), or None: pass d itself to add to it": {"c": d.t()},
        "c is a list of 1, expected torch.float32 of shape (24, 136), or None: pass d itself to add to it": {"c": [1.0]},
        "the operands are on cpu, meta, expected one device: move them with .to()": {"c": d.to("meta")},
    }  # fmt: skip
    return [pytest.param(changes, message, id=message[:40]) for message, changes in cases.items()]


@pytest.mark.parametrize(("changes", "message"), column_cases())
def test_column_scales_rejected(changes, message):
    names = ("a", "b", "d")
    with pytest.raises(InvalidInputError) as error:
        deep_gemm.fp8_gemm_nt(**dict(zip(names, good_columns(), strict=True)) | changes, recipe=(1, 1, 128))
    assert str(error.value) == message
    a, b, d = good_columns()
    deep_gemm.fp8_gemm_nt(a, b, d, torch.ones(M, N), recipe=(1, 1, 128))
    assert (d == K + 1).all()


# Groups


G, KS = 2, [128, 256]
STACKED = "allocate it with torch.empty((2, 24, 136), dtype=torch.bfloat16)"
OWN = "expected torch.int32 of shape ({}), contiguous, {}: use .to(torch.int32).contiguous()".format


def good_contiguous():
    a, b, d = good()
    return {"a": a, "b": tuple(x.repeat(G, 1, 1) for x in b), "d": d, "grouped_layout": torch.tensor([0] * 20 + [-1] * 4, dtype=torch.int32)}  # fmt: skip


def good_ends():
    return good_contiguous() | {"grouped_layout": torch.tensor([20, 24], dtype=torch.int32), "use_psum_layout": True}


def good_masked():
    a, b, d = (tuple(v.repeat(G, 1, 1) for v in x) for x in (*good()[:2], good()[2:]))
    return {"a": a, "b": b, "d": d[0], "masked_m": torch.tensor([20, 0], dtype=torch.int32), "expected_m": 10}


def good_k_grouped():
    k = sum(KS)
    a, b = ((torch.ones(rows * k).to(E4M3), torch.ones(rows, k // 128)) for rows in (M, N))
    d = torch.full((G, M, N), float("nan"))
    return {"a": a, "b": b, "d": d, "ks_cpu": KS, "grouped_layout": torch.tensor(KS, dtype=torch.int32)}


GOOD = {
    "contiguous": (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, good_contiguous),
    "ends": (deep_gemm.m_grouped_fp8_gemm_nt_contiguous, good_ends),
    "masked": (deep_gemm.m_grouped_fp8_gemm_nt_masked, good_masked),
    "k_grouped": (deep_gemm.k_grouped_fp8_gemm_nt_contiguous, good_k_grouped),
}


def works(kind, **changes):
    """A good call, and whether it gives what it has to."""
    gemm, operands = GOOD[kind]
    keywords = operands() | changes
    gemm(**keywords)
    d = keywords["d"]
    if kind == "k_grouped":
        return all(bool((x == k).all()) for x, k in zip(d, KS, strict=True))
    real, rest = (d[0, :20], d[:, 20:]) if kind == "masked" else (d[:20], d[20:])
    return bool((real == K).all()) and bool((rest.isnan() if kind == "masked" else rest == 0).all())


def spread(x, stride):
    """The same shape, groups `stride` elements apart."""
    memory = torch.zeros(stride * (x.shape[0] - 1) + x[0].numel(), dtype=torch.uint8 if x.dtype == E4M3 else x.dtype)
    return memory.view(x.dtype).as_strided(x.shape, (stride, x.shape[2], 1))


def contiguous_cases():
    good = good_contiguous()
    (av, asc), (bv, bsc), d, layout = good["a"], good["b"], good["d"], good["grouped_layout"]
    rows = "the group of every row"
    return {
        "a is a Tensor, expected a pair (values, scales): call per_token_cast_to_fp8(a)": {"a": av},
        "b is a tuple of 1, expected a pair (values, scales): call per_block_cast_to_fp8(b)": {"b": (bv,)},
        "a values has dtype torch.float32, expected torch.float8_e4m3fn: call per_token_cast_to_fp8(a)": {"a": (av.float(), asc)},
        "a values has 3 dimensions, expected 2 ([M, K]): put the rows of all groups one behind the other": {"a": (av[None], asc)},
        "a scales has 3 dimensions, expected 2 ([M, K]): put the rows of all groups one behind the other": {"a": (av, asc[None])},
        "b values has 2 dimensions, expected 3 ([G, N, K]): stack the groups' weights": {"b": (bv[0], bsc)},
        "b scales has 2 dimensions, expected 3 ([G, N, K]): stack the groups' weights": {"b": (bv, bsc[0])},
        "b scales has dtype torch.int32, expected torch.float32: packed UE8M0 scales are for Blackwell": {"b": (bv, bsc.int())},
        "d is a NoneType, expected a torch.Tensor of torch.bfloat16: " + FRESH: {"d": None},
        "d has dtype torch.float32, expected torch.bfloat16: " + FRESH: {"d": d.float()},
        "d has 3 dimensions, expected 2 ([M, N]): the rows of all groups, one behind the other": {"d": d[None]},
        "b has shape (2, 136, 256), expected (G, N, 272) for a of shape (24, 272): K must agree, and both are K-major": {"b": (bv[:, :, :256], bsc)},
        "d has shape (136, 24), expected (24, 136), M of a and N of b: allocate it with torch.empty((24, 136), dtype=torch.bfloat16)": {"d": d.t().contiguous()},
        f"grouped_layout is a NoneType, {OWN('24,', rows)}": {"grouped_layout": None},
        f"grouped_layout is a list of 24, {OWN('24,', rows)}": {"grouped_layout": layout.tolist()},
        f"grouped_layout is torch.int64 of shape (24,), strides (1,), {OWN('24,', rows)}": {"grouped_layout": layout.long()},
        f"grouped_layout is torch.int32 of shape (2,), strides (1,), {OWN('24,', rows)}": {"grouped_layout": layout[:2]},
        f"grouped_layout is torch.int32 of shape (24, 1), strides (1, 1), {OWN('24,', rows)}": {"grouped_layout": layout[:, None]},
        f"grouped_layout is torch.int32 of shape (24,), strides (2,), {OWN('24,', rows)}": {"grouped_layout": layout.repeat_interleave(2)[::2]},
        "N is 132, expected a multiple of 8: pad b, its scales and d, and slice the result": {"b": (bv[:, :132], bsc), "d": d[:, :132]},
        "K is 264, expected a positive multiple of 16: pad a and b with zeros": {"a": (av[:, :264], asc), "b": (bv[:, :, :264], bsc)},
        "K is 0, expected a positive multiple of 16: pad a and b with zeros": {"a": (av[:, :0], asc), "b": (bv[:, :, :0], bsc)},
        "a scales have shape (24, 2), expected (24, 3) for a of shape (24, 272): call per_token_cast_to_fp8(a)": {"a": (av, asc[:, :2])},
        "b scales have shape (1, 2, 3), expected (2, 2, 3) for b of shape (2, 136, 272): call per_block_cast_to_fp8(b)": {"b": (bv, bsc[:1])},
        "a has strides (1, 24), expected inner stride 1 (Hopper's FP8 tensor cores read K-major operands only): " + COPY: {"a": (av.t().contiguous().t(), asc)},
        "b has strides (36992, 1, 136), expected inner stride 1 (Hopper's FP8 tensor cores read K-major operands only): " + COPY: {"b": (bv.mT.contiguous().mT, bsc)},
        "b has group stride 37000, expected a multiple of 16 elements (16 bytes), and no overlap of groups: " + COPY: {"b": (spread(bv, 37000), bsc)},
        "b has group stride 36720, expected a multiple of 16 elements (16 bytes), and no overlap of groups: " + COPY: {"b": (spread(bv, 36720), bsc)},
        "b has group stride 0, expected a multiple of 16 elements (16 bytes), and no overlap of groups: " + COPY: {"b": (bv[:1].expand(2, N, K), bsc)},
        "d has row stride 140, expected a multiple of 8 elements (16 bytes), at least 136: " + FRESH: {"d": wide(d, 4)},
        "d starts at an address that is 2 bytes past a multiple of 16, expected 16-byte alignment: " + FRESH: {"d": misaligned(d)},
        "b starts at an address that is 1 bytes past a multiple of 16, expected 16-byte alignment: " + COPY: {"b": (misaligned(bv), bsc)},
        "the operands are on cpu, meta, expected one device: move them with .to()": {"grouped_layout": layout.to("meta")},
        "recipe is (1, 1, 128), expected (1, 128, 128) or None: quantise a per 1x128 and b per 128x128": {"recipe": (1, 1, 128)},
        "recipe_b is (1, 128), expected (128, 128) or None: quantise a per 1x128 and b per 128x128": {"recipe_b": (1, 128)},
        "compiled_dims is 'xy', expected letters out of 'mnk': it is a hint, and one kernel serves every shape": {"compiled_dims": "xy"},
    }  # fmt: skip


def ends_cases():
    layout, hint = good_ends()["grouped_layout"], "expected a whole number or None: it is a hint"
    return {
        f"grouped_layout is torch.int32 of shape (24,), strides (1,), {OWN('2,', 'the end of every group')}": {"grouped_layout": layout.repeat(12)},
        f"grouped_layout is torch.int64 of shape (2,), strides (1,), {OWN('2,', 'the end of every group')}": {"grouped_layout": layout.long()},
        f"expected_m_for_psum_layout is -1, {hint}": {"expected_m_for_psum_layout": -1},
        f"expected_m_for_psum_layout is 2.5, {hint}": {"expected_m_for_psum_layout": 2.5},
        f"expected_m_for_psum_layout is True, {hint}": {"expected_m_for_psum_layout": True},
    }  # fmt: skip


def masked_cases():
    good = good_masked()
    (av, asc), (bv, bsc), d, masked_m = good["a"], good["b"], good["d"], good["masked_m"]
    stack = "stack what belongs to each group"
    agree = "expected [G, max_m, K], [G, N, K] and [G, max_m, N]: G, max_m and N must agree"
    counts = OWN("2,", "how many rows of every group are real")
    hint = "expected a whole number: about how many rows a group has; it is a hint"
    return {
        "a is a Tensor, expected a pair (values, scales): call per_token_cast_to_fp8(a)": {"a": av},
        f"a values has 2 dimensions, expected 3 ([G, max_m, K]): {stack}": {"a": (av[0], asc)},
        f"a scales has 2 dimensions, expected 3 ([G, max_m, K]): {stack}": {"a": (av, asc[0])},
        f"b values has 2 dimensions, expected 3 ([G, N, K]): {stack}": {"b": (bv[0], bsc)},
        f"d has 2 dimensions, expected 3 ([G, max_m, N]): {stack}": {"d": d[0]},
        "d has dtype torch.float32, expected torch.bfloat16: " + STACKED: {"d": d.float()},
        "b has shape (2, 136, 256), expected (G, N, 272) for a of shape (2, 24, 272): K must agree, and both are K-major": {"b": (bv[:, :, :256], bsc)},
        f"a, b and d have shapes (2, 24, 272), (1, 136, 272) and (2, 24, 136), {agree}": {"b": (bv[:1], bsc)},
        f"a, b and d have shapes (2, 24, 272), (2, 136, 272) and (1, 24, 136), {agree}": {"d": d[:1]},
        f"a, b and d have shapes (2, 24, 272), (2, 136, 272) and (2, 16, 136), {agree}": {"d": d[:, :16]},
        f"a, b and d have shapes (2, 24, 272), (2, 136, 272) and (2, 24, 128), {agree}": {"d": d[:, :, :128]},
        f"masked_m is a list of 2, {counts}": {"masked_m": [20, 0]},
        f"masked_m is torch.int64 of shape (2,), strides (1,), {counts}": {"masked_m": masked_m.long()},
        f"masked_m is torch.int32 of shape (3,), strides (1,), {counts}": {"masked_m": torch.zeros(3, dtype=torch.int32)},
        f"masked_m is torch.int32 of shape (2,), strides (2,), {counts}": {"masked_m": masked_m.repeat_interleave(2)[::2]},
        f"expected_m is -1, {hint}": {"expected_m": -1},
        f"expected_m is 2.5, {hint}": {"expected_m": 2.5},
        f"expected_m is None, {hint}": {"expected_m": None},
        f"expected_m is True, {hint}": {"expected_m": True},
        "N is 132, expected a multiple of 8: pad b, its scales and d, and slice the result": {"b": (bv[:, :132], bsc), "d": d[:, :, :132]},
        "K is 264, expected a positive multiple of 16: pad a and b with zeros": {"a": (av[:, :, :264], asc), "b": (bv[:, :, :264], bsc)},
        "a scales have shape (2, 16, 3), expected (2, 24, 3) for a of shape (2, 24, 272): call per_token_cast_to_fp8(a)": {"a": (av, asc[:, :16])},
        "b scales have shape (2, 2, 2), expected (2, 2, 3) for b of shape (2, 136, 272): call per_block_cast_to_fp8(b)": {"b": (bv, bsc[:, :, :2])},
        "a has group stride 6536, expected a multiple of 16 elements (16 bytes), and no overlap of groups: " + COPY: {"a": (spread(av, 6536), asc)},
        "d has group stride 3128, expected a multiple of 8 elements (16 bytes), and no overlap of groups: " + STACKED: {"d": spread(d, 3128)},
        "d has row stride 138, expected a multiple of 8 elements (16 bytes), at least 136: " + STACKED: {"d": torch.zeros(2, 24, 138, dtype=torch.bfloat16)[:, :, :136]},
        "d starts at an address that is 2 bytes past a multiple of 16, expected 16-byte alignment: " + STACKED: {"d": misaligned(d)},
        "the operands are on cpu, meta, expected one device: move them with .to()": {"masked_m": masked_m.to("meta")},
        "recipe is (1, 1, 128), expected (1, 128, 128) or None: quantise a per 1x128 and b per 128x128": {"recipe": (1, 1, 128)},
        "recipe_a is (128, 128), expected (1, 128) or None: quantise a per 1x128 and b per 128x128": {"recipe_a": (128, 128)},
        "compiled_dims is None, expected letters out of 'mnk': it is a hint, and one kernel serves every shape": {"compiled_dims": None},
    }  # fmt: skip


def k_grouped_cases():
    good = good_k_grouped()
    (av, asc), (bv, bsc), d, layout = good["a"], good["b"], good["d"], good["grouped_layout"]
    flat = "expected 1 ([sum(K) * M]): for every group [M, K] of its own, flattened, one behind the other"
    cast = "call per_channel_cast_to_fp8"
    fresh = "allocate it with torch.empty((G, M, N), dtype=torch.float32)"
    flatten = "flatten every group's [M, K] and [N, K], one behind the other"
    whole = "expected a list of 2 whole numbers, one for each group of d: call .tolist()"
    multiples = "expected multiples of 128: pad every group with zeros"
    counts = OWN("2,", "the K of every group")
    added = "expected torch.float32 of shape (2, 24, 136), or None: pass d itself to add to it"
    return {
        f"a is a Tensor, expected a pair (values, scales): {cast}(a)": {"a": av},
        f"b values has dtype torch.float32, expected torch.float8_e4m3fn: {cast}(b)": {"b": (bv.float(), bsc)},
        f"a values has 2 dimensions, {flat}": {"a": (av.view(M, -1), asc)},
        f"a scales has 1 dimensions, expected 2: {cast}(a)": {"a": (av, asc[0])},
        "b scales has dtype torch.int32, expected torch.float32: packed UE8M0 scales are for Blackwell": {"b": (bv, bsc.int())},
        f"d has dtype torch.bfloat16, expected torch.float32: {fresh}": {"d": d.bfloat16()},
        "d has 2 dimensions, expected 3 ([G, M, N]): one result for each group": {"d": d[0]},
        "ks_cpu and grouped_layout are None, expected at least one: the K of every group": {"ks_cpu": None, "grouped_layout": None},
        f"ks_cpu is [128], {whole}": {"ks_cpu": [128]},
        f"ks_cpu is [64, 320], {multiples}": {"ks_cpu": [64, 320]},
        f"ks_cpu is [-128, 512], {multiples}": {"ks_cpu": [-128, 512]},
        f"ks_cpu is [128.0, 256], {whole}": {"ks_cpu": [128.0, 256]},
        f"ks_cpu is 384, {whole}": {"ks_cpu": 384},
        "the sum of ks_cpu is 256, expected 384, for a of 9216 values and M of 24": {"ks_cpu": [128, 128]},
        f"a and b have 9200 and 52224 values, expected sum(K) * 24 and sum(K) * 136 for d of shape (2, 24, 136): {flatten}": {"a": (av[:9200], asc)},
        f"a and b have 9216 and 17408 values, expected sum(K) * 24 and sum(K) * 136 for d of shape (2, 24, 136): {flatten}": {"b": (bv[: 128 * N], bsc)},
        "sum(K) is 320, expected a multiple of 128: pad every group with zeros": {"a": (av[: 320 * M], asc), "b": (bv[: 320 * N], bsc), "ks_cpu": None},
        f"grouped_layout is torch.int64 of shape (2,), strides (1,), {counts}": {"grouped_layout": layout.long()},
        f"grouped_layout is torch.int32 of shape (1,), strides (1,), {counts}": {"grouped_layout": layout[:1]},
        f"grouped_layout is a list of 2, {counts}": {"grouped_layout": KS, "ks_cpu": None},
        "grouped_layout is None, expected the running ends: pass them, int32 [G]": {"grouped_layout": None, "use_psum_layout": True},
        "N is 68, expected a multiple of 8: pad b, its scales and d, and slice the result": {"b": (bv[: 68 * 384], bsc), "d": d[:, :, :68]},
        f"a scales have shape (24, 2), expected (24, 3) for a of shape (9216,): {cast}(a)": {"a": (av, asc[:, :2])},
        f"b scales have shape (3, 136), expected (136, 3) for b of shape (52224,): {cast}(b)": {"b": (bv, bsc.t())},
        f"c is torch.float32 of shape (24, 136), {added}": {"c": d[0]},
        f"c is torch.bfloat16 of shape (2, 24, 136), {added}": {"c": d.bfloat16()},
        f"c is a float, {added}": {"c": 1.0},
        "d has row stride 138, expected a multiple of 4 elements (16 bytes), at least 136: allocate it with torch.empty((2, 24, 136), dtype=torch.float32)": {"d": torch.zeros(2, 24, 138)[:, :, :136]},
        "d starts at an address that is 4 bytes past a multiple of 16, expected 16-byte alignment: allocate it with torch.empty((2, 24, 136), dtype=torch.float32)": {"d": misaligned(d)},
        "the operands are on cpu, meta, expected one device: move them with .to()": {"grouped_layout": layout.to("meta")},
        "recipe is (1, 128, 128), expected (1, 1, 128): quantise a and b with per_channel_cast_to_fp8": {"recipe": (1, 128, 128)},
        "recipe is None, expected (1, 1, 128): quantise a and b with per_channel_cast_to_fp8": {"recipe": None},
        "compiled_dims is 'kn ', expected letters out of 'mnk': it is a hint, and one kernel serves every shape": {"compiled_dims": "kn "},
    }  # fmt: skip


def grouped_cases():
    kinds = {
        "contiguous": contiguous_cases(),
        "ends": ends_cases(),
        "masked": masked_cases(),
        "k_grouped": k_grouped_cases(),
    }
    return [
        pytest.param(kind, changes, message, id=f"{kind}: {message[:60]}")
        for kind, cases in kinds.items()
        for message, changes in cases.items()
    ]


@pytest.mark.parametrize(("kind", "changes", "message"), grouped_cases())
def test_groups_rejected(kind, changes, message):
    gemm, operands = GOOD[kind]
    with pytest.raises(InvalidInputError) as error:
        gemm(**operands() | changes)
    assert str(error.value) == message
    assert works(kind)


@pytest.mark.parametrize("kind", GOOD)
def test_rejections_write_nothing(kind):
    gemm, operands = GOOD[kind]
    keywords = operands()
    with pytest.raises(InvalidInputError, match=r"^compiled_dims is 5,"):
        gemm(**keywords, compiled_dims=5)
    assert keywords["d"].isnan().all()


@pytest.mark.parametrize("name", ["a", "b"])
def test_values_along_k_are_contiguous_on_16_bytes(name):
    gemm, operands = GOOD["k_grouped"]
    keywords = operands()
    values, scales = keywords[name]
    for wrong, strides in (
        (misaligned(values), (1,)),
        (values.view(torch.uint8).repeat_interleave(2).view(E4M3)[::2], (2,)),
    ):
        with pytest.raises(InvalidInputError) as error:
            gemm(**keywords | {name: (wrong, scales)})
        assert str(error.value) == (
            f"{name} has strides {strides} and starts at {wrong.data_ptr():#x}, expected contiguous values on 16 bytes: {COPY}"
        )
    assert works("k_grouped")


@pytest.mark.parametrize("alignment", [64, 192])
def test_alignments_along_k(alignment):
    """Running ends start groups at the alignment, which scales per 128 columns have to agree with; K of groups do not."""
    gemm, operands = GOOD["k_grouped"]
    deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
    try:
        for ks in (KS, None):
            keywords = operands() | {"ks_cpu": ks, "use_psum_layout": True}
            with pytest.raises(InvalidInputError) as error:
                gemm(**keywords)
            assert str(error.value) == (
                f"the alignment is {alignment}, expected a multiple of 128 along K: "
                "call set_mk_alignment_for_contiguous_layout(128)"
            )
            assert keywords["d"].isnan().all()
            keywords = operands() | {"ks_cpu": ks}
            gemm(**keywords)
            assert (keywords["d"][0] == KS[0]).all() and (keywords["d"][1] == KS[1]).all()
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)


def test_groups_accepted():
    """Options that say what holds anyway, hints of any size, and groups whose rows lie between each other's."""
    for kind, changes in (
        ("contiguous", {"recipe": [1, 128, 128], "recipe_a": (1, 128), "recipe_b": (128, 128), "compiled_dims": "mnk"}),
        ("ends", {"expected_m_for_psum_layout": 0, "disable_ue8m0_cast": True}),
        ("masked", {"expected_m": 10**9, "compiled_dims": ""}),
        ("k_grouped", {"recipe": [1, 1, 128], "c": None, "ks_cpu": tuple(KS)}),
    ):
        assert works(kind, **changes)
    between = torch.full((M, G, N), float("nan"), dtype=torch.bfloat16)
    keywords = good_masked() | {"d": between.transpose(0, 1)}
    deep_gemm.m_grouped_fp8_gemm_nt_masked(**keywords)
    assert (between[:20, 0] == K).all() and between[20:].isnan().all() and between[:, 1].isnan().all()


def test_dimensions_that_the_copy_engine_cannot_count_are_rejected():
    for shape in ((2**31, 8, 16), (1, 2**31, 16), (1, 8, 2**31)):
        with pytest.raises(InvalidInputError, match=r"expected less than 2\^31 each: multiply in parts"):
            problem.check_shape(*shape)
    problem.check_shape(2**31 - 1, 2**31 - 8, 2**31 - 16)


def test_remedies_help():
    """What a message says to do is done, and the call works."""
    a, b, d = good()
    for wrong in (misaligned(a[0]), a[0][:1].expand(24, K), a[0].t().contiguous().t(), wide(a[0], 8)):
        with pytest.raises(InvalidInputError, match="pass a copy"):
            deep_gemm.fp8_gemm_nt((wrong, a[1]), b, d)
        deep_gemm.fp8_gemm_nt((wrong.clone(memory_format=torch.contiguous_format), a[1]), b, d)
    wrong = b[0].t().contiguous()
    with pytest.raises(InvalidInputError, match="in the transposed forms"):
        deep_gemm.fp8_gemm_nn(a, (wrong, b[1].t()), d)
    deep_gemm.fp8_gemm_nn(a, (wrong.t().clone(memory_format=torch.contiguous_format).t(), b[1].t()), d)
    assert (d == K).all()


def test_checks_survive_optimised_python():
    """`python -O` drops assert statements; the checks are none. Every rejection of this file, without this test."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rejected", __file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100


def test_import_needs_nothing():
    """Importing reads no environment, loads no CUDA package, starts no compiler."""
    script = """
import os, sys
class Untouchable(type(os.environ)):
    def __getitem__(self, key):
        assert not key.startswith("DG_"), key
        return super().__getitem__(key)
import torch
os.environ.__class__ = Untouchable
before = set(sys.modules)
import deep_gemm
print([m for m in set(sys.modules) - before if m.split(".")[0] in ("cuda", "safetensors", "tqdm")])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("contiguous", "use_psum_layout"), ("contiguous", "ensure_zero_padding"), ("k_grouped", "use_psum_layout")],
)
def test_flags_that_are_none(kind, name):
    """A tensor in the place of a flag is an argument that slipped: its truth is no answer."""
    gemm, operands = GOOD[kind]
    with pytest.raises(InvalidInputError) as error:
        gemm(**operands() | {name: torch.zeros(2)})
    assert str(error.value) == f"{name} is a Tensor, expected True or False: pass options by keyword"
    gemm(**operands() | {name: 0})


def test_recipes_of_tensors_are_rejected():
    a, b, d = good()
    with pytest.raises(InvalidInputError, match=r"expected \(1, 128, 128\) or None"):
        deep_gemm.fp8_gemm_nt(a, b, d, recipe=(torch.zeros(0), torch.zeros(0), torch.zeros(0)))


def test_whole_numbers_of_numpy_are_whole():
    gemm, operands = GOOD["masked"]
    gemm(**operands() | {"expected_m": np.int64(3)})
    gemm, operands = GOOD["k_grouped"]
    gemm(**operands() | {"ks_cpu": [np.int32(k) for k in KS]})


def negated(x):
    """The same values, of a view that negates what lies in memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def test_views_that_negate_are_rejected():
    a, b = ((torch.ones(rows, 256).to(E4M3), torch.ones(scales, 2)) for rows, scales in ((24, 24), (16, 1)))
    d = torch.zeros(24, 16, dtype=torch.bfloat16)
    with pytest.raises(InvalidInputError, match=r"a scales is a view that negates its memory.*call \.resolve_neg\(\)"):
        deep_gemm.fp8_gemm_nt((a[0], negated(a[1])), b, d)
    with pytest.raises(InvalidInputError, match="c is a view that negates"):
        full = torch.zeros(24, 16)
        deep_gemm.fp8_gemm_nt(a, (b[0], torch.ones(16, 2)), full, negated(torch.ones(24, 16)), recipe=(1, 1, 128))
    with pytest.raises(InvalidInputError, match="got a view that negates"):
        deep_gemm.get_mn_major_tma_aligned_tensor(negated(a[1]))
    deep_gemm.fp8_gemm_nt((a[0], negated(a[1]).resolve_neg()), b, d)
    assert (d == 256).all()


@pytest.mark.parametrize("name", ["a", "a_scales", "b", "b_scales", "d"])
def test_freed_storage_is_rejected(name):
    x = {
        "a": torch.ones(24, 256).to(E4M3), "a_scales": torch.ones(24, 2),
        "b": torch.ones(16, 256).to(E4M3), "b_scales": torch.ones(1, 2), "d": torch.zeros(24, 16, dtype=torch.bfloat16),
    }  # fmt: skip
    x[name].untyped_storage().resize_(0)
    shape = re.escape(str(tuple(x[name].shape)))
    with pytest.raises(InvalidInputError, match=f"^{name} of shape {shape} has no memory"):
        deep_gemm.fp8_gemm_nt((x["a"], x["a_scales"]), (x["b"], x["b_scales"]), x["d"])


def test_small_numbers_of_numpy_add_up():
    a, b = ((torch.ones(rows * 256).to(E4M3), torch.ones(rows, 2)) for rows in (16, 24))
    d = torch.zeros(2, 16, 24)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, [np.uint8(128)] * 2, None)
    assert (d == 128).all()
