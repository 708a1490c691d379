// What the warps of a CTA share, and how they wait for one another: stages of operands, tiles that were handed out, the result.
#pragma once
#include "config.cuh"
#include "ptx/barrier.cuh"
#include "scheduler.cuh"
#include "wait.cuh"

constexpr int BLOCK_K = 128;                        // bytes, elements, and columns of one scale
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int CHUNKS = BLOCK_N / CHUNK_N;           // of one wgmma's width, that a warpgroup works through one by one
constexpr int WARPS = WARPGROUPS * 4;               // consumer warps, of 16 rows each
constexpr int THREADS = (WARPGROUPS + 1) * 128;     // the last warpgroup has all warps that multiply nothing
constexpr int SCALE_N = gcd(CHUNK_N, 128);          // adjacent columns that are sure to share a scale of b
constexpr int B_SCALES = COLUMN_SCALES ? 1 : (128 - gcd(BLOCK_N, 128) + BLOCK_N + 127) / 128;  // scale columns a tile can touch
constexpr uint32_t AHEAD = STAGES < 6 ? STAGES : 6;  // stages that are filled while the other warps get ready
constexpr int TILES = 4;                            // that are known in advance, or not yet stored
constexpr uint32_t CLAIM_AHEAD = 4;                 // K blocks that are left to load when a CTA claims its next tile
constexpr int STORE_N = gcd(BLOCK_N, 64);           // columns of one store: 128, 64 or 32 bytes, swizzled likewise
constexpr int PART_N = BLOCK_N / PARTS;             // columns of the result that shared memory holds at a time

struct SharedStorage {
    alignas(1024) uint8_t a[STAGES][BLOCK_M * BLOCK_K];
    alignas(1024) uint8_t b[STAGES][BLOCK_N * BLOCK_K];
    alignas(1024) uint16_t d[COLUMN_SCALES ? 1 : PART_N / STORE_N][COLUMN_SCALES ? 1 : BLOCK_M * STORE_N];
    alignas(128) float a_scales[STAGES][BLOCK_M];
    alignas(128) float b_scales[STAGES][COLUMN_SCALES ? BLOCK_N : 4];
    Tile tiles[TILES];                              // what the scheduling warp hands out
    uint64_t full[STAGES], empty[STAGES];           // mbarriers: the stage has landed / every reader is done with it
    uint64_t tile_full[TILES], tile_empty[TILES];   // the same of tiles: it is known / done
    uint64_t d_full, d_empty;                       // the same of d: the tile is complete / on its way
    uint64_t claim;                                 // the producers are almost through their tiles; in a second CTA: has come
    uint32_t next_number;                           // the next tile's number, from the first CTA of the cluster
};
constexpr int BARRIERS = (STAGES + TILES + 1) * 2 + 1;  // from `full` to `claim`, in the order that `arrivals` knows
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "the host planned another amount of shared memory");
static_assert(BLOCK_M == 64 * WARPGROUPS && BLOCK_N == CHUNK_N * CHUNKS && BLOCK_N % (PARTS * STORE_N) == 0 && B_SCALES <= 4 && CLUSTER <= 2);

// What completes a phase of barrier i, counted from `full` on.
DEVICE uint32_t arrivals(uint32_t i) {
    if (i < STAGES) return COLUMN_SCALES ? 1 : 2;                            // full: the copies' bytes; b's scales
    if (i < STAGES * 2) return 32 * WARPS + (CLUSTER - 1) * WARPS;           // empty: as `release` arrives
    if (i < STAGES * 2 + TILES) return 1;                                    // tile_full
    if (i < STAGES * 2 + TILES * 2) return 1 + 32 * WARPS + (COLUMN_SCALES ? 0 : 32);  // tile_empty: all who read it
    if (i == STAGES * 2 + TILES * 2) return WARPS;                           // d_full
    if (i == STAGES * 2 + TILES * 2 + 1) return 32;                          // d_empty
    return CLUSTER > 1 && cluster_rank() == 0 ? CLUSTER : 1;                 // claim: every producer / the scheduling warp
}

struct Pipeline {
    uint32_t stage = 0, phase = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};
