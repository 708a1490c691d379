// Warpgroup matrix multiplication. The instruction itself, wgmma.mma_async m64nNk32 E4M3, is generated into config.cuh for the
// one N in use; here is what stands around it.
#pragma once
#include "base.cuh"

// Shared-memory descriptor of a K-major operand with rows of 128 bytes under the 128-byte swizzle: groups of 8 rows lie 1024
// bytes apart. `unit` is its address in units of 16 bytes. K=32 further along the row is +2, 8 rows further down is +64: two
// halves, of which only the lower one differs, take ptxas fewer instructions than shifts of 64 bits.
// Source: PTX ISA, "Asynchronous warpgroup level matrix shared memory layout".
DEVICE uint64_t matrix_descriptor(uint32_t unit) {
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(1 << 16 | unit), "r"(1 << 30 | 1024 / 16));
    return descriptor;
}

// wgmma.fence: orders register writes before the next wgmma
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: all but the newest PENDING groups are finished
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Pins an accumulator in registers here, so that the compiler moves none of its reads or writes across. No instruction.
template <int COUNT> DEVICE void pin(float (&accumulator)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}
