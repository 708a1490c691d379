// mbarrier and cluster barriers, one instruction a wrapper. Barriers are named by their 32-bit shared address.
#pragma once
#include "base.cuh"

// mbarrier.init
DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: makes the initialisation visible to the cluster and to the copy engine
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// mbarrier.try_wait.parity: may suspend for a while; true when the phase of that parity is over
DEVICE bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// mbarrier.try_wait.parity.acquire.cluster: the same, and then what other CTAs of the cluster have written is seen
DEVICE bool barrier_try_wait_cluster(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done;
}

// mbarrier.arrive, on a barrier of this CTA
DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.shared::cluster, on a barrier of any CTA of the cluster. The form without `.release.cluster`: that one
// puts a MEMBAR in front of every release of a stage, and only finished reads have to be ordered (docs/facts.md).
DEVICE void barrier_arrive_cluster(uint32_t cluster_address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and announces bytes that copies will deliver
DEVICE void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// mapa: the address of the same shared variable in another CTA of the cluster
DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// st.async: a store to another CTA of the cluster that counts as four bytes on a barrier there
DEVICE void store_remote(uint32_t cluster_address, uint32_t value, uint32_t cluster_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                 ::"r"(cluster_address), "r"(value), "r"(cluster_barrier) : "memory");
}

// st.async of four floats: sixteen bytes on a barrier there
DEVICE void store_remote(uint32_t cluster_address, float4 x, uint32_t cluster_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(cluster_address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(cluster_barrier) : "memory");
}

// barrier.cta.arrive / .sync, of so many threads: goes on at once / when all are there
template <int ID, int THREADS> DEVICE void barrier_arrive() { asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"n"(ID), "n"(THREADS) : "memory"); }
template <int ID, int THREADS> DEVICE void barrier_sync() { asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(ID), "n"(THREADS) : "memory"); }

// barrier.cluster.arrive: this thread is there. Relaxed: of what it wrote the others see initialised barriers, if it fenced them
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// barrier.cluster.wait: until every thread of every CTA of the cluster is there
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// barrier.cluster.arrive + wait: every thread of every CTA of the cluster
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
