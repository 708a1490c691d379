// Runs kernels/quantize.cu on a CPU: a fiber for each thread, one block after the other. A library that tests/test_quantize.py calls
// in place of the driver. The instructions that C++ lacks are below; the approximate reciprocal is off by a unit either way.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
using std::max, std::min;

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct Three {
    uint32_t x, y, z;
};
Three blockIdx, gridDim, threadIdx;

// ---- threads ----

struct Meeting {  // of a number of threads, again and again
    uint32_t members, present = 0, times = 0;
};
struct Warp {
    Meeting meeting{32};
    uint32_t values[2][32];
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 15);
    bool done = false;
};
ucontext_t outside;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Meeting block;

void meet(Meeting& meeting) {
    const uint32_t times = meeting.times, thread = threadIdx.x;
    if (++meeting.present == meeting.members) {
        meeting.present = 0, ++meeting.times;
        return;
    }
    while (meeting.times == times) swapcontext(&fibers[thread]->context, &outside);
}

void run_block(uint32_t threads, const std::function<void()>& kernel) {
    static const std::function<void()>* body;
    body = &kernel;
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    warps.assign(threads / 32, {});
    block = {threads};
    for (uint32_t i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &outside;
        makecontext(&fiber.context, [] { (*body)(), fibers[threadIdx.x]->done = true; }, 0);
    }
    for (uint32_t left = threads; left;)
        for (uint32_t i = 0; i < threads; ++i) {
            if (fibers[i]->done) continue;
            threadIdx.x = i;
            swapcontext(&outside, &fibers[i]->context);
            left -= fibers[i]->done;
        }
}

void __syncthreads() { meet(block); }
uint32_t lane_index() { return threadIdx.x % 32; }
const uint32_t* exchange(uint32_t value) {
    Warp& warp = warps[threadIdx.x / 32];
    uint32_t* values = warp.values[warp.meeting.times % 2];
    values[lane_index()] = value;
    meet(warp.meeting);
    return values;
}
uint32_t __shfl_sync(unsigned, uint32_t value, uint32_t from) { return exchange(value)[from % 32]; }
uint32_t __shfl_xor_sync(unsigned, uint32_t value, uint32_t distance) { return exchange(value)[lane_index() ^ distance]; }
uint32_t __reduce_max_sync(unsigned, uint32_t value) {
    const uint32_t* values = exchange(value);
    return *std::max_element(values, values + 32);
}
uint32_t __ballot_sync(unsigned, bool vote) {
    const uint32_t* votes = exchange(vote);
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i) result |= votes[i] << i;
    return result;
}
uint32_t inclusive_sum(uint32_t value) {
    const uint32_t* values = exchange(value);
    uint32_t sum = 0;
    for (uint32_t i = 0; i <= lane_index(); ++i) sum += values[i];
    return sum;
}
int __ffs(uint32_t x) { return __builtin_ffs(x); }

// ---- instructions ----

float __uint_as_float(uint32_t x) {
    float result;
    memcpy(&result, &x, 4);
    return result;
}
uint32_t __float_as_uint(float x) {
    uint32_t result;
    memcpy(&result, &x, 4);
    return result;
}
float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }
float __fsub_rn(float a, float b) { return a - b; }
float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

const uint8_t *first_byte, *last_byte;  // of what may be read
bool strayed;
uint4 load_once(const void* address) {
    const auto* from = static_cast<const uint8_t*>(address);
    uint4 x{};
    if (from < first_byte || from + 16 > last_byte || uintptr_t(from) % 16) strayed = true;
    else memcpy(&x, address, 16);
    return x;
}
uint32_t to_e4m3(float x) {
    if (std::isnan(x)) return 0x7F;
    const uint32_t sign = std::signbit(x) ? 0x80 : 0;
    x = std::min(std::fabs(x), 448.0f);
    const int exponent = std::max(std::ilogb(x), -6);  // of zero it is very small
    const auto units = uint32_t(std::nearbyint(std::ldexp(x, 3 - exponent)));  // to nearest even; 8 to 16 where normal
    return sign | (uint32_t(exponent + 6) * 8 + units);
}
uint16_t to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
uint32_t join(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
float half_to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x >> 15) << 31, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
    const float magnitude = std::ldexp(float(exponent ? fraction + 1024 : fraction), int(exponent ? exponent : 1) - 25);
    return __uint_as_float(sign | __float_as_uint(magnitude));
}
float approximate_reciprocal(float x) {
    const float exact = 1 / x;
    if (std::isnan(exact) || std::isinf(exact)) return exact;
    if (std::fabs(exact) < 0x1p-126f) return 0;
    return __uint_as_float(__float_as_uint(exact) + __float_as_uint(x) % 3 - 1);
}
uint32_t max_u16x2(uint32_t a, uint32_t b) { return std::max(a & 0xFFFF, b & 0xFFFF) | std::max(a >> 16, b >> 16) << 16; }
float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? __uint_as_float(0x7FFFFFFF) : std::max(a, b); }

#include "quantize.cu"

// Launches an entry. Input is what may be read; 0 if nothing else was.
extern "C" int launch(const char* entry, const Args* args, const uint32_t* grid, uint32_t threads, const uint8_t* input, uint64_t input_bytes) {
    static const std::pair<const char*, void (*)(const Args)> ENTRY_POINTS[] = {
#define NAMED(NAME) {"token_" #NAME, token_##NAME}, {"gated_" #NAME, gated_##NAME}, {"tile_" #NAME, tile_##NAME}, {"transposed_" #NAME, transposed_##NAME}
        NAMED(bf16), NAMED(fp16), NAMED(fp32)};
    first_byte = input, last_byte = input + input_bytes, strayed = false;
    gridDim = {grid[0], grid[1], grid[2]};
    for (const auto& [name, kernel] : ENTRY_POINTS) {
        if (strcmp(name, entry)) continue;
        for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
                    run_block(threads, [&, kernel = kernel] { kernel(*args); });
        return strayed;
    }
    return 2;
}
