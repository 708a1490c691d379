"""How long calls take, and figures to print beside a result: names that clients import from deep_gemm.testing."""

from .bench import bench, bench_kineto
from .numeric import calc_diff, count_bytes

__all__ = ["bench", "bench_kineto", "calc_diff", "count_bytes"]
