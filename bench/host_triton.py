"""A Triton kernel that does nothing, for bench/host.py: Triton reads a kernel's source from its file."""
# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def nothing(x, y, z, n, BLOCK: tl.constexpr = 16):
    pass
