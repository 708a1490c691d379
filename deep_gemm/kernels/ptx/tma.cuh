// The bulk tensor copy engine (TMA) and the small asynchronous copy, one instruction a wrapper.
#pragma once
#include "base.cuh"

// prefetch.tensormap
DEVICE void tensor_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// tensormap.replace, of a map in global memory: where it starts; columns and rows; bytes from row to row (of K_GROUPED's maps)
DEVICE void tensor_map_replace(TensorMap* map, const void* address, uint32_t columns, uint32_t rows, uint64_t pitch) {
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(address) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], 0, %1;" ::"l"(map), "r"(columns) : "memory");
    asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], 1, %1;" ::"l"(map), "r"(rows) : "memory");
    asm volatile("tensormap.replace.tile.global_stride.global.b1024.b64 [%0], 0, %1;" ::"l"(map), "l"(pitch) : "memory");
}

// fence.proxy.tensormap release / acquire: what was written to a map is seen by the copy engine afterwards
DEVICE void tensor_map_release() { asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory"); }
DEVICE void tensor_map_acquire(const TensorMap* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.3d, global -> shared; out-of-range elements arrive as zeros and count as bytes
DEVICE void tensor_load(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// cp.async.bulk.prefetch.tensor.3d: the same, global -> L2. A hint: whoever writes there afterwards writes to L2 as well
DEVICE void tensor_fetch(const TensorMap& map, uint32_t x, uint32_t y, uint32_t z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map), "r"(x), "r"(y), "r"(z) : "memory");
}

// tensor_load, delivered to the same address, and announced to the same barrier, of every CTA in `mask`
DEVICE void tensor_load_multicast(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t barrier,
                                  uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;"
        ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(mask) : "memory");
}

// cp.async.bulk.tensor.3d, shared -> global; nothing is written out of range
DEVICE void tensor_store(const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];"
                 ::"l"(&map), "r"(x), "r"(y), "r"(z), "r"(from) : "memory");
}

// cp.async.bulk.commit_group
DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group.read: all but the newest PENDING groups have read their shared memory
template <int PENDING> DEVICE void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }

// fence.proxy.async: ordinary writes to shared memory before it are seen by the copy engine after it
DEVICE void store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// cp.async: one float, global -> shared, or a zero when `bytes` is 0
DEVICE void float_load(uint32_t to, const float* from, uint32_t bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// cp.async.mbarrier.arrive.noinc: one arrival once all cp.async of this thread have landed
DEVICE void float_load_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
