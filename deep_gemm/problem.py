"""What is to be multiplied: the description of one problem, and the only place where a user's input is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import InvalidInputError
from .layout import ceil_div, is_whole

E4M3 = torch.float8_e4m3fn
Pair = tuple[torch.Tensor, torch.Tensor]


class Kind(IntEnum):
    """How rows, or columns along K, belong to groups. `enum Kind` of kernels/scheduler.cuh, and explained there."""

    DENSE = 0
    CONTIGUOUS = 1
    ENDS = 2
    MASKED = 3
    K_GROUPED = 4
    K_ENDS = 5


@dataclass(frozen=True)
class Problem:
    """d[m, n] = a[m, k] @ b[n, k].T, with scales per 1x128 of a and per 128x128 of b; or many such, one per group.

    Attributes:
        m: rows of d; of each group's d where groups have their own.
        k: columns of a; of all groups together where they are grouped along K.
        expected_m: rows that a group probably has, where the device alone knows; a hint, for the planner.
        alignment: what a group's first row (or column, along K) is a multiple of.
        column_scales: b has scales per 1x128 as well, and d is FP32.
    """

    m: int
    n: int
    k: int
    kind: Kind = Kind.DENSE
    groups: int = 1
    expected_m: int | None = None
    alignment: int = 1
    column_scales: bool = False

    @property
    def k_blocks(self) -> int:
        return ceil_div(self.k, 128)

    @property
    def rows(self) -> int:
        """Of a, in all groups; what is expected where the device alone knows."""
        if self.kind == Kind.MASKED or (self.kind == Kind.ENDS and self.expected_m is not None):
            return self.groups * min(self.m if self.expected_m is None else self.expected_m, self.m)
        return self.m

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.n * self.k

    @property
    def bytes(self) -> int:
        """Every operand read once, the result written once."""
        return self.bytes_of(self.rows)

    def bytes_of(self, rows: Any) -> Any:
        """The same if there were so many rows (a number, or an array of them)."""
        along_k = self.kind in (Kind.K_GROUPED, Kind.K_ENDS)
        weights, results = (1, self.groups) if along_k else (self.groups, 1)
        scale_rows = self.n if self.column_scales else ceil_div(self.n, 128)
        scales = 4 * self.k_blocks * (rows + weights * scale_rows)
        result = (8 if self.column_scales else 2) * results * rows * self.n
        return (rows + weights * self.n) * self.k + result + scales

    @property
    def is_empty(self) -> bool:
        return self.m == 0 or self.n == 0 or self.groups == 0


class Problems:
    """A problem; or many that differ from it alone in how many rows there are, or are expected where there is a hint.

    counts: m of each, or expected_m. m, rows, bytes: as of Problem, a column of them; contiguous groups fill rows up to
    the next multiple of their alignment, and bytes are floats, for they may pass 2^63.
    """

    def __init__(self, like: Problem, counts: Any = None) -> None:
        self.like = like
        m, rows = np.array([[like.m]]), np.array([[like.rows]])
        if counts is not None:
            column = np.reshape(counts, (-1, 1))
            if like.expected_m is None:
                m, rows = column, column * (like.rows // like.m)
            else:
                m, rows = m * np.ones_like(column), like.groups * np.minimum(column, like.m)
        if like.kind == Kind.CONTIGUOUS:
            m = rows = -(-m // like.alignment) * like.alignment
        self.m, self.rows, self.bytes = m, rows, like.bytes_of(rows.astype(float))


class Operands(NamedTuple):
    """Checked. For every kind: a, b E4M3; a_scales, b_scales FP32; d BF16, or FP32 with column scales.

    kind           a, a_scales                b, b_scales                      d           layout
    DENSE          [M, K], [M, K / 128]       [N, K], [N / 128, K / 128]       [M, N]      None
    CONTIGUOUS     [M, K], [M, K / 128]       [G, N, K], [G, N / 128, K / 128] [M, N]      [M]
    ENDS           the same                   the same                         the same    [G]
    MASKED         [G, M, K], [G, M, K / 128] the same                         [G, M, N]   [G]
    K_GROUPED, -   [K * M], [M, K / 128]      [K * N], [N, K / 128]            [G, M, N]   [G]

    layout: int32. c: what is added to an FP32 d, of its shape; None: nothing. clear_padding: padding rows become zeros.
    """

    a: torch.Tensor
    a_scales: torch.Tensor
    b: torch.Tensor
    b_scales: torch.Tensor
    d: torch.Tensor
    layout: torch.Tensor | None = None
    c: torch.Tensor | None = None
    clear_padding: bool = False


NO_KS = "ks_cpu and grouped_layout are None, expected at least one: the K of every group"
TOKEN, BLOCK = "per_token_cast_to_fp8", "per_block_cast_to_fp8"


def dense(
    a: Pair, b: Pair, d: torch.Tensor, c: torch.Tensor | None = None, column_scales: bool = False
) -> tuple[Problem, Operands]:
    """Checks the operands of a dense multiplication.

    Raises: InvalidInputError, which says what came, what was expected and what to do.
    """
    flatten = "expected 2 for a dense GEMM: flatten the leading ones with .view()"
    b_cast = TOKEN if column_scales else BLOCK
    a_values, a_scales = _pair("a", a, TOKEN, 2, flatten)
    b_values, b_scales = _pair("b", b, b_cast, 2, flatten)
    (m, k), (n, k_of_b) = a_values.shape, b_values.shape
    dtype = torch.float32 if column_scales else torch.bfloat16
    _result("d", d, dtype, (m, n), flatten)
    if k != k_of_b:
        raise InvalidInputError(
            f"b has shape {_shape(b_values)}, expected (N, {k}) for a of shape {_shape(a_values)}: "
            "K must agree, and both are K-major"
        )
    _fits(d, m, n)
    check_shape(m, n, k)
    problem = Problem(m, n, k, column_scales=column_scales)
    _scales("a", a_scales, a_values, (m, problem.k_blocks), TOKEN)
    _scales("b", b_scales, b_values, (n if column_scales else ceil_div(n, 128), problem.k_blocks), b_cast)
    _addend(c, d)
    _laid_out(a_values, b_values, d)
    return problem, _on_one_device(Operands(a_values, a_scales, b_values, b_scales, d, c=c))


def contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    layout: torch.Tensor,
    ends: bool,
    alignment: int,
    expected_m: int | None,
    clear_padding: bool,
) -> tuple[Problem, Operands]:
    """Checks the operands of a multiplication whose groups are rows of one a. Raises: InvalidInputError."""
    _flag("use_psum_layout", ends)
    _flag("ensure_zero_padding", clear_padding)
    a_values, a_scales = _pair("a", a, TOKEN, 2, "expected 2 ([M, K]): put the rows of all groups one behind the other")
    b_values, b_scales = _pair("b", b, BLOCK, 3, "expected 3 ([G, N, K]): stack the groups' weights")
    (m, k), (groups, n, _) = a_values.shape, b_values.shape
    _result("d", d, torch.bfloat16, (m, n), "expected 2 ([M, N]): the rows of all groups, one behind the other")
    _same_k(a_values, b_values)
    _fits(d, m, n)
    _indices(
        "grouped_layout", layout, groups if ends else m, "the end of every group" if ends else "the group of every row"
    )
    if expected_m is not None and not (is_whole(expected_m) and expected_m >= 0):
        raise InvalidInputError(
            f"expected_m_for_psum_layout is {expected_m!r}, expected a whole number or None: it is a hint"
        )
    check_shape(m, n, k, groups)
    kind = Kind.ENDS if ends else Kind.CONTIGUOUS
    expected = max(int(expected_m), 1) if ends and expected_m is not None else None
    problem = Problem(m, n, k, kind, groups, expected, alignment)
    _scales("a", a_scales, a_values, (m, problem.k_blocks), TOKEN)
    _scales("b", b_scales, b_values, (groups, ceil_div(n, 128), problem.k_blocks), BLOCK)
    _laid_out(a_values, b_values, d)
    return problem, _on_one_device(
        Operands(a_values, a_scales, b_values, b_scales, d, layout, clear_padding=bool(clear_padding))
    )


def masked(a: Pair, b: Pair, d: torch.Tensor, masked_m: torch.Tensor, expected_m: int) -> tuple[Problem, Operands]:
    """Checks the operands of a multiplication whose groups have an a of their own. Raises: InvalidInputError."""
    stack = "stack what belongs to each group"
    a_values, a_scales = _pair("a", a, TOKEN, 3, f"expected 3 ([G, max_m, K]): {stack}")
    b_values, b_scales = _pair("b", b, BLOCK, 3, f"expected 3 ([G, N, K]): {stack}")
    (groups, m, k), (_, n, _) = a_values.shape, b_values.shape
    _result("d", d, torch.bfloat16, (groups, m, n), f"expected 3 ([G, max_m, N]): {stack}")
    _same_k(a_values, b_values)
    if b_values.shape[0] != groups or d.shape != (groups, m, n):
        raise InvalidInputError(
            f"a, b and d have shapes {_shape(a_values)}, {_shape(b_values)} and {_shape(d)}, "
            "expected [G, max_m, K], [G, N, K] and [G, max_m, N]: G, max_m and N must agree"
        )
    _indices("masked_m", masked_m, groups, "how many rows of every group are real")
    if not (is_whole(expected_m) and expected_m >= 0):
        raise InvalidInputError(
            f"expected_m is {expected_m!r}, expected a whole number: about how many rows a group has; it is a hint"
        )
    check_shape(m, n, k, groups)
    problem = Problem(m, n, k, Kind.MASKED, groups, min(max(int(expected_m), 1), m))
    _scales("a", a_scales, a_values, (groups, m, problem.k_blocks), TOKEN)
    _scales("b", b_scales, b_values, (groups, ceil_div(n, 128), problem.k_blocks), BLOCK)
    _laid_out(a_values, b_values, d)
    return problem, _on_one_device(Operands(a_values, a_scales, b_values, b_scales, d, masked_m))


def k_grouped(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    ks: Sequence[int] | None,
    layout: torch.Tensor | None,
    c: torch.Tensor | None,
    ends: bool,
    alignment: int,
) -> tuple[Problem, Operands]:
    """Checks the operands of a multiplication that is grouped along K. Raises: InvalidInputError."""
    _flag("use_psum_layout", ends)
    flat = "expected 1 ([sum(K) * M]): for every group [M, K] of its own, flattened, one behind the other"
    a_values, a_scales = _pair("a", a, "per_channel_cast_to_fp8", 1, flat, 2)
    b_values, b_scales = _pair("b", b, "per_channel_cast_to_fp8", 1, flat, 2)
    _result("d", d, torch.float32, ("G", "M", "N"), "expected 3 ([G, M, N]): one result for each group")
    groups, m, n = d.shape
    if ks is None and layout is None:
        raise InvalidInputError(NO_KS)
    if ks is not None:
        _check_ks(ks, groups)
        ks = [int(k) for k in ks]  # NumPy's would overflow in a sum
    if ends and alignment % 128:
        raise InvalidInputError(
            f"the alignment is {alignment}, expected a multiple of 128 along K: "
            "call set_mk_alignment_for_contiguous_layout(128)"
        )
    size = a_values.numel() // m if m else b_values.numel() // n if n else 0
    if a_values.numel() != size * m or (n and b_values.numel() != size * n):
        raise InvalidInputError(
            f"a and b have {a_values.numel()} and {b_values.numel()} values, expected sum(K) * {m} and sum(K) * {n} "
            f"for d of shape {_shape(d)}: flatten every group's [M, K] and [N, K], one behind the other"
        )
    if size % 128:
        raise InvalidInputError(f"sum(K) is {size}, expected a multiple of 128: pad every group with zeros")
    if ks is not None and not ends and sum(ks) != size:
        raise InvalidInputError(
            f"the sum of ks_cpu is {sum(ks)}, expected {size}, for a of {a_values.numel()} values and M of {m}"
        )
    if layout is None:
        assert ks is not None
        if ends:
            raise InvalidInputError("grouped_layout is None, expected the running ends: pass them, int32 [G]")
        if d.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidInputError(
                "grouped_layout is None while a CUDA graph is captured, expected int32 [G] on the device: "
                "make it from ks_cpu before the capture"
            )
        layout = torch.tensor(ks, dtype=torch.int32, device=d.device)
    _indices("grouped_layout", layout, groups, "the end of every group along K" if ends else "the K of every group")
    check_shape(m, n, max(size, 128), groups)
    problem = Problem(
        m,
        n,
        size,
        Kind.K_ENDS if ends else Kind.K_GROUPED,
        groups,
        alignment=alignment if ends else 128,
        column_scales=True,
    )
    _scales("a", a_scales, a_values, (m, problem.k_blocks), "per_channel_cast_to_fp8")
    _scales("b", b_scales, b_values, (n, problem.k_blocks), "per_channel_cast_to_fp8")
    for name, x in (("a", a_values), ("b", b_values)):
        if not x.is_contiguous() or (x.numel() and x.data_ptr() % 16):
            got = f"{name} has strides {tuple(x.stride())} and starts at {x.data_ptr():#x}"
            raise _misplaced(x, f"{got}, expected contiguous values on 16 bytes")
    _addend(c, d)
    _row_major("d", d)
    return problem, _on_one_device(Operands(a_values, a_scales, b_values, b_scales, d, layout, c))


def _check_ks(ks: Sequence[int], groups: int) -> None:
    if not isinstance(ks, Sequence) or not all(map(is_whole, ks)) or len(ks) != groups:
        raise InvalidInputError(
            f"ks_cpu is {ks!r}, expected a list of {groups} whole numbers, one for each group of d: call .tolist()"
        )
    if any(k < 0 or k % 128 for k in ks):
        raise InvalidInputError(f"ks_cpu is {ks}, expected multiples of 128: pad every group with zeros")


def check_shape(m: int, n: int, k: int, groups: int = 1) -> None:
    """Checks what the copy engine and the tensor cores ask of M, N and K.

    Raises: InvalidInputError.
    """
    if max(m, n, k, groups) >= 2**31:
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
    dense: bool = True,
) -> bool:
    """Whether b has scales per 1x128, recipe (1, 1, 128), which a dense multiplication alone may have.

    Raises: InvalidInputError for what goes neither with that nor with block scales, recipe (1, 128, 128).
    """
    _check_compiled_dims(compiled_dims)
    column_scales = dense and (_is(recipe, (1, 1, 128)) or (recipe is None and _is(recipe_b, (1, 128))))
    for name, got, want in (
        ("recipe", recipe, (1, 1, 128) if column_scales else (1, 128, 128)),
        ("recipe_a", recipe_a, (1, 128)),
        ("recipe_b", recipe_b, (1, 128) if column_scales else (128, 128)),
    ):
        if got is not None and not _is(got, want):
            remedy = "quantise a per 1x128 and b per " + ("1x128" if column_scales else "128x128")
            raise InvalidInputError(f"{name} is {got}, expected {want} or None: {remedy}")
    if c is not None and not column_scales:
        raise InvalidInputError(
            "c was given, expected None: with block scales nothing is accumulated into d; add c afterwards"
        )
    return column_scales


def check_k_grouped_options(recipe: Sequence[int], compiled_dims: str) -> None:
    """Checks what goes with groups along K. Raises: InvalidInputError."""
    _check_compiled_dims(compiled_dims)
    if not _is(recipe, (1, 1, 128)):
        remedy = "quantise a and b with per_channel_cast_to_fp8"
        raise InvalidInputError(f"recipe is {recipe}, expected (1, 1, 128): {remedy}")


def _check_compiled_dims(compiled_dims: str) -> None:
    if not isinstance(compiled_dims, str) or not set(compiled_dims) <= set("mnk"):
        raise InvalidInputError(
            f"compiled_dims is {compiled_dims!r}, expected letters out of 'mnk': "
            "it is a hint, and one kernel serves every shape"
        )


def _is(recipe: Sequence[int] | None, want: tuple[int, ...]) -> bool:
    return isinstance(recipe, Sequence) and all(is_whole(x) for x in recipe) and tuple(recipe) == want


def _flag(name: str, x: object) -> None:
    if not isinstance(x, (bool, int)):
        raise InvalidInputError(f"{name} is {_kind(x)}, expected True or False: pass options by keyword")


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _pair(name: str, pair: Pair, cast: str, dims: int, expected: str, scale_dims: int | None = None) -> Pair:
    values, scales = apart(name, pair, cast)
    _tensor(f"{name} values", values, E4M3, dims, f"call {cast}({name})", expected)
    packed = getattr(scales, "dtype", None) == torch.int32
    remedy = "packed UE8M0 scales are for Blackwell" if packed else f"call {cast}({name})"
    scale_dims = scale_dims or dims
    _tensor(
        f"{name} scales",
        scales,
        torch.float32,
        scale_dims,
        remedy,
        expected if scale_dims == dims else f"expected {scale_dims}: {remedy}",
    )
    return values, scales


def apart(name: str, pair: Pair, cast: str = TOKEN) -> Pair:
    """Values and scales. Raises: InvalidInputError for what is no pair."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidInputError(f"{name} is {_kind(pair)}, expected a pair (values, scales): call {cast}({name})")
    return pair[0], pair[1]


def _kind(x: object) -> str:
    return f"a {type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else f"a {type(x).__name__}"


def _tensor(name: str, x: object, dtype: torch.dtype, dims: int, remedy: str, expected: str) -> None:
    """`expected`: how many dimensions, and what to do if there are others."""
    if not isinstance(x, torch.Tensor):
        raise InvalidInputError(f"{name} is a {type(x).__name__}, expected a torch.Tensor of {dtype}: {remedy}")
    if x.dtype != dtype:
        raise InvalidInputError(f"{name} has dtype {x.dtype}, expected {dtype}: {remedy}")
    if x.layout != torch.strided:
        raise InvalidInputError(f"{name} has layout {x.layout}, expected torch.strided: call .to_dense()")
    if x.is_neg():
        raise InvalidInputError(f"{name} is a view that negates its memory, expected the values: call .resolve_neg()")
    if x.dim() != dims:
        raise InvalidInputError(f"{name} has {x.dim()} dimensions, {expected}")


def _result(name: str, d: object, dtype: torch.dtype, shape: tuple[object, ...], expected: str) -> None:
    wanted = f"({', '.join(map(str, shape))})"
    _tensor(name, d, dtype, len(shape), f"allocate it with torch.empty({wanted}, dtype={dtype})", expected)


def _fits(d: torch.Tensor, m: int, n: int) -> None:
    if d.shape != (m, n):
        raise InvalidInputError(
            f"d has shape {_shape(d)}, expected ({m}, {n}), M of a and N of b: "
            f"allocate it with torch.empty(({m}, {n}), dtype={d.dtype})"
        )


def _same_k(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise InvalidInputError(
            f"b has shape {_shape(b)}, expected (G, N, {a.shape[-1]}) for a of shape {_shape(a)}: "
            "K must agree, and both are K-major"
        )


def _indices(name: str, x: object, count: int, meaning: str) -> None:
    got = f"{x.dtype} of shape {_shape(x)}, strides {x.stride()}" if isinstance(x, torch.Tensor) else _kind(x)
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int32 or x.shape != (count,) or not x.is_contiguous():
        raise InvalidInputError(
            f"{name} is {got}, expected torch.int32 of shape ({count},), contiguous, {meaning}: "
            "use .to(torch.int32).contiguous()"
        )


def _addend(c: torch.Tensor | None, d: torch.Tensor) -> None:
    if c is None:
        return
    if not isinstance(c, torch.Tensor) or c.dtype != d.dtype or c.shape != d.shape or c.layout != torch.strided:
        got = f"{c.dtype} of shape {_shape(c)}" if isinstance(c, torch.Tensor) else _kind(c)
        raise InvalidInputError(
            f"c is {got}, expected {d.dtype} of shape {_shape(d)}, or None: pass d itself to add to it"
        )
    if c.is_neg():
        raise InvalidInputError("c is a view that negates its memory, expected the values: call .resolve_neg()")


def _scales(name: str, scales: torch.Tensor, values: torch.Tensor, want: tuple[int, ...], cast: str) -> None:
    if scales.shape != want:
        raise InvalidInputError(
            f"{name} scales have shape {_shape(scales)}, expected {want} for {name} of shape {_shape(values)}: "
            f"call {cast}({name})"
        )


def _laid_out(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
    _row_major("a", a)
    _row_major("b", b)
    _row_major("d", d)


def _row_major(name: str, x: torch.Tensor) -> None:
    """What the copy engine asks for: inner stride 1; rows, groups and base on 16 bytes; nothing that overlaps."""
    *groups, rows, columns = x.shape
    inner, outer = x.stride(-1), x.stride(-2)
    unit = 16 // x.element_size()
    if columns > 1 and inner != 1:
        why = "" if name == "d" else " (Hopper's FP8 tensor cores read K-major operands only)"
        raise _misplaced(x, f"{name} has strides {tuple(x.stride())}, expected inner stride 1{why}")
    if rows > 1 and columns > 0 and (outer % unit or outer < columns):
        want = f"a multiple of {unit} elements (16 bytes), at least {columns}"
        raise _misplaced(x, f"{name} has row stride {outer}, expected {want}")
    if groups and groups[0] > 1 and rows > 0 and columns > 0:
        apart = x.stride(0)
        outer = max(outer, columns)
        overlaps = apart < (rows - 1) * outer + columns and (
            apart < columns or outer < (groups[0] - 1) * apart + columns
        )
        if apart % unit or (overlaps and rows > 1) or apart < columns:
            want = f"a multiple of {unit} elements (16 bytes), and no overlap of groups"
            raise _misplaced(x, f"{name} has group stride {apart}, expected {want}")
    if x.numel() and x.data_ptr() % 16:
        got = f"an address that is {x.data_ptr() % 16} bytes past a multiple of 16"
        raise _misplaced(x, f"{name} starts at {got}, expected 16-byte alignment")


def _misplaced(x: torch.Tensor, complaint: str) -> InvalidInputError:
    if x.dtype == E4M3:
        remedy = "pass a copy, x.clone(memory_format=torch.contiguous_format), or of x.t() in the transposed forms"
    else:
        remedy = f"allocate it with torch.empty({tuple(x.shape)}, dtype={x.dtype})"
    return InvalidInputError(f"{complaint}: {remedy}")


def check_devices(*things: Any) -> None:
    """Raises InvalidInputError where the tensors among the things are not all on one device."""
    devices = {x.device for x in things if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        got = ", ".join(sorted(map(str, devices)))
        raise InvalidInputError(f"the operands are on {got}, expected one device: move them with .to()")


def _on_one_device(o: Operands) -> Operands:
    device = o.d.device
    check_devices(*o)
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(
            f"the operands are on {device}, expected a CUDA or the CPU device: move them with .to()"
        )
    for name, x in zip(o._fields, o, strict=True):
        if isinstance(x, torch.Tensor) and x.numel() and not (x.data_ptr() and x.untyped_storage().nbytes()):
            raise InvalidInputError(
                f"{name} of shape {_shape(x)} has no memory, expected a tensor that holds values: its storage was freed"
            )
    return o
