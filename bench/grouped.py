"""Multiplications by whichever deep_gemm is imported: ours, or in the process of bench/peer.py another one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import deep_gemm

DENSE, CONTIGUOUS, MASKED = "dense", "contiguous", "masked"
EXPERT = ((4096, 7168), (7168, 2048))  # N, K of DeepSeek-V3's routed experts: gate + up, down


@dataclass(frozen=True)
class Shape:
    """groups: each with b [n, k], and room for m rows of a; one if dense. tokens: real rows, m or about so many."""

    family: str
    groups: int
    m: int
    n: int
    k: int
    tokens: int

    @property
    def numbers(self) -> list[int]:
        """As in a results file."""
        if self.family == DENSE:
            return [self.m, self.n, self.k]
        return [self.groups, self.m, self.n, self.k, *[self.tokens] * (self.family == MASKED)]

    @classmethod
    def of(cls, family: str, numbers: list[int]) -> Shape:
        """The inverse of numbers."""
        if family == DENSE:
            m, n, k = numbers
            return cls(family, 1, m, n, k, tokens=m)
        return cls(family, *numbers[:4], tokens=numbers[-1] if family == MASKED else numbers[1])

    @property
    def counts(self) -> list[int]:
        """Real rows of every group. Where there is room for more: 0.7 to 1.3 times tokens, always the same ones."""
        if self.tokens == self.m:
            return [self.m] * self.groups
        draw = random.Random(0)
        return [draw.randrange(7 * self.tokens // 10, -(-13 * self.tokens // 10)) for _ in range(self.groups)]


SHAPES = (
    *(Shape(CONTIGUOUS, g, m, n, k, m) for (g, m), (n, k) in product(((4, 8192), (8, 4096), (32, 256)), EXPERT)),
    *(Shape(MASKED, g, m, n, k, m) for (g, m), (n, k) in product(((1, 1024), (2, 512), (4, 256)), EXPERT)),
    *(Shape(MASKED, 32, 4096, n, k, tokens) for tokens, (n, k) in product((192, 20), EXPERT)),
)


@dataclass(frozen=True)
class Operands:
    """One set, as the call of its family takes it: rows of a [M, K] and d [M, N] have groups before them if masked.

    layout: the group of every row, or the real rows of every group. counts: these, known to the CPU.
    """

    shape: Shape
    a: torch.Tensor
    a_scales: torch.Tensor
    b: torch.Tensor  # [G, N, K]
    b_scales: torch.Tensor
    d: torch.Tensor
    layout: torch.Tensor
    counts: list[int]
    one: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, device: str = "cuda") -> Operands:
        groups, m, n, k, counts = shape.groups, shape.m, shape.n, shape.k, shape.counts
        fp8 = torch.float8_e4m3fn
        a = torch.zeros(groups, m, k, dtype=torch.uint8, device=device).view(fp8)
        b = torch.empty(groups, n, k, dtype=fp8, device=device)
        a_scales = torch.ones(groups, m, -(-k // 128), device=device)
        b_scales = torch.empty(groups, -(-n // 128), -(-k // 128), device=device)
        for g, count in enumerate(counts):
            a[g, :count], a_scales[g, :count] = deep_gemm.utils.per_token_cast_to_fp8(
                torch.randn(count, k, device=device, dtype=torch.bfloat16), False
            )
            b[g], b_scales[g] = deep_gemm.utils.per_block_cast_to_fp8(
                torch.randn(n, k, device=device, dtype=torch.bfloat16), False
            )
        d = torch.empty(groups, m, n, dtype=torch.bfloat16, device=device)
        layout = torch.tensor(counts, dtype=torch.int32, device=device)
        if shape.family == CONTIGUOUS:
            a, a_scales, d = a.flatten(0, 1), a_scales.flatten(0, 1), d.flatten(0, 1)
            layout = torch.arange(groups, dtype=torch.int32, device=device).repeat_interleave(m)
        a_scales = deep_gemm.utils.get_mn_major_tma_aligned_tensor(a_scales)
        return cls(shape, a, a_scales, b, b_scales, d, layout, counts, torch.ones((), device=device))

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """A view of a, its scales or d with groups before the rows."""
        return x.unflatten(0, (self.shape.groups, self.shape.m)) if x.dim() == 2 else x


def call(x: Operands) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The public function of a family, and what it takes."""
    if x.shape.family == DENSE:
        return deep_gemm.fp8_gemm_nt, ((x.a[0], x.a_scales[0]), (x.b[0], x.b_scales[0]), x.d[0])
    pairs = (x.a, x.a_scales), (x.b, x.b_scales)
    if x.shape.family == CONTIGUOUS:
        return deep_gemm.m_grouped_fp8_gemm_nt_contiguous, (*pairs, x.d, x.layout)
    return deep_gemm.fp8_m_grouped_gemm_nt_masked, (*pairs, x.d, x.layout, x.shape.tokens)


def run(x: Operands) -> torch.Tensor:
    function, arguments = call(x)
    function(*arguments)
    return x.d


def run_loop(x: Operands) -> torch.Tensor:
    """cuBLASLt once for each group, without block scales: as much as the CPU's knowing the counts can do."""
    for a, b, d, count in zip(x.by_group(x.a), x.b, x.by_group(x.d), x.counts, strict=True):
        torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            a[:count], b.t(), x.one, x.one, out_dtype=torch.bfloat16, use_fast_accum=True, out=d[:count]
        )
    return x.d
