// Integer names and addresses. No header of the toolkit is included anywhere: a source without includes compiles several
// times faster, and NVRTC ships no headers (docs/facts.md).
#pragma once

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;

#define DEVICE __device__ __forceinline__

// A CUtensorMap, as the driver encoded it. Opaque here.
struct alignas(64) TensorMap {
    uint8_t opaque[128];
};

DEVICE uint32_t round_up(uint32_t value, uint32_t multiple) { return (value + multiple - 1) / multiple * multiple; }

__device__ constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// shfl.sync: the warp's number, which ptxas then knows to be the same in all of its threads
DEVICE uint32_t warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// shfl.sync: a value that is the same in all threads of a warp, and known to be so by ptxas
DEVICE uint32_t uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }

// vote.sync.any: whether it is true in any thread of the warp; so it is in all or none
DEVICE bool any(bool condition) { return __any_sync(~0u, condition); }

// mov.u32 %laneid. What is computed from it is computed where it stands, and kept in no register before.
DEVICE uint32_t lane_index() {
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// mov.f32: a zero that is put into its register here, not where the compiler would rather have it
DEVICE float zero() {
    float value;
    asm volatile("mov.f32 %0, 0f00000000;" : "=f"(value)::"memory");
    return value;
}

// mov.u32 %cluster_ctarank
DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// elect.sync: true in one thread of a converged warp. ptxas knows that it is one, and issues copies without a loop over lanes.
DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected;
}

// ld.shared of floats, by address
DEVICE float load_shared_float(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
    return x;
}
DEVICE float2 load_shared_float2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
    return x;
}
DEVICE float4 load_shared_float4(uint32_t address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
    return x;
}

// st.shared of four floats, and of one word
DEVICE void store_shared(uint32_t address, float4 x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
DEVICE void store_shared(uint32_t address, uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// The sum of the values of all lanes up to and including one's own.
DEVICE uint32_t inclusive_sum(uint32_t value) {
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, value, distance);
        if (lane_index() >= distance) value += other;
    }
    return value;
}

// atom.add, of memory that all CTAs see: what was there
DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
    uint32_t found;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(found) : "l"(address), "r"(value) : "memory");
    return found;
}

// griddepcontrol.wait: until the kernel before has finished, if this one was launched to overlap with it
DEVICE void previous_kernel_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// mov.u32 %clock, again and again: lets that many clocks pass
DEVICE void spin(uint32_t clocks) {
    const auto now = [] {
        uint32_t time;
        asm volatile("mov.u32 %0, %%clock;" : "=r"(time));
        return time;
    };
    for (const uint32_t start = now(); now() - start < clocks;) {}
}

// mov.u64 %globaltimer: nanoseconds, coarse
DEVICE uint64_t global_timer() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// griddepcontrol.launch_dependents: once every CTA has said so, the next kernel may start beside this one
DEVICE void next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// setmaxnreg.inc / .dec: moves registers between warpgroups
template <int COUNT> DEVICE void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
