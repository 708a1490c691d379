"""Figures to print beside a result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch

from ..errors import InvalidInputError

Tensors: TypeAlias = "torch.Tensor | Iterable[Tensors] | None"


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 * sum(x * y) / sum(x * x + y * y) in float64: 0 for equal tensors, NaN where either holds one.

    A figure to print, never a check: it passes 1e-3 with a whole 128x128 tile of a 4096x2112 result gone.

    Args:
        x, y: [..], one shape, of any dtype but complex ones, on one device.

    Raises: InvalidInputError for tensors of different shapes, and what is no tensor.
    Source: calc_diff in deep_gemm/testing/numeric.py of DeepGEMM.
    """
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        raise InvalidInputError(f"x is a {type(x).__name__}, y a {type(y).__name__}, expected tensors: pass both")
    if x.shape != y.shape:
        raise InvalidInputError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected the same: compare like with like"
        )
    x, y = x.double(), y.double()
    squares = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / squares if squares else 0.0


def count_bytes(*tensors: Tensors) -> int:
    """The bytes of all elements of tensors [..] of any dtype; of None, which has none; and of lists or tuples of them.

    Raises: TypeError for what is none of these and cannot be gone through.
    """
    total = 0
    for x in tensors:
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
        elif x is not None:
            total += count_bytes(*x)
    return total
