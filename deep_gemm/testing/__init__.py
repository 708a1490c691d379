"""Names that clients import from deep_gemm.testing. No logic."""

from .numeric import calc_diff, count_bytes

__all__ = ["calc_diff", "count_bytes"]
