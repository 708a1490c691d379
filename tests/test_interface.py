"""Every name that clients know, where they look for it, and how they call it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import deep_gemm
from deep_gemm import compat, testing, utils

RECIPES = "recipe=None, recipe_a=None, recipe_b=None"
DENSE = f"a, b, d, c=None, {RECIPES}, compiled_dims={{}}, disable_ue8m0_cast=False".format
CONTIGUOUS = (
    f"a, b, d, grouped_layout, {RECIPES}, compiled_dims='nk', disable_ue8m0_cast=False, "
    "use_psum_layout=False, ensure_zero_padding=True"
)
GEMMS = {
    "gemm_fp8_fp8_bf16_nt": "lhs, rhs, out",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous": "lhs, rhs, out, m_indices",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked": "lhs, rhs, out, masked_m, expected_m",
    "fp8_gemm_nt": DENSE("'nk'"),
    "fp8_gemm_nn": DENSE("'nk'"),
    "fp8_gemm_tn": DENSE("'mn'"),
    "fp8_gemm_tt": DENSE("'mn'"),
    "m_grouped_fp8_gemm_nt_contiguous": f"{CONTIGUOUS}, expected_m_for_psum_layout=None",
    "m_grouped_fp8_gemm_nn_contiguous": CONTIGUOUS,
    "m_grouped_fp8_gemm_nt_masked": (
        f"a, b, d, masked_m, expected_m, {RECIPES}, compiled_dims='nk', disable_ue8m0_cast=False"
    ),
    "k_grouped_fp8_gemm_nt_contiguous": (
        "a, b, d, ks_cpu, grouped_layout, c=None, recipe=(1, 1, 128), compiled_dims='mn', use_psum_layout=False"
    ),
}
ALIASES = {
    "fp8_m_grouped_gemm_nt_masked": "m_grouped_fp8_gemm_nt_masked",
    "fp8_fp4_m_grouped_gemm_nt_masked": "m_grouped_fp8_gemm_nt_masked",
    "get_col_major_tma_aligned_tensor": "get_mn_major_tma_aligned_tensor",
} | {name.replace("fp8_gemm", "fp8_fp4_gemm"): name for name in GEMMS if "fp8_gemm" in name}
LAYOUT = {
    "get_tma_aligned_size": "mn, element_bytes",
    "get_mn_major_tma_aligned_tensor": "x",
    "get_col_major_tma_aligned_tensor": "x",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "x",
    "get_m_alignment_for_contiguous_layout": "",
    "get_mk_alignment_for_contiguous_layout": "",
    "set_mk_alignment_for_contiguous_layout": "alignment",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m=None",
    "transform_sf_into_required_layout": ("sf, mn, k, recipe, num_groups=None, is_sfa=None, disable_ue8m0_cast=False"),
}
MATH = {
    "ceil_div": "x, y",
    "align": "x, y",
    "ceil_to_ue8m0": "x",
    "pack_ue8m0_to_int": "x",
    # The first release's casts had x alone.
    "per_token_cast_to_fp8": "x, use_ue8m0=False, gran_k=128, use_packed_ue8m0=False",
    "per_channel_cast_to_fp8": "x, use_ue8m0=False, gran_k=128",
    "per_block_cast_to_fp8": "x, use_ue8m0=False, gran_k=128",
}
TESTING = {
    "bench": "fn, num_warmups=5, num_tests=10, high_precision=False",
    "bench_kineto": (
        "fn, kernel_names, num_tests=30, suppress_kineto_output=False, trace_path=None, flush_l2=True, "
        "with_multiple_kernels=False, barrier=None"
    ),
    "calc_diff": "x, y",
    "count_bytes": "*tensors",
}
SIGNATURES = [
    *((deep_gemm, name, parameters) for name, parameters in (GEMMS | LAYOUT | MATH).items()),
    *((deep_gemm, name, GEMMS[of]) for name, of in ALIASES.items() if of in GEMMS),
    *((module, name, parameters) for module in (utils, utils.layout) for name, parameters in LAYOUT.items()),
    *((module, name, parameters) for module in (utils, utils.math) for name, parameters in MATH.items()),
    *((testing, name, parameters) for name, parameters in TESTING.items()),
]
SET_AND_GET = ("num_sms", "tc_util", "pdl", "compile_mode", "batch_invariant")
SET_ONLY = ("ignore_compile_dims", "block_size_multiple_of")
NOT_OFFERED = (
    *(f"{kind}_gemm_{form}" for kind in ("bf16", "cublaslt") for form in ("nt", "nn", "tn", "tt")),
    *(f"m_grouped_bf16_gemm_{form}" for form in ("nt_contiguous", "nn_contiguous", "nt_masked")),
    "k_grouped_bf16_gemm_tn_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "fp8_gemm_nt_skip_head_mid",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "get_paged_mqa_logits_metadata",
    "einsum",
    "fp8_einsum",
    "tf32_hc_prenorm_gemm",
    "get_symm_buffer_for_mega_moe",
    "fp8_fp4_mega_moe",
)
TOP_LEVEL = (
    "__version__",
    *(GEMMS | ALIASES | LAYOUT | MATH),
    *NOT_OFFERED,
    *(f"{verb}_{name}" for verb in ("set", "get") for name in SET_AND_GET),
    *(f"set_{name}" for name in SET_ONLY),
)

ROWS, N, K = 128, 24, 144
FILL = float("nan")


def equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def contiguous_operands():
    """Two groups of ROWS rows each."""
    torch.manual_seed(0)
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(2 * ROWS, K))
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(2, N, K))
    layout = torch.zeros(2 * ROWS, dtype=torch.int32)
    layout[ROWS:] = 1
    return a, b, torch.full((2 * ROWS, N), FILL, dtype=torch.bfloat16), layout


def masked_operands():
    torch.manual_seed(1)
    a = deep_gemm.per_token_cast_to_fp8(torch.randn(2, ROWS, K))
    b = deep_gemm.per_block_cast_to_fp8(torch.randn(2, N, K))
    return a, b, torch.full((2, ROWS, N), FILL, dtype=torch.bfloat16), torch.tensor([5, 0], dtype=torch.int32)


def k_grouped_operands():
    """a and b hold [M, k] and [N, k] for one group after the other; their scales are [M or N, sum(ks) / 128]."""
    torch.manual_seed(2)
    ks = [128, 256]

    def cast(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = deep_gemm.per_channel_cast_to_fp8(torch.randn(sum(ks), columns))
        groups = values.view(torch.uint8).split(ks)
        return torch.cat([x.t().flatten() for x in groups]).view(values.dtype), scales.t()

    d = torch.full((2, 16, N), FILL)
    return cast(16), cast(N), d, ks, torch.tensor(ks, dtype=torch.int32)


@pytest.mark.parametrize(("module", "name", "parameters"), SIGNATURES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_parameters(module: ModuleType, name: str, parameters: str):
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(getattr(module, name)).parameters.values()]
    assert str(inspect.Signature(bare)) == f"({parameters})"


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level(name: str):
    assert hasattr(deep_gemm, name) and name in deep_gemm.__all__
    assert name == "__version__" or inspect.getdoc(getattr(deep_gemm, name))


@pytest.mark.parametrize("module", [deep_gemm, utils, utils.layout, utils.math, testing], ids=lambda x: x.__name__)
def test_all_is_sorted_and_true(module: ModuleType):
    assert module.__all__ == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(("name", "of"), ALIASES.items())
def test_aliases(name: str, of: str):
    assert getattr(deep_gemm, name) is getattr(deep_gemm, of)


def test_settings_take_one_value_and_give_it():
    for name in (*SET_AND_GET, *SET_ONLY):
        inspect.signature(getattr(deep_gemm, f"set_{name}")).bind(1)
    for name in SET_AND_GET:
        inspect.signature(getattr(deep_gemm, f"get_{name}")).bind()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", deep_gemm.__version__)


def test_the_package_alone_is_imported():
    script = "import deep_gemm; deep_gemm.utils.layout, deep_gemm.utils.math, deep_gemm.testing.bench, deep_gemm.errors"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_internal_is_not_offered():
    assert not hasattr(deep_gemm, "init")


def test_theoretical_alignment_takes_one_argument():
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(expected_m=64) > 0
    with pytest.raises(TypeError):
        deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(64, 8)


def test_m_indices_is_grouped_layout():
    a, b, d, layout = contiguous_operands()
    others = {name: torch.full_like(d, FILL) for name in ("renamed", "first", "other", "nn", "nn renamed")}
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, others["renamed"], m_indices=layout)
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, b, others["first"], m_indices=layout)
    deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, others["other"], grouped_layout=layout)
    b = b[0].mT, b[1].mT
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, b, others["nn"], layout)
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, b, others["nn renamed"], m_indices=layout)
    assert not d.isnan().any()
    assert [name for name, x in others.items() if not equal(x, d)] == []


def test_ks_and_ks_tensor_are_ks_cpu_and_grouped_layout():
    a, b, d, ks, ks_tensor = k_grouped_operands()
    renamed = torch.full_like(d, FILL)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks_cpu=ks, grouped_layout=ks_tensor)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, renamed, ks=ks, ks_tensor=ks_tensor)
    assert not d.isnan().any()
    assert equal(renamed, d)


@pytest.mark.parametrize("form", ["nt", "nn"])
def test_grouped_layout_is_given_once(form: str):
    """Twice by keyword is this package's complaint, all else Python's own."""
    a, b, d, layout = contiguous_operands()
    b = b if form == "nt" else (b[0].mT, b[1].mT)
    name = f"m_grouped_fp8_gemm_{form}_contiguous"
    gemm = getattr(deep_gemm, name)
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing 1 required positional argument: 'grouped_layout'$"):
        gemm(a, b, d)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got multiple values for argument 'grouped_layout'$"):
        gemm(a, b, d, layout, m_indices=layout)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got grouped_layout twice, as m_indices too: pass it once$"):
        gemm(a, b, d, grouped_layout=layout, m_indices=layout)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'indices'$"):
        gemm(a, b, d, indices=layout)
    assert d.isnan().all()
    gemm(a, b, d, m_indices=layout)
    assert not d.isnan().any()


def test_ks_and_ks_tensor_are_given_once():
    a, b, d, ks, ks_tensor = k_grouped_operands()
    name = "k_grouped_fp8_gemm_nt_contiguous"
    gemm = deep_gemm.k_grouped_fp8_gemm_nt_contiguous
    for keywords, complaint in (
        ({"ks": ks}, "missing 1 required positional argument: 'grouped_layout'"),
        ({"ks_tensor": ks_tensor}, "missing 1 required positional argument: 'ks_cpu'"),
        ({"ks": ks, "ks_cpu": ks, "ks_tensor": ks_tensor}, "got ks_cpu twice, as ks too: pass it once"),
        (
            {"ks": ks, "ks_tensor": ks_tensor, "grouped_layout": ks_tensor},
            "got grouped_layout twice, as ks_tensor too: pass it once",
        ),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\(\) {complaint}$"):
            gemm(a, b, d, **keywords)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got multiple values for argument 'ks_cpu'$"):
        gemm(a, b, d, ks, ks_tensor, ks=ks)
    assert d.isnan().all()
    gemm(a, b, d, ks, ks_tensor=ks_tensor)
    assert not d.isnan().any()


def test_masked_by_every_name_and_by_keyword():
    a, b, d, masked_m = masked_operands()
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, 5)
    assert not d[0, :5].isnan().any() and d[0, 5:].isnan().all() and d[1].isnan().all()
    for name in ("fp8_m_grouped_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"):
        other = torch.full_like(d, FILL)
        getattr(deep_gemm, name)(a, b, other, masked_m=masked_m, expected_m=5)
        assert equal(other, d), name


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_not_offered(name: str):
    function = getattr(compat, name)
    assert function.__name__ == function.__qualname__ == name
    with pytest.raises(NotImplementedError) as error:
        function(torch.ones(1), None, keyword=1)
    message = str(error.value)
    assert re.fullmatch(rf"{name} is not offered: (?:(?!\. ).)+[^.]", message)
    assert function.__doc__ == f"Raises: NotImplementedError: {message}."
    for word in re.findall(r"(?<![\w.])\w*(?:gemm|logits|moe)\w*", message):
        assert hasattr(deep_gemm, word), f"{message}: there is no {word}"
