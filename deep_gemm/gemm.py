"""The public multiplications. A call's path: problem (check), heuristics (choose), runtime (compile, launch)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling

from . import config, problem, recorded, reference, settings
from .config import Config
from .decode import MOST_ROWS
from .errors import InvalidInputError
from .heuristics import choices, choose
from .layout import get_mk_alignment_for_contiguous_layout
from .plan import Plan, Strip, Tile
from .problem import Kind, Operands, Pair, Problem, Problems
from .runtime import device
from .runtime.guard import watched
from .runtime.launch import DENSE, again, launch, prepare

P = ParamSpec("P")
R = TypeVar("R")


def _also_by(**older: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets keywords go by older names as well: older name = name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> R:
            if keywords:
                for old in older.keys() & keywords.keys():
                    if older[old] in keywords:
                        raise TypeError(f"{function.__name__}() got {older[old]} twice, as {old} too: pass it once")
                    keywords[older[old]] = keywords.pop(old)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate


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
        c: None; with recipe (1, 1, 128) what is added, FP32 [M, N], and d itself will do.
        recipe, recipe_a, recipe_b: None, or block scales as above, (1, 128, 128). With (1, 1, 128), for weight
            gradients, b's scales are FP32 [N, ceil(K / 128)], one per row and 128 columns like a's, and d is FP32.
        compiled_dims: taken for compatibility; a kernel serves every M, N and K.
        disable_ue8m0_cast: taken for compatibility; Hopper multiplies with the FP32 scales as they are.

    CUDA tensors run on the current stream of their device, CPU tensors on the CPU. A row has the same bits every time,
    and for every M whose plan splits K alike: for all after `set_batch_invariant(True)`.

    Raises:
        InvalidInputError: an operand that does not fit, before anything is launched.
        UnsupportedDeviceError: a GPU that is not Hopper.
        MissingDependencyError: a CUDA package that is not installed, with the command that brings it.
        CompileError, LaunchError: what the compiler or the driver refuses.

    Source: block scales and two-level accumulation as in the DeepSeek-V3 report (arXiv 2412.19437), section 3.5.2.
    """
    if not is_dynamo_compiling():
        plain = c is None and recipe is None and recipe_a is None and recipe_b is None and compiled_dims == "nk"
        if plain and again(a, b, d):
            return
        column_scales = problem.check_options(c, recipe, recipe_a, recipe_b, compiled_dims)
        if not watched(a, b, d):
            return _run(*problem.dense(a, b, d, c, column_scales), option=None if column_scales else DENSE)
    _traced("fp8_gemm_nt", a, b, d, c, recipe, recipe_a, recipe_b)


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
    if is_dynamo_compiling() or watched(a, b, d):
        return _traced("fp8_gemm_nn", a, b, d, c, recipe, recipe_a, recipe_b)
    with _swapped("b"):
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
    if is_dynamo_compiling() or watched(a, b, d):
        return _traced("fp8_gemm_tn", a, b, d, c, recipe, recipe_a, recipe_b)
    with _swapped("a and b"):
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
    if is_dynamo_compiling() or watched(a, b, d):
        return _traced("fp8_gemm_tt", a, b, d, c, recipe, recipe_a, recipe_b)
    with _swapped("a"):
        fp8_gemm_nt(_transposed(a), b, d, c, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast)


def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair, out: torch.Tensor) -> None:
    """`fp8_gemm_nt` under the name of DeepGEMM's first release.

    Args:
        lhs: its a, (values E4M3 [M, K], scales FP32 [M, ceil(K / 128)]).
        rhs: its b, (values E4M3 [N, K], scales FP32 [ceil(N / 128), ceil(K / 128)]).
        out: its d, BF16 [M, N].

    Raises: as `fp8_gemm_nt`.
    """
    fp8_gemm_nt(lhs, rhs, out)


@_also_by(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """d[row] = a[row] @ b[group of row].T: rows of many groups, one group behind the other, each with its own b.

    Args:
        a: (values E4M3 [M, K], scales FP32 [M, ceil(K / 128)]), as for `fp8_gemm_nt`.
        b: (values E4M3 [G, N, K], scales FP32 [G, ceil(N / 128), ceil(K / 128)]).
        d: BF16 [M, N].
        grouped_layout (once m_indices): int32 [M], contiguous, on the same device: the group of every row. What is not
            in 0 .. G - 1 is a padding row, -1 by convention. Groups start at multiples of
            `get_mk_alignment_for_contiguous_layout()`. It is read on the device alone.
        use_psum_layout: grouped_layout is int32 [G] instead: group g has the rows from the first multiple of the
            alignment after grouped_layout[g - 1] up to, not including, grouped_layout[g].
        ensure_zero_padding: padding rows of d become zeros; otherwise they are not written. With use_psum_layout, those
            up to the next multiple of the alignment; rows behind the last group's are not written at all.
        expected_m_for_psum_layout: about how many rows a group has, a hint.
        The others as for `fp8_gemm_nt`.

    A row has the bits that `fp8_gemm_nt` gives it with its group's b. What a padding row holds influences nothing.

    Raises: as `fp8_gemm_nt`.
    """
    expected = expected_m_for_psum_layout
    if not is_dynamo_compiling():
        alignment = get_mk_alignment_for_contiguous_layout()
        option = alignment if ensure_zero_padding is True else -alignment if ensure_zero_padding is False else None
        plain = recipe is None and recipe_a is None and recipe_b is None and compiled_dims == "nk"
        by_row = use_psum_layout is False and expected is None
        if plain and by_row and again(a, b, d, grouped_layout, option):
            return
        problem.check_options(None, recipe, recipe_a, recipe_b, compiled_dims, dense=False)
        if not watched(a, b, d):
            checked = problem.contiguous(
                a, b, d, grouped_layout, use_psum_layout, alignment, expected, ensure_zero_padding
            )
            return _run(*checked, option=option if by_row else None)
    rest = grouped_layout, recipe, recipe_a, recipe_b, bool(use_psum_layout), bool(ensure_zero_padding), expected
    _traced("m_grouped_fp8_gemm_nt_contiguous", a, b, d, *rest)


@_also_by(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous` with b [G, K, N] and its scales, views of K-major memory."""
    if is_dynamo_compiling() or watched(a, b, d):
        rest = grouped_layout, recipe, recipe_a, recipe_b, bool(use_psum_layout), bool(ensure_zero_padding)
        return _traced("m_grouped_fp8_gemm_nn_contiguous", a, b, d, *rest)
    with _swapped("b"):
        m_grouped_fp8_gemm_nt_contiguous(
            a, _transposed(b), d, grouped_layout, recipe, recipe_a, recipe_b, compiled_dims, disable_ue8m0_cast,
            use_psum_layout, ensure_zero_padding,
        )  # fmt: skip


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Sequence[int] | None = None,
    recipe_a: Sequence[int] | None = None,
    recipe_b: Sequence[int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T for every group g; for CUDA graphs, where shapes may not change.

    Args:
        a: (values E4M3 [G, max_m, K], scales FP32 [G, max_m, ceil(K / 128)]).
        b: (values E4M3 [G, N, K], scales FP32 [G, ceil(N / 128), ceil(K / 128)]).
        d: BF16 [G, max_m, N]. Rows from masked_m[g] on are not written, and what a holds there influences nothing.
        masked_m: int32 [G], contiguous, on the same device, which alone reads it. Less than 0 is 0, more than max_m is
            max_m.
        expected_m: about how many rows a group has, a hint.
        The others as for `fp8_gemm_nt`.

    A row has the bits that `fp8_gemm_nt` gives it with its group's b.

    Raises: as `fp8_gemm_nt`.
    """
    if not is_dynamo_compiling():
        plain = recipe is None and recipe_a is None and recipe_b is None and compiled_dims == "nk"
        if plain and type(expected_m) is int and again(a, b, d, masked_m, expected_m):
            return
        problem.check_options(None, recipe, recipe_a, recipe_b, compiled_dims, dense=False)
        if not watched(a, b, d):
            return _run(*problem.masked(a, b, d, masked_m, expected_m), option=expected_m)
    _traced("m_grouped_fp8_gemm_nt_masked", a, b, d, masked_m, expected_m, recipe, recipe_a, recipe_b)


@_also_by(ks="ks_cpu", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    ks_cpu: Sequence[int] | None,
    grouped_layout: torch.Tensor | None,
    c: torch.Tensor | None = None,
    recipe: Sequence[int] = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """d[g] = c[g] + a_g @ b_g.T, where group g has its own columns along K: the weight gradients of many groups.

    Args:
        a: (values E4M3 [sum(K) * M], scales FP32 [M, sum(K) / 128]): for every group its [M, K_g], K-major, one behind
            the other and flat; scales per row and 128 columns, those of all groups side by side.
        b: (values E4M3 [sum(K) * N], scales FP32 [N, sum(K) / 128]), likewise.
        d: FP32 [G, M, N].
        ks_cpu (once ks): K of every group, multiples of 128, or None if the device alone knows.
        grouped_layout (once ks_tensor): the same, int32 [G] on the device, which is what is multiplied by; None:
            made from ks_cpu.
        c: FP32 [G, M, N], and d itself will do; None: zeros.
        recipe: (1, 1, 128).
        use_psum_layout: grouped_layout holds running ends instead: group g has the columns from the first multiple of
            the alignment after grouped_layout[g - 1] up to grouped_layout[g], in rows padded to 128.
        compiled_dims: taken for compatibility.

    Raises: as `fp8_gemm_nt`.
    """
    if is_dynamo_compiling() or watched(a, b, d):
        rest = ks_cpu, grouped_layout, c, recipe, bool(use_psum_layout)
        return _traced("k_grouped_fp8_gemm_nt_contiguous", a, b, d, *rest)
    problem.check_k_grouped_options(recipe, compiled_dims)
    alignment = get_mk_alignment_for_contiguous_layout()
    _run(*problem.k_grouped(a, b, d, ks_cpu, grouped_layout, c, use_psum_layout, alignment))


def _transposed(pair: Pair) -> Pair:
    """The pair with the last two dimensions of both swapped; what is no pair is left for the check to reject."""
    if isinstance(pair, (tuple, list)) and all(isinstance(x, torch.Tensor) and x.dim() in (2, 3) for x in pair):
        return tuple(x.mT for x in pair)  # type: ignore[return-value]
    return pair


@contextmanager
def _swapped(names: str) -> Generator[None]:
    """Says in complaints that they are about views with the last two dimensions swapped."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{error} (here the last two dimensions of {names} are swapped)") from None


def _traced(name: str, a: Pair, b: Pair, d: torch.Tensor, *options: Any) -> None:
    """Calls the operator of that name."""
    getattr(torch.ops.deep_gemm, name).out(*problem.apart("a", a), *problem.apart("b", b), *options, d=d)


def _run(problem: Problem, operands: Operands, option: Any = None) -> None:
    """option: as given to launch."""
    if problem.is_empty:
        if operands.clear_padding and not config.get_compile_mode():
            operands.d.zero_()  # without groups all rows are padding
        return
    index = operands.d.device.index
    if operands.d.device.type == "cpu":
        if not config.get_compile_mode():
            reference.multiply(problem, operands)
        return
    if config.get_compile_mode():
        return prepare(_kernel_of(problem, index), problem.kind, index)
    settings_now = config.current()
    plan = _plan(problem, index, settings_now)
    if problem.k == 0:  # no group has any columns
        operands.d.zero_() if operands.c is None else operands.d.copy_(operands.c)
    else:
        launch(plan, operands, option, settings_now)


def plan_of(problem: Problem, device_index: int = 0) -> Plan:
    """The plan that a call follows on that CUDA device, as settings are now; the exact reference needs its `split`.

    Raises: UnsupportedDeviceError, InvalidInputError.
    """
    return _plan(problem, device_index, config.current())


def _kernel_of(problem: Problem, device_index: int) -> Tile | Strip:
    """The kernel of plan_of. What differs in its rows is planned together, for those who ask for all M in turn."""
    count, m = (problem.m, None) if problem.expected_m is None else (problem.expected_m, problem.m)
    if count < 1:
        return plan_of(problem, device_index).tile
    step = problem.alignment if problem.kind == Kind.CONTIGUOUS else 1  # rows that are planned alike
    block, i = divmod((count - 1) // step, MOST_ROWS)
    others = problem.n, problem.k, problem.kind, problem.groups, problem.alignment, problem.column_scales
    try:
        return _kernels_of(m, *others, step, block, device_index, config.current())[i]
    except InvalidInputError:  # which is of the block
        return plan_of(problem, device_index).tile


@lru_cache(maxsize=1024)
def _kernels_of(
    m: int | None, n: int, k: int, kind: Kind, groups: int, alignment: int, column_scales: bool,
    step: int, block: int, device_index: int, settings_now: Config,
) -> list[Tile | Strip]:  # fmt: skip
    """Of MOST_ROWS problems, which have, or with an m expect, `block * MOST_ROWS + 1` and more times `step` rows."""
    hopper = device.current(device_index)
    hopper.require_hopper()
    like = Problem(m or 1, n, k, kind, groups, None if m is None else 1, alignment, column_scales)
    counts = (np.arange(1, MOST_ROWS + 1) + block * MOST_ROWS) * step
    return choices(Problems(like, counts), hopper, settings_now)[int(settings_now.pdl)]


@lru_cache(maxsize=4096)
def _plan(problem: Problem, device_index: int, settings_now: Config) -> Plan:
    hopper = device.current(device_index)
    hopper.require_hopper()
    plan = choose(problem, hopper, settings_now)
    if settings.get("DG_PRINT_CONFIGS"):
        print(f"deep_gemm: {problem}: {plan}", file=sys.stderr)
    if file := settings.get("DG_RECORD_SHAPES"):
        recorded.append(file, problem, hopper, settings_now)
    return plan
