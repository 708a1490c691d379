"""FP8 matrix multiplication for NVIDIA Hopper with fine-grained scales: E4M3 x E4M3 -> BF16.

Importing this package reads no environment, finds no compiler and needs no GPU.
"""

__version__ = "0.1.0"

from .gemm import fp8_gemm_nn, fp8_gemm_nt, fp8_gemm_tn, fp8_gemm_tt, gemm_fp8_fp8_bf16_nt
from .layout import (
    align,
    ceil_div,
    get_col_major_tma_aligned_tensor,
    get_mn_major_tma_aligned_tensor,
    get_tma_aligned_size,
)
from .quantize import (
    ceil_to_ue8m0,
    per_block_cast_back,
    per_block_cast_to_fp8,
    per_channel_cast_back,
    per_channel_cast_to_fp8,
    per_token_cast_back,
    per_token_cast_to_fp8,
)
from .runtime.device import get_num_sms, set_num_sms
from .testing.numeric import calc_diff

__all__ = [
    "__version__",
    "align",
    "calc_diff",
    "ceil_div",
    "ceil_to_ue8m0",
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_num_sms",
    "get_tma_aligned_size",
    "per_block_cast_back",
    "per_block_cast_to_fp8",
    "per_channel_cast_back",
    "per_channel_cast_to_fp8",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "set_num_sms",
]
