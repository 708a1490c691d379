"""Multiplications and casts as operators of PyTorch, torch.ops.deep_gemm: for torch.compile, torch.export and modes.

Each multiplication is there twice: `name` returns a new d, `name.out` writes into the d that it is given; both call the
function of that name, and take its arguments with the pairs taken apart: a, a_scales, b, b_scales. What of a d that it
made is not written (rows of groups that are not real) holds anything. Nobody has to call them: a function that PyTorch
traces or watches becomes its operator.

Source: https://docs.pytorch.org/docs/stable/library.html
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from . import gemm, problem, quantize
from .errors import InvalidInputError
from .runtime.guard import unwatched

NAMESPACE = "deep_gemm"
LIBRARY = library.Library(NAMESPACE, "DEF")
# Strides are part of an operand: scales of a are read along M. Older versions have a weaker word for that alone.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_TAGS = (torch.Tag.pt2_compliant_tag, _STRIDES)
_PAIRS = "Tensor a, Tensor a_scales, Tensor b, Tensor b_scales"
_RECIPES = "int[]? recipe=None, int[]? recipe_a=None, int[]? recipe_b=None"
_PSUM = "bool use_psum_layout=False, bool ensure_zero_padding=True"

Options = dict[str, Any]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an operator: `run` on every device, `fake` for tensors without values.

    PyTorch takes all operands for such if one is on the meta device, so devices are compared here.
    """

    def checked(*args: Any, **keywords: Any) -> Any:
        problem.check_devices(*args, *keywords.values())
        return fake(*args, **keywords)

    LIBRARY.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    library.register_fake(f"{NAMESPACE}::{name}", checked, lib=LIBRARY)


def _names(schema: str) -> list[str]:
    """Of an operator's arguments."""
    parsed = torch._C.parse_schema(schema)  # pyright: ignore
    return [argument.name for argument in parsed.arguments]


def _multiplication(
    call: Callable[..., None],
    arguments: str,
    result: Callable[[torch.Tensor, torch.Tensor, Options], torch.Tensor],
    flop: Callable[[Any, Any, Options], int],
) -> None:
    """Registers `call` of gemm.py, which has those arguments behind the pairs and d.

    result: makes d for a, b and the arguments. flop: how many operations there are, by the shapes of the same.
    """
    name = call.__name__
    schema = f"{name}({_PAIRS}, {arguments}"
    names = _names(f"{schema}) -> Tensor")

    def given(args: tuple[Any, ...], keywords: Options) -> Options:
        return dict(zip(names, args, strict=False)) | keywords

    def run(options: Options, d: torch.Tensor) -> None:
        a, a_scales, b, b_scales = (options.pop(each) for each in names[:4])
        with unwatched():
            call((a, a_scales), (b, b_scales), d, **options)

    def made(*args: Any, **keywords: Any) -> torch.Tensor:
        options = given(args, keywords)
        return result(options["a"], options["b"], options)

    def functional(*args: Any, **keywords: Any) -> torch.Tensor:
        d = made(*args, **keywords)
        run(given(args, keywords), d)
        return d

    def into(*args: Any, d: torch.Tensor, **keywords: Any) -> None:
        run(given(args, keywords), d)

    def counted(*args: Any, d: Any = None, out_shape: Any = None, **keywords: Any) -> int:
        options = given(args, keywords)
        return flop(options["a"], options["b"], options)

    define(f"{schema}) -> Tensor", functional, made)
    define(schema.replace(name, f"{name}.out") + ", *, Tensor(d!) d) -> ()", into, lambda *args, **keywords: None)
    register_flop_formula(getattr(torch.ops.deep_gemm, name))(counted)


def _dense(form: str) -> None:
    m, n = {"n": -2, "t": -1}[form[0]], {"t": -2, "n": -1}[form[1]]  # where a and b have them

    def result(a: torch.Tensor, b: torch.Tensor, options: Options) -> torch.Tensor:
        recipes = (options.get(name) for name in ("c", "recipe", "recipe_a", "recipe_b"))
        dtype = torch.float32 if problem.check_options(*recipes, compiled_dims="") else torch.bfloat16
        return a.new_empty((a.shape[m], b.shape[n]), dtype=dtype)

    def flop(a: Any, b: Any, options: Options) -> int:
        return 2 * a[0] * a[1] * b[n]

    _multiplication(getattr(gemm, f"fp8_gemm_{form}"), f"Tensor? c=None, {_RECIPES}", result, flop)


def _contiguous(form: str, more: str) -> None:
    n = {"t": -2, "n": -1}[form[1]]

    def result(a: torch.Tensor, b: torch.Tensor, options: Options) -> torch.Tensor:
        return a.new_empty((a.shape[0], b.shape[n]), dtype=torch.bfloat16)

    def flop(a: Any, b: Any, options: Options) -> int:
        return 2 * a[0] * a[1] * b[n]

    call = getattr(gemm, f"m_grouped_fp8_gemm_{form}_contiguous")
    _multiplication(call, f"Tensor grouped_layout, {_RECIPES}, {_PSUM}{more}", result, flop)


def _masked() -> None:
    def result(a: torch.Tensor, b: torch.Tensor, options: Options) -> torch.Tensor:
        return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=torch.bfloat16)

    def flop(a: Any, b: Any, options: Options) -> int:
        return 2 * a[0] * min(a[1], options["expected_m"]) * a[2] * b[1]

    call = gemm.m_grouped_fp8_gemm_nt_masked
    _multiplication(call, f"Tensor masked_m, SymInt expected_m, {_RECIPES}", result, flop)


def _k_grouped() -> None:
    def result(a: torch.Tensor, b: torch.Tensor, options: Options) -> torch.Tensor:
        ks, layout = options["ks_cpu"], options["grouped_layout"]
        if layout is None and ks is None:
            raise InvalidInputError(problem.NO_KS)
        groups = len(ks or ()) if layout is None else layout.shape[0]
        return a.new_empty((groups, options["a_scales"].shape[0], options["b_scales"].shape[0]), dtype=torch.float32)

    def flop(a: Any, b: Any, options: Options) -> int:
        return 2 * a[0] * options["b_scales"][0]

    arguments = "SymInt[]? ks_cpu, Tensor? grouped_layout, Tensor? c=None, int[] recipe=[1, 1, 128]"
    _multiplication(gemm.k_grouped_fp8_gemm_nt_contiguous, f"{arguments}, bool use_psum_layout=False", result, flop)


def _cast(call: Callable[..., Any], arguments: str, outputs: Callable[..., Any]) -> None:
    """Registers `call` of quantize.py. outputs: makes what it returns, not set, of the arguments that matter."""
    schema = f"{call.__name__}(Tensor x, {arguments}) -> (Tensor, Tensor)"
    names, matter = _names(schema), inspect.signature(outputs).parameters

    def run(*args: Any, **keywords: Any) -> Any:
        with unwatched():
            return call(*args, **keywords)

    def fake(*args: Any, **keywords: Any) -> Any:
        options = dict(zip(names, args, strict=False)) | keywords
        return outputs(**{name: value for name, value in options.items() if name in matter})

    define(schema, run, fake)


_POWERS = "bool use_ue8m0=False"
_GRANULARITY = f"{_POWERS}, int gran_k=128"
_PACKED = "bool use_packed_ue8m0=False"
_cast(quantize.per_token_cast_to_fp8, f"{_GRANULARITY}, {_PACKED}", quantize.outputs_of_per_token)
_cast(quantize.per_block_cast_to_fp8, _GRANULARITY, quantize.outputs_of_per_block)
_cast(quantize.per_channel_cast_to_fp8, _GRANULARITY, quantize.outputs_of_per_channel)
_cast(quantize.swiglu_cast_to_fp8, f"{_POWERS}, Tensor? masked_m=None", quantize.outputs_of_swiglu)
_GROUPS = "Tensor? starts=None, Tensor? sizes=None"
_cast(quantize.transposed_cast_of_groups, f"{_GROUPS}, {_POWERS}", quantize.outputs_of_groups)
for _form in ("nt", "nn", "tn", "tt"):
    _dense(_form)
_contiguous("nt", ", SymInt? expected_m_for_psum_layout=None")
_contiguous("nn", "")
_masked()
_k_grouped()
