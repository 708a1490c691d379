// Waiting for a phase of an mbarrier, and what has to be waited for before one arrives at it.
#pragma once
#include "config.cuh"
#include "ptx/barrier.cuh"

// 0, once `loaded` has come from shared memory: for the address of the barrier that one arrives at then. To ptxas a load is done
// when it is issued; but what the copy engine writes into a stage that was released right behind it may overtake it
// (docs/facts.md, few rows). nothing: the host's 0.
DEVICE uint32_t zero_after(float loaded, uint32_t nothing) { return __float_as_uint(loaded) & nothing; }

// The host's 0, and'ed with a clock: for ptxas a value to keep in a register. The argument itself it would load each time anew.
DEVICE uint32_t unknown(uint32_t nothing) {
    uint32_t time;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(time));
    return time & nothing;
}

// Spins until the phase is over. In a debug build nothing hangs: after WAIT_LIMIT steps of 2^30 ns the kernel ends with a store
// to an address that names the warp, 16 * (warp + 1). (A `trap` here would make ptxas spill in the warpgroups.)
// CLUSTER_WIDE: for what the other CTA of the cluster has written here.
template <bool CLUSTER_WIDE = false> DEVICE void wait(uint32_t address, uint32_t phase) {
    const uint32_t start = WAIT_LIMIT ? global_timer() >> 30 : 0;
    while (!(CLUSTER_WIDE ? barrier_try_wait_cluster(address, phase) : barrier_try_wait(address, phase))) {
        if (WAIT_LIMIT && uint32_t(global_timer() >> 30) - start > WAIT_LIMIT)
            *reinterpret_cast<volatile uint32_t*>(16 * (threadIdx.x / 32 + 1)) = phase;
    }
}

template <bool CLUSTER_WIDE = false> DEVICE void wait(uint64_t& barrier, uint32_t phase) { wait<CLUSTER_WIDE>(shared_address(&barrier), phase); }
