"""Every input that is rejected, by the text of its error; after each rejection the next good call works."""

import subprocess
import sys

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
        "d has shape (136, 24), expected (24, 136), M of a and N of b": (a, b, d.t().contiguous()),
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
            {"recipe": (1, 1, 128)},
            NotImplementedError,
            "recipe (1, 1, 128), FP32 output with per-token scales on both sides, is not offered yet",
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
            {"recipe_b": (1, 128)},
            InvalidInputError,
            "recipe_b is (1, 128), expected (128, 128) or None: quantise a per 1x128 and b per 128x128",
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
    """`python -O` drops assert statements; the checks are none."""
    script = """
import torch, deep_gemm
a = torch.ones(8, 128).to(torch.float8_e4m3fn), torch.ones(8, 1)
try:
    deep_gemm.fp8_gemm_nt(a, a, torch.empty(8, 8, dtype=torch.float32))
except deep_gemm.errors.InvalidInputError as error:
    print("rejected:", error)
"""
    result = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert "rejected: d has dtype torch.float32" in result.stdout


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
print([m for m in set(sys.modules) - before if m.split(".")[0] in ("cuda", "elftools", "safetensors", "tqdm")])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
