"""Names of DeepGEMM that are not this package's own: older and other names of what it has, and what it has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

from .gemm import (
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
    k_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .problem import Pair


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs: Pair, rhs: Pair, out: torch.Tensor, m_indices: torch.Tensor) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous` under the name of DeepGEMM's first release.

    Args:
        lhs: its a, (values E4M3 [M, K], scales FP32 [M, ceil(K / 128)]).
        rhs: its b, (values E4M3 [G, N, K], scales FP32 [G, ceil(N / 128), ceil(K / 128)]).
        out: its d, BF16 [M, N].
        m_indices: its grouped_layout, int32 [M].

    Raises: as `m_grouped_fp8_gemm_nt_contiguous`.
    """
    m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int
) -> None:
    """`m_grouped_fp8_gemm_nt_masked` under the name of DeepGEMM's first release.

    Args:
        lhs: its a, (values E4M3 [G, max_m, K], scales FP32 [G, max_m, ceil(K / 128)]).
        rhs: its b, (values E4M3 [G, N, K], scales FP32 [G, ceil(N / 128), ceil(K / 128)]).
        out: its d, BF16 [G, max_m, N].
        masked_m, expected_m: as they are there, int32 [G] and a hint.

    Raises: as `m_grouped_fp8_gemm_nt_masked`.
    """
    m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked  # what vLLM, SGLang and TensorRT-LLM call

# DeepGEMM's names for either format. Hopper has no FP4: its operands are rejected by their dtype.
fp8_fp4_gemm_nt = fp8_gemm_nt
fp8_fp4_gemm_nn = fp8_gemm_nn
fp8_fp4_gemm_tn = fp8_gemm_tn
fp8_fp4_gemm_tt = fp8_gemm_tt
m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
m_grouped_fp8_fp4_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
k_grouped_fp8_fp4_gemm_nt_contiguous = k_grouped_fp8_gemm_nt_contiguous
fp8_fp4_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


def _not_offered(name: str, instead: str) -> Callable[..., NoReturn]:
    """A function that clients can import and look for, and that says what to do when it is called."""
    message = f"{name} is not offered: {instead}"

    def call(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(message)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Raises: NotImplementedError: {message}."
    return call


_GROUPS = "call torch.matmul for every group, or cast to FP8 and call"
_LOGITS = "scale the values back and score them with torch.einsum"

bf16_gemm_nt = _not_offered("bf16_gemm_nt", "call torch.matmul(a, b.T, out=d)")
bf16_gemm_nn = _not_offered("bf16_gemm_nn", "call torch.matmul(a, b, out=d)")
bf16_gemm_tn = _not_offered("bf16_gemm_tn", "call torch.matmul(a.T, b, out=d)")
bf16_gemm_tt = _not_offered("bf16_gemm_tt", "call torch.matmul(a.T, b.T, out=d)")
cublaslt_gemm_nt = _not_offered("cublaslt_gemm_nt", "call torch.matmul(a, b.T, out=d)")
cublaslt_gemm_nn = _not_offered("cublaslt_gemm_nn", "call torch.matmul(a, b, out=d)")
cublaslt_gemm_tn = _not_offered("cublaslt_gemm_tn", "call torch.matmul(a.T, b, out=d)")
cublaslt_gemm_tt = _not_offered("cublaslt_gemm_tt", "call torch.matmul(a.T, b.T, out=d)")
m_grouped_bf16_gemm_nt_contiguous = _not_offered(
    "m_grouped_bf16_gemm_nt_contiguous", f"{_GROUPS} m_grouped_fp8_gemm_nt_contiguous"
)
m_grouped_bf16_gemm_nn_contiguous = _not_offered(
    "m_grouped_bf16_gemm_nn_contiguous", f"{_GROUPS} m_grouped_fp8_gemm_nn_contiguous"
)
m_grouped_bf16_gemm_nt_masked = _not_offered("m_grouped_bf16_gemm_nt_masked", f"{_GROUPS} m_grouped_fp8_gemm_nt_masked")
k_grouped_bf16_gemm_tn_contiguous = _not_offered(
    "k_grouped_bf16_gemm_tn_contiguous", f"{_GROUPS} k_grouped_fp8_gemm_nt_contiguous"
)
k_grouped_fp8_gemm_tn_contiguous = _not_offered(
    "k_grouped_fp8_gemm_tn_contiguous",
    "Hopper's FP8 tensor cores read K-major operands only; call k_grouped_fp8_gemm_nt_contiguous",
)
fp8_gemm_nt_skip_head_mid = _not_offered(
    "fp8_gemm_nt_skip_head_mid", "call fp8_gemm_nt and copy the two parts of every head"
)
fp8_mqa_logits = _not_offered("fp8_mqa_logits", _LOGITS)
fp8_paged_mqa_logits = _not_offered("fp8_paged_mqa_logits", _LOGITS)
fp8_fp4_mqa_logits = _not_offered("fp8_fp4_mqa_logits", _LOGITS)
fp8_fp4_paged_mqa_logits = _not_offered("fp8_fp4_paged_mqa_logits", _LOGITS)
get_paged_mqa_logits_metadata = _not_offered(
    "get_paged_mqa_logits_metadata", "it plans fp8_paged_mqa_logits, which is not offered either"
)
einsum = _not_offered("einsum", "call torch.einsum")
fp8_einsum = _not_offered("fp8_einsum", "call fp8_gemm_nt for every batch, or torch.einsum on values scaled back")
tf32_hc_prenorm_gemm = _not_offered(
    "tf32_hc_prenorm_gemm", "call torch.matmul(a.float(), b.T, out=d), and sum the squares of a with torch"
)
get_symm_buffer_for_mega_moe = _not_offered(
    "get_symm_buffer_for_mega_moe", "it allocates for fp8_fp4_mega_moe, which is not offered either"
)
fp8_fp4_mega_moe = _not_offered(
    "fp8_fp4_mega_moe",
    "it is a kernel for several Blackwell GPUs; send tokens with DeepEP and call m_grouped_fp8_gemm_nt_contiguous",
)
