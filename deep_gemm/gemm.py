"""The public multiplications. A call's path: problem (check), heuristics (choose), runtime (compile, launch)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import torch

from . import problem, reference, settings
from .heuristics import choose
from .plan import Plan
from .problem import Operands, Pair, Problem
from .runtime import device
from .runtime.launch import launch


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a @ b.T with fine-grained scales, written into d.

    Args:
        a: (values E4M3 [M, K], scales FP32 [M, ceil(K / 128)]): one scale per row and 128 columns. Values K-major; any
            M; K a multiple of 16. Scales with any strides; M-major ones with rows on 16 bytes, as
            `get_mn_major_tma_aligned_tensor` makes them, are used in place.
        b: (values E4M3 [N, K], scales FP32 [ceil(N / 128), ceil(K / 128)]): one scale per 128x128. Values K-major; N a
            multiple of 8. Scales with any strides.
        d: BF16 [M, N], inner stride 1, row stride a multiple of 8. The caller owns it; nothing else is written. It may
            not overlap another operand. Autograd sees none of this.
        c, recipe, recipe_a, recipe_b: None, or what goes with block scales: recipe (1, 128, 128).
        compiled_dims: taken for compatibility; a kernel serves every M, N and K.
        disable_ue8m0_cast: taken for compatibility; Hopper multiplies with the FP32 scales as they are.

    CUDA tensors run on the current stream of their device, CPU tensors on the CPU. A row has the same bits for every M,
    and on every tile.

    Raises:
        InvalidInputError: an operand that does not fit, before anything is launched.
        NotImplementedError: recipe (1, 1, 128).
        UnsupportedDeviceError: a GPU that is not Hopper.
        MissingDependencyError: a CUDA package that is not installed, with the command that brings it.
        CompileError, LaunchError: what the compiler or the driver refuses.

    Source: block scales and two-level accumulation as in the DeepSeek-V3 report (arXiv 2412.19437), section 3.5.2.
    """
    problem.check_options(c, recipe, recipe_a, recipe_b, compiled_dims)
    _run(*problem.dense(a, b, d))


def fp8_gemm_nn(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a @ b: `fp8_gemm_nt` with b [K, N] and scales [ceil(K / 128), ceil(N / 128)], views of K-major memory."""
    fp8_gemm_nt(a, _transposed(b), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def fp8_gemm_tn(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a.T @ b: `fp8_gemm_nt` with a [K, M], b [K, N] and their scales, views of K-major memory."""
    fp8_gemm_nt(_transposed(a), _transposed(b), d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def fp8_gemm_tt(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d = a.T @ b.T: `fp8_gemm_nt` with a [K, M] and its scales, views of K-major memory."""
    fp8_gemm_nt(_transposed(a), b, d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: torch.Tensor) -> None:
    """`fp8_gemm_nt` under the name of DeepGEMM's first release."""
    fp8_gemm_nt(lhs, rhs, out)


def _transposed(pair: Pair) -> Pair:
    """The pair with both tensors transposed; what is no pair of matrices is left for the check to reject."""
    if isinstance(pair, (tuple, list)) and all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in pair):
        return tuple(x.t() for x in pair)  # type: ignore[return-value]
    return pair


def _run(problem: Problem, operands: Operands) -> None:
    if problem.is_empty:
        return
    if operands.a.device.type == "cpu":
        return reference.run(operands.a, operands.a_scales, operands.b, operands.b_scales, operands.d)
    launch(_plan(problem.m, problem.n, problem.k, operands.a.device.index, device.num_sms_set()), operands)


@lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, device_index: int, num_sms: int | None) -> Plan:
    problem, hopper = Problem(m, n, k), device.current(device_index)
    hopper.require_hopper()
    plan = choose(problem, hopper, num_sms)
    if settings.get("DG_PRINT_CONFIGS"):
        print(f"deep_gemm: {problem}: {plan}", file=sys.stderr)
    return plan
