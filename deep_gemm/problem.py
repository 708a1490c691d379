"""What is to be multiplied: the description of one problem, and the only place where a user's input is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import InvalidInputError
from .layout import ceil_div

E4M3 = torch.float8_e4m3fn
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """d[m, n] = a[m, k] @ b[n, k].T, with scales per 1x128 of a and per 128x128 of b."""

    m: int
    n: int
    k: int

    @property
    def k_blocks(self) -> int:
        return ceil_div(self.k, 128)

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Every operand read once, the result written once."""
        scales = 4 * self.k_blocks * (self.m + ceil_div(self.n, 128))
        return (self.m + self.n) * self.k + 2 * self.m * self.n + scales

    @property
    def is_empty(self) -> bool:
        return self.m == 0 or self.n == 0


class Operands(NamedTuple):
    """Checked: a [M, K], b [N, K] E4M3; a_scales [M, K / 128], b_scales [N / 128, K / 128] FP32; d [M, N] BF16."""

    a: torch.Tensor
    a_scales: torch.Tensor
    b: torch.Tensor
    b_scales: torch.Tensor
    d: torch.Tensor


def dense(a: Pair, b: Pair, d: torch.Tensor) -> tuple[Problem, Operands]:
    """Checks the operands of a dense multiplication.

    Raises: InvalidInputError, which says what came, what was expected and what to do.
    """
    a_values, a_scales = _pair("a", a, "per_token_cast_to_fp8")
    b_values, b_scales = _pair("b", b, "per_block_cast_to_fp8")
    (m, k), (n, k_of_b) = a_values.shape, b_values.shape
    if not _is_matrix(d, torch.bfloat16):
        raise _no_matrix("d", d, torch.bfloat16, f"allocate it with torch.empty(({m}, {n}), dtype=torch.bfloat16)")
    if k != k_of_b:
        raise InvalidInputError(
            f"b has shape {_shape(b_values)}, expected (N, {k}) for a of shape {_shape(a_values)}: "
            "K must agree, and both are K-major"
        )
    if d.shape != (m, n):
        raise InvalidInputError(f"d has shape {_shape(d)}, expected ({m}, {n}), M of a and N of b")
    check_shape(m, n, k)
    problem = Problem(m, n, k)
    _scales("a", a_scales, a_values, (m, problem.k_blocks), "per_token_cast_to_fp8")
    _scales("b", b_scales, b_values, (ceil_div(n, 128), problem.k_blocks), "per_block_cast_to_fp8")
    _row_major("a", a_values)
    _row_major("b", b_values)
    _row_major("d", d)
    device = d.device
    tensors = (a_values, a_scales, b_values, b_scales, d)
    if any(x.device != device for x in tensors):
        devices = ", ".join(sorted({str(x.device) for x in tensors}))
        raise InvalidInputError(f"the operands are on {devices}, expected one device: move them with .to()")
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(
            f"the operands are on {device}, expected a CUDA or the CPU device: move them with .to()"
        )
    return problem, Operands(a_values, a_scales, b_values, b_scales, d)


def check_shape(m: int, n: int, k: int) -> None:
    """Checks what the copy engine and the tensor cores ask of M, N and K.

    Raises: InvalidInputError.
    """
    if max(m, n, k) >= 2**31:
        raise InvalidInputError(f"M, N, K are {m}, {n}, {k}, expected less than 2^31 each: multiply in parts")
    if n % 8:
        raise InvalidInputError(f"N is {n}, expected a multiple of 8: pad b, its scales and d, and slice the result")
    if k == 0 or k % 16:
        raise InvalidInputError(f"K is {k}, expected a positive multiple of 16: pad a and b with zeros")


def check_options(
    c: torch.Tensor | None,
    recipe: Sequence[int] | None,
    recipe_a: Sequence[int] | None,
    recipe_b: Sequence[int] | None,
    compiled_dims: str,
) -> None:
    """Checks what goes with block scales, recipe (1, 128, 128).

    Raises: InvalidInputError; NotImplementedError for recipe (1, 1, 128).
    """
    if isinstance(recipe, Sequence) and tuple(recipe) == (1, 1, 128):
        raise NotImplementedError(
            "recipe (1, 1, 128), FP32 output with per-token scales on both sides, is not offered yet"
        )
    for name, got, want in (
        ("recipe", recipe, (1, 128, 128)),
        ("recipe_a", recipe_a, (1, 128)),
        ("recipe_b", recipe_b, (128, 128)),
    ):
        if got is not None and not (isinstance(got, Sequence) and tuple(got) == want):
            raise InvalidInputError(f"{name} is {got}, expected {want} or None: quantise a per 1x128 and b per 128x128")
    if c is not None:
        raise InvalidInputError(
            "c was given, expected None: with block scales nothing is accumulated into d; add c afterwards"
        )
    if not isinstance(compiled_dims, str) or not set(compiled_dims) <= set("mnk"):
        raise InvalidInputError(
            f"compiled_dims is {compiled_dims!r}, expected letters out of 'mnk': "
            "it is a hint, and one kernel serves every shape"
        )


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _pair(name: str, pair: Pair, cast: str) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidInputError(f"{name} is {_kind(pair)}, expected a pair (values, scales): call {cast}({name})")
    values, scales = pair
    if not _is_matrix(values, E4M3):
        raise _no_matrix(f"{name} values", values, E4M3, f"call {cast}({name})")
    if not _is_matrix(scales, torch.float32):
        packed = getattr(scales, "dtype", None) == torch.int32
        remedy = "packed UE8M0 scales are for Blackwell" if packed else f"call {cast}({name})"
        raise _no_matrix(f"{name} scales", scales, torch.float32, remedy)
    return values, scales


def _kind(x: object) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else f"a {type(x).__name__}"


def _is_matrix(x: object, dtype: torch.dtype) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == dtype and x.dim() == 2 and x.layout == torch.strided


def _no_matrix(name: str, x: object, dtype: torch.dtype, remedy: str) -> InvalidInputError:
    if not isinstance(x, torch.Tensor):
        return InvalidInputError(f"{name} is a {type(x).__name__}, expected a torch.Tensor of {dtype}: {remedy}")
    if x.dtype != dtype:
        return InvalidInputError(f"{name} has dtype {x.dtype}, expected {dtype}: {remedy}")
    if x.layout != torch.strided:
        return InvalidInputError(f"{name} has layout {x.layout}, expected torch.strided: call .to_dense()")
    return InvalidInputError(
        f"{name} has {x.dim()} dimensions, expected 2 for a dense GEMM: flatten the leading ones with .view()"
    )


def _scales(name: str, scales: torch.Tensor, values: torch.Tensor, want: tuple[int, int], cast: str) -> None:
    if scales.shape != want:
        raise InvalidInputError(
            f"{name} scales have shape {_shape(scales)}, expected {want} for {name} of shape {_shape(values)}: "
            f"call {cast}({name})"
        )


def _row_major(name: str, x: torch.Tensor) -> None:
    """What the copy engine asks for: inner stride 1, rows and base on 16 bytes, rows that do not overlap."""
    rows, columns = x.shape
    inner, outer = x.stride(1), x.stride(0)
    unit = 16 // x.element_size()
    if columns > 1 and inner != 1:
        why = "" if name == "d" else " (Hopper's FP8 tensor cores read K-major operands only)"
        raise _misplaced(x, f"{name} has strides {tuple(x.stride())}, expected inner stride 1{why}")
    if rows > 1 and columns > 0 and (outer % unit or outer < columns):
        want = f"a multiple of {unit} elements (16 bytes), at least {columns}"
        raise _misplaced(x, f"{name} has row stride {outer}, expected {want}")
    if x.data_ptr() % 16:
        got = f"an address that is {x.data_ptr() % 16} bytes past a multiple of 16"
        raise _misplaced(x, f"{name} starts at {got}, expected 16-byte alignment")


def _misplaced(x: torch.Tensor, complaint: str) -> InvalidInputError:
    if x.dtype == E4M3:
        remedy = "pass a copy, x.clone(memory_format=torch.contiguous_format), or of x.t() in the transposed forms"
    else:
        remedy = f"allocate it with torch.empty({tuple(x.shape)}, dtype={x.dtype})"
    return InvalidInputError(f"{complaint}: {remedy}")
