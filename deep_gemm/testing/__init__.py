"""Names that clients import from deep_gemm.testing. No logic."""

from .bench import bench, bench_kineto
from .numeric import calc_diff, count_bytes

__all__ = ["bench", "bench_kineto", "calc_diff", "count_bytes"]
