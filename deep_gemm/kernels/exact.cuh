// Arithmetic that PyTorch repeats to the bit, on a CPU as well: each operation is named, rounds once, and is never contracted
// (NVRTC makes an FMA of a * b + c otherwise).
#pragma once
#include "ptx/base.cuh"
#include "ptx/convert.cuh"
#include "tile.cuh"

constexpr uint32_t INFINITE = 0x7F800000, NOT_A_NUMBER = 0x7FFFFFFF;  // bits; there is one NaN

// RN(1 / x), for x and 1 / x normal: one step of Newton's from the approximation. tests/test_quantize_gpu.py goes through all mantissas.
DEVICE float reciprocal(float x) {
    const float guess = approximate_reciprocal(x);
    return __fmaf_rn(__fmaf_rn(-x, guess, 1), guess, guess);
}

// x / divisor, with RN(1 / divisor) known: to the last bit but for one quotient in many millions, and never so that E4M3 could tell
// (docs/numerics.md; tests/test_quantize.py goes through all that could be). The order keeps the sign of zero.
DEVICE float quotient(float x, float divisor, float reciprocal) {
    const float near = __fmul_rn(x, reciprocal);
    return __fmaf_rn(-__fmaf_rn(near, divisor, -x), reciprocal, near);
}

// RN(x / divisor): `quotient` is faithful, so one more correction rounds it correctly (Markstein, Computation of elementary functions on
// the IBM RISC System/6000 processor, IBM J. Res. Dev. 34(1), 1990).
DEVICE float divide(float x, float divisor, float reciprocal) {
    const float faithful = quotient(x, divisor, reciprocal);
    return __fmaf_rn(-__fmaf_rn(faithful, divisor, -x), reciprocal, faithful);
}

// What a group is divided by.
struct Scale {
    float value, divisor, reciprocal;
};

// Of a group whose largest |x| is amax. Where that is not finite, the reciprocal is 0 or NaN and the divisor some number: then
// `quotient` gives x * reciprocal, which is right.
DEVICE Scale scale_of(float amax, bool use_ue8m0) {
    constexpr float RECIPROCAL = 1 / E4M3_MAX;
    const uint32_t bits = __float_as_uint(amax);  // in the order of the values, NaN above all
    const bool finite = bits < INFINITE, nan = bits > INFINITE;
    float value = divide(finite ? fmaxf(amax, SMALLEST_AMAX) : 1, E4M3_MAX, RECIPROCAL);
    if (use_ue8m0) value = __uint_as_float((__float_as_uint(value) + 0x7FFFFF) & INFINITE);
    const float inverse = reciprocal(value);
    return {finite ? value : __uint_as_float(nan ? NOT_A_NUMBER : INFINITE), value,
            finite ? inverse : __uint_as_float(nan ? NOT_A_NUMBER : 0)};
}

// x / (1 + exp(-x)), where x is nowhere less than -LIMIT, and -x in the exponent no less either: then 2^n and the reciprocal are normal.
// exp(-x) = 2^n * p(f), with n + f = -x / ln 2; n is rounded by adding SHIFT, which leaves it in the lowest bits.
DEVICE float silu(float x) {
    const float factor = max_or_nan(x, -LIMIT), z = fminf(factor, LIMIT);
    const float shifted = __fmaf_rn(z, -LOG2_E, SHIFT), n = __fsub_rn(shifted, SHIFT);
    const float f = __fmaf_rn(z, -LOG2_E, -n);
    float p = EXP2[0];
#pragma unroll
    for (int i = 1; i < EXP2_TERMS; ++i) p = __fmaf_rn(p, f, EXP2[i]);
    const float e = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    return __fmul_rn(factor, reciprocal(__fadd_rn(1, e)));
}
