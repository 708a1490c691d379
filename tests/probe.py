"""Small kernels of the compiler's tests, none of which is ever run."""

from __future__ import annotations

from pathlib import Path

import deep_gemm
from deep_gemm.runtime.compiler import Source

_WGMMA = """#pragma once
__device__ __forceinline__ void arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ __forceinline__ void wgmma(float (&d)[4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
"""

_PROBE = """#include "ptx/wgmma.cuh"
extern "C" __global__ void __launch_bounds__(128, 1)
probe(float* out, unsigned long long a, unsigned long long b, int turns) {
    float d[4] = {};
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        arrive();
        wgmma(d, a, b);
        wgmma(d, a + 2, b + 2);
        commit();
        wait();
    }
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum = __fmaf_rn(d[i], out[i], sum);
    out[threadIdx.x] = sum;
}
"""

PROBE = Source("probe.cu", _PROBE, (("ptx/wgmma.cuh", _WGMMA),))

# Every turn of the unrolled loop starts wgmmas while those of the turn before are in flight.
SERIALISED = Source(
    "probe.cu", _PROBE.replace("        wait();\n", "").replace("#pragma unroll 1\n", ""), PROBE.headers
)

# The accumulators are read with wgmmas in flight, so the compiler waits for them.
WAIT_INJECTED = Source("probe.cu", _PROBE.replace("        wait();\n", "        d[0] += 1;\n"), PROBE.headers)

SETMAXNREG_IGNORED = Source(
    "probe.cu", 'extern "C" __global__ void probe() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }\n'
)

# An array that no register can hold, for its indices are computed; and 33 words of static shared memory.
LOCAL_MEMORY = Source(
    "probe.cu",
    """extern "C" __global__ void probe(float* x, int n) {
    __shared__ float s[33];
    float v[64];
    s[threadIdx.x] = n;
    for (int i = 0; i < 64; ++i) v[i] = x[i];
    for (int i = 0; i < n; ++i) x[i * 7] = v[(i * n) % 64] * s[i] + 2.5f;
}
""",
)

WRONG = Source("probe.cu", '#include "ptx/wgmma.cuh"\nint broken = missing_name;\n', PROBE.headers)


def numbered(number: int) -> Source:
    """A probe that differs from every other number's."""
    return Source("probe.cu", f"// {number}\n{_PROBE}", PROBE.headers)


# Takes about 20 s to compile, which no test waits for.
SLOW = Source(
    "probe.cu",
    'extern "C" __global__ void probe(volatile float* x) {\n'
    + "".join(f"x[{i}] = __fmaf_rn(x[{i * 7}], x[{i * 3 + 1}], x[{i}]);\n" for i in range(3000))
    + "}\n",
)

# How a script starts that needs deep_gemm.runtime and no PyTorch, whose import takes longer than all else here.
ALONE = f"""
import sys, types
package = sys.modules["deep_gemm"] = types.ModuleType("deep_gemm")
package.__file__ = {deep_gemm.__file__!r}
package.__path__ = [{str(Path(deep_gemm.__file__).parent)!r}]
sys.path.append({str(Path(__file__).parent)!r})
"""
