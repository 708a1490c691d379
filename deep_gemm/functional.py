"""Linear layers in FP8 that can be trained, dense and of groups. Every multiplication, gradients too, is of gemm.py.

    y  = x @ w.T     x has a scale per 1x128 along K, w per 128x128           fp8_gemm_nt
    dx = dy @ w      dy per 1x128 along N, w per 128x128, transposed exactly  fp8_gemm_nt
    dw = dy.T @ x    both per 1x128 along the tokens, into FP32               fp8_gemm_nt with recipe (1, 1, 128)

Groups take the contiguous multiplication, and that which is grouped along K for dw. What is quantised is always the
tensor itself, once; a weight that is a float tensor is so in each call, forward and backward, and is never changed.

Forward and gradients are operators, torch.ops.deep_gemm.linear and so on: torch.compile and torch.export see each as
one. The gradient of what has requires_grad=False is not computed. Gradients of gradients raise NotImplementedError.
Under torch.autocast x is first converted to its dtype, as for torch.nn.functional.linear; nothing else changes.

Casts take an amax of at least 1e-4, so what of a gradient is below about 3e-9 loses bits, and is zero below 2e-10:
where a loss is a mean of very many tokens, multiply it, and divide what the optimizer gets, as for FP16.

Source: DeepSeek-V3 report (arXiv 2412.19437), section 3.3: which multiplications are in FP8, and what shares a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from . import gemm
from .errors import InvalidInputError
from .layout import align, ceil_div, get_mk_alignment_for_contiguous_layout
from .operators import LIBRARY, NAMESPACE, define
from .problem import E4M3, Pair, check_devices
from .quantize import per_block_cast_to_fp8, per_token_cast_to_fp8, swiglu_cast_to_fp8, transposed_cast_of_groups
from .runtime.guard import unwatched

Weight: TypeAlias = "torch.Tensor | Pair"

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROWS, COLUMNS = 8, 16  # what N and K are filled up with zeros to a multiple of
BLOCK = 128


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, multiplied in FP8.

    Args:
        x: BF16, FP16 or FP32 [.., K], any strides.
        weight: BF16, FP16 or FP32 [N, K], quantised in the call; it gets a gradient. Or a pair (values E4M3 [N, K],
            K-major; scales FP32 [ceil(N / 128), ceil(K / 128)]), which gets none.
        bias: any float dtype [N], or None.

    Result: [.., N] in x's dtype; the multiplication has rounded it to BF16, whatever that is. N that is no multiple of
    8 (16 for the gradient of x) and K that is none of 16 are filled up with zeros, which costs a copy. Gradients have
    the dtypes of what they belong to; the weight's is computed in FP32. What is below about 3e-9 in the result's
    gradient loses bits: multiply the loss, as for FP16.

    Raises: InvalidInputError; NotImplementedError for gradients of gradients; as `fp8_gemm_nt`.
    """
    values, scales = _weight(weight, 2)
    x = multiplied(x, values.shape[1])
    if bias is not None and not (isinstance(bias, torch.Tensor) and bias.shape == values.shape[:1]):
        got = f"has shape {tuple(bias.shape)}" if isinstance(bias, torch.Tensor) else f"is a {type(bias).__name__}"
        raise InvalidInputError(
            f"bias {got}, expected ({values.shape[0]},) for a weight of shape {tuple(values.shape)}: pass its own bias"
        )
    check_devices(x, values, scales, bias)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    y = torch.ops.deep_gemm.linear(rows, values, scales).view(*x.shape[:-1], values.shape[0])
    return y if bias is None else (y + bias).to(y.dtype)


def grouped_linear(x: torch.Tensor, weight: Weight, grouped_layout: torch.Tensor, swiglu: bool = False) -> torch.Tensor:
    """y[row] = x[row] @ weight[group of row].T, multiplied in FP8: the experts of a mixture.

    Args:
        x: BF16, FP16 or FP32 [M, K], rows of many groups, one group behind the other; with swiglu [M, 2 * K].
        weight: BF16, FP16 or FP32 [G, N, K], quantised in the call; it gets a gradient. Or a pair (values E4M3
            [G, N, K], K-major; scales FP32 [G, ceil(N / 128), ceil(K / 128)]), which gets none.
        grouped_layout: int32 [M], contiguous, on x's device, which alone reads it: the group of every row, ascending;
            -1 for padding. Groups start at multiples of `get_mk_alignment_for_contiguous_layout()`.
        swiglu: what is multiplied is silu(x[:, :K]) * x[:, K:], computed and quantised in FP32, in one go. The
            gradient computes it anew, so that x alone is kept.

    Result: [M, N] in x's dtype; padding rows are zeros. What x and the result's gradient hold in padding rows
    influences no gradient but those rows of x's, which are zeros where x is finite. Sizes and dtypes as in `linear`.

    Raises: as `linear`, and as `m_grouped_fp8_gemm_nt_contiguous`.
    """
    values, scales = _weight(weight, 3)
    x = multiplied(x, values.shape[2] * (2 if swiglu else 1))
    if x.dim() != 2:
        raise InvalidInputError(
            f"x has shape {tuple(x.shape)}, expected [M, K]: put the rows of all groups one behind the other"
        )
    if not isinstance(grouped_layout, torch.Tensor):
        raise InvalidInputError(
            f"grouped_layout is a {type(grouped_layout).__name__}, expected int32 [M]: pass the group of every row"
        )
    check_devices(x, values, scales, grouped_layout)
    return torch.ops.deep_gemm.grouped_linear(x, values, scales, grouped_layout, bool(swiglu))


def multiplied(x: torch.Tensor, k: int) -> torch.Tensor:
    """x, checked, in the dtype that autocast has it be multiplied in."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise InvalidInputError(f"x is {got}, expected a tensor of BF16, FP16 or FP32: call .float()")
    if x.dim() == 0 or x.shape[-1] != k:
        raise InvalidInputError(
            f"x has shape {tuple(x.shape)}, expected [.., {k}], as many columns as the weight multiplies: "
            "K is the last dimension of both"
        )
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _weight(weight: Weight, dims: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and scales, checked; of a float tensor itself, and None."""
    shape = "[N, K]" if dims == 2 else "[G, N, K]"
    pair = "a pair (values E4M3, scales FP32)"
    if isinstance(weight, torch.Tensor):
        if weight.dtype not in FLOATS or weight.dim() != dims:
            remedy = "pass (values, scales)" if weight.dtype == E4M3 else "call .float()"
            raise InvalidInputError(
                f"weight is {weight.dtype} of shape {tuple(weight.shape)}, expected BF16, FP16 or FP32 {shape}, "
                f"or {pair}: {remedy}"
            )
        return weight, None
    if (
        not isinstance(weight, (tuple, list))
        or len(weight) != 2
        or not all(isinstance(w, torch.Tensor) for w in weight)
    ):
        raise InvalidInputError(
            f"weight is a {type(weight).__name__}, expected a float tensor {shape} or {pair}: "
            "call per_block_cast_to_fp8(weight)"
        )
    values, scales = weight
    want = (*values.shape[:-2], *(ceil_div(int(size), BLOCK) for size in values.shape[-2:]))
    if values.dtype != E4M3 or values.dim() != dims or scales.dtype != torch.float32 or scales.shape != want:
        raise InvalidInputError(
            f"weight is ({values.dtype} of shape {tuple(values.shape)}, {scales.dtype} of shape {tuple(scales.shape)}),"
            f" expected (E4M3 {shape}, FP32 with a scale per 128x128): call per_block_cast_to_fp8(weight)"
        )
    return values, scales


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[.., :I]) * x[.., I:] in FP32, of [.., 2 * I], any float dtype."""
    gate, up = x.float().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _silu_and_mul_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    sigmoid, dy = gate.sigmoid(), dy.float()
    return torch.cat((dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid), -1).to(x.dtype)


def filled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """x [.., R, C] with zeros behind, up to multiples of rows and columns; x itself where nothing is missing."""
    missing = (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows)
    if not any(missing):
        return x
    if x.dtype == E4M3:  # which PyTorch does not fill up
        return torch.nn.functional.pad(x.view(torch.uint8), missing).view(E4M3)
    return torch.nn.functional.pad(x, missing)


def activations(x: torch.Tensor, swiglu: bool = False) -> Pair:
    """x [.., M, K] as the a of a multiplication, K filled up; with swiglu, silu_and_mul of x [.., M, 2 * K]."""
    values, scales = swiglu_cast_to_fp8(x) if swiglu else per_token_cast_to_fp8(x)
    return filled(values, 1, COLUMNS), scales


def weights(weight: torch.Tensor, scales: torch.Tensor | None, transposed: bool = False) -> Pair:
    """weight [.., N, K] as the b of a multiplication, filled up; transposed: its [.., K, N].

    A block of 128x128 stays one when values and scales are transposed: nothing is rounded again.
    """
    if transposed:
        weight, scales = weight.mT, None if scales is None else scales.mT
    weight = filled(weight, ROWS, COLUMNS)
    if scales is None:
        return per_block_cast_to_fp8(weight)
    return weight.contiguous() if transposed else weight, scales


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    layout: torch.Tensor | None = None,
    swiglu: bool = False,
    transposed: bool = False,
) -> torch.Tensor:
    """Every row of x times the weight of its group, or times its transpose, for gradients of x."""
    n = weight.shape[-1 if transposed else -2]
    if 0 in (x.shape[0], *weight.shape):
        return x.new_zeros(x.shape[0], n)
    a, b = activations(x, swiglu), weights(weight, scales, transposed)
    d = x.new_empty(x.shape[0], b[0].shape[-2], dtype=torch.bfloat16)
    if layout is None:
        gemm.fp8_gemm_nt(a, b, d)
    else:
        gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)
    return d[:, :n].to(x.dtype).contiguous()


def _dgrad(
    dy: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, layout: torch.Tensor | None = None
) -> torch.Tensor:
    return _product(dy, weight, scales, layout, transposed=True)


def _wgrad(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n, k = dy.shape[1], x.shape[1]
    if 0 in (*dy.shape, k):
        return dy.new_zeros(n, k, dtype=dtype)
    a, b = (per_token_cast_to_fp8(each.mT) for each in (filled(dy, COLUMNS, 1), filled(x, COLUMNS, ROWS)))
    d = dy.new_empty(n, b[0].shape[0], dtype=torch.float32)
    gemm.fp8_gemm_nt(a, b, d, recipe=(1, 1, BLOCK))
    return d[:, :k].to(dtype).contiguous()


def _grouped_wgrad(
    dy: torch.Tensor, x: torch.Tensor, layout: torch.Tensor, groups: int, swiglu: bool, dtype: torch.dtype
) -> torch.Tensor:
    x = silu_and_mul(x) if swiglu else x
    n, k = dy.shape[1], x.shape[1]
    if 0 in (*dy.shape, k, groups):
        return dy.new_zeros(groups, n, k, dtype=dtype)
    if get_mk_alignment_for_contiguous_layout() % BLOCK:
        rows, layout = _apart(layout, groups)
        dy, x = (each.index_select(0, rows) for each in (dy, x))
    real = ((layout >= 0) & (layout < groups))[:, None]
    starts, sizes, ks = _blocks(layout, groups)
    a, b = (
        transposed_cast_of_groups(filled(torch.where(real, each, 0), BLOCK, COLUMNS), starts, sizes) for each in (dy, x)
    )
    d = dy.new_empty(groups, a[1].shape[0], b[1].shape[0], dtype=torch.float32)
    gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, None, ks)
    return d[:, :n, :k].to(dtype).contiguous()


def _first_rows(layout: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every group the first row of it or of a later one, and the row behind the last of it or of an earlier one."""
    real = (layout >= 0) & (layout < groups)
    ids = torch.arange(groups, dtype=layout.dtype, device=layout.device)
    so_far = torch.where(real, layout, -1).cummax(0).values
    from_here = torch.where(real, layout, groups).flip(0).cummin(0).values.flip(0)
    return torch.searchsorted(so_far, ids), torch.searchsorted(from_here, ids, right=True)


def _blocks(layout: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every 128 rows the first row of their group, and how many it has; and how many every group has: int32.

    Groups start at multiples of 128 and go on to where the next one starts, so that K has no gaps; what is behind the
    last row of all is nobody's.
    """
    first, behind = _first_rows(layout, groups)
    end = (behind[-1:] + BLOCK - 1) // BLOCK * BLOCK
    # A group's first row may be padding; where no group follows, first is behind the last row, and that anywhere.
    starts = torch.where(first[1:] < layout.shape[0], first[1:] // BLOCK * BLOCK, end)
    bounds = torch.cat((torch.zeros_like(end), torch.minimum(starts, end), end))
    ks = bounds.diff()
    row = torch.arange(0, layout.shape[0], BLOCK, device=layout.device)
    group = torch.searchsorted(bounds[1:], row, right=True)
    own, group = group < groups, group.clamp_max(groups - 1)
    return bounds[group].int(), torch.where(own, ks[group], 0).int(), ks.int()


def _apart(layout: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to pick so that groups start at multiples of 128, where they do not, and the layout that these have."""
    m = layout.shape[0]
    first, behind = _first_rows(layout, groups)
    sizes = ((behind - first).clamp_min(0) + BLOCK - 1) // BLOCK * BLOCK
    ends = sizes.cumsum(0)
    half_blocks = min(groups, ceil_div(m, BLOCK // 2))  # at most one for each group that has rows
    at = torch.arange(align(m + half_blocks * (BLOCK // 2), BLOCK), device=layout.device)
    group = torch.searchsorted(ends, at, right=True)
    own, group = group < groups, group.clamp_max(groups - 1)
    rows = at - (ends - sizes)[group] + first[group]
    own &= rows < m
    rows = torch.where(own, rows, 0)
    return rows, torch.where(own & (layout[rows] == group), group, -1).int()


def _define(
    schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor], flop: Callable[..., int]
) -> None:
    """flop: how many operations there are, of shapes in place of tensors."""

    def within(*args: Any) -> torch.Tensor:
        with unwatched():
            return run(*args)

    def counted(*args: Any, out_shape: Any = None) -> int:
        return flop(*args)

    define(schema, within, fake)
    register_flop_formula(getattr(torch.ops.deep_gemm, schema.partition("(")[0]))(counted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Of x, weight, scales and a layout what the gradients need that are asked for."""
    x, weight, scales, layout, swiglu = inputs if len(inputs) == 5 else (*inputs, None, False)
    by_x, by_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and scales is None
    ctx.swiglu, ctx.groups, ctx.dtype = swiglu, weight.shape[0], weight.dtype
    ctx.is_frozen = scales is not None
    ctx.save_for_backward(
        x if by_weight or (by_x and swiglu) else None, *((weight, scales) if by_x else (None, None)), layout
    )


def _linear_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scales, _ = ctx.saved_tensors
    by_x, by_weight, *_ = ctx.needs_input_grad
    dx = torch.ops.deep_gemm.linear_dgrad(dy, weight, scales) if by_x else None
    dw = torch.ops.deep_gemm.linear_wgrad(dy, x, ctx.dtype) if by_weight and not ctx.is_frozen else None
    return dx, dw, None


def _grouped_linear_gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, scales, layout = ctx.saved_tensors
    by_x, by_weight, *_ = ctx.needs_input_grad
    dx = dw = None
    if by_x:
        dx = torch.ops.deep_gemm.grouped_linear_dgrad(dy, weight, scales, layout)
        dx = _silu_and_mul_gradient(dx, x) if ctx.swiglu else dx
    if by_weight and not ctx.is_frozen:
        options = ctx.groups, ctx.swiglu, ctx.dtype
        dw = torch.ops.deep_gemm.grouped_linear_wgrad(dy, x, layout, *options)
    return dx, dw, None, None, None


def _no_gradients(ctx: Any, *gradients: torch.Tensor) -> None:
    raise NotImplementedError(
        "gradients of gradients of FP8 layers are not offered: leave out create_graph=True, "
        "or use torch.nn.functional.linear where they are needed"
    )


def _made(n: int) -> Callable[..., torch.Tensor]:
    """The result of a product whose columns are dimension n of the weight."""

    def made(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[n])

    return made


def _made_wgrad(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


def _made_grouped_wgrad(
    dy: torch.Tensor, x: torch.Tensor, layout: torch.Tensor, groups: int, swiglu: bool, dtype: torch.dtype
) -> torch.Tensor:
    return dy.new_empty(groups, dy.shape[1], x.shape[1] // (2 if swiglu else 1), dtype=dtype)


def _flop(x: Any, weight: Any, *rest: Any) -> int:
    return 2 * x[0] * weight[-2] * weight[-1]


def _wgrad_flop(dy: Any, x: Any, *rest: Any) -> int:
    swiglu = len(rest) > 1 and rest[2]
    return 2 * dy[0] * dy[1] * x[1] // (2 if swiglu else 1)


_define("linear(Tensor x, Tensor weight, Tensor? scales) -> Tensor", _product, _made(-2), _flop)
_define("linear_dgrad(Tensor dy, Tensor weight, Tensor? scales) -> Tensor", _dgrad, _made(-1), _flop)
_define("linear_wgrad(Tensor dy, Tensor x, ScalarType dtype) -> Tensor", _wgrad, _made_wgrad, _wgrad_flop)
_define(
    "grouped_linear(Tensor x, Tensor weight, Tensor? scales, Tensor grouped_layout, bool swiglu) -> Tensor",
    _product,
    _made(-2),
    _flop,
)
_define(
    "grouped_linear_dgrad(Tensor dy, Tensor weight, Tensor? scales, Tensor grouped_layout) -> Tensor",
    _dgrad,
    _made(-1),
    _flop,
)
_define(
    "grouped_linear_wgrad"
    "(Tensor dy, Tensor x, Tensor grouped_layout, SymInt groups, bool swiglu, ScalarType dtype) -> Tensor",
    _grouped_wgrad,
    _made_grouped_wgrad,
    _wgrad_flop,
)
for _name, _gradients, _setup in (
    ("linear", _linear_gradients, _save),
    ("grouped_linear", _grouped_linear_gradients, _save),
    ("linear_dgrad", _no_gradients, None),
    ("linear_wgrad", _no_gradients, None),
    ("grouped_linear_dgrad", _no_gradients, None),
    ("grouped_linear_wgrad", _no_gradients, None),
):
    library.register_autograd(f"{NAMESPACE}::{_name}", _gradients, setup_context=_setup, lib=LIBRARY)
