// Conversion and shared-memory stores of accumulator fragments, one instruction a wrapper.
#pragma once
#include "base.cuh"

// cvt.rn.bf16x2.f32: round to nearest even, NaN becomes 0x7fff; `low` lands in the lower half
DEVICE uint32_t to_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// movmatrix.trans: an 8x8 matrix of 16-bit elements, transposed; lane i holds columns 2 * (i % 4) and the next of row i / 4
DEVICE uint32_t transpose_matrix(uint32_t two) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(two));
    return transposed;
}

// stmatrix.x4: four 8x8 matrices of 16-bit elements; lane i holds the address of row i % 8 of matrix i / 8
DEVICE void store_matrix_x4(uint32_t row_address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(row_address), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
}
