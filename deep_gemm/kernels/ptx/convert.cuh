// Conversions, maxima and loads of the casts, one instruction a wrapper.
#pragma once
#include "base.cuh"

// ld.global.v4: sixteen bytes that are not wanted again
DEVICE uint4 load_once(const void* address) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address) : "memory");
    return x;
}

// cvt.rn.satfinite.e4m3x2.f32: to nearest even, at most 448, NaN becomes 0x7f; `low` lands in the lower byte
DEVICE uint16_t to_e4m3x2(float low, float high) {
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// mov.b32: two halves
DEVICE uint32_t join(uint16_t low, uint16_t high) {
    uint32_t packed;
    asm("mov.b32 %0, {%1, %2};" : "=r"(packed) : "h"(low), "h"(high));
    return packed;
}

// cvt.f32.f16
DEVICE float half_to_float(uint16_t x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
    return result;
}

// rcp.approx.ftz.f32: within 1 ulp
DEVICE float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// max.u16x2
DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// max.NaN.f32: NaN if either is
DEVICE float max_or_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
