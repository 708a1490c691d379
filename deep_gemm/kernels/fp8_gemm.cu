// d = a @ b.T on Hopper: E4M3 operands with an FP32 scale per 1x128 of a and per 128x128 of b, BF16 result.
//
// One warp streams tiles into shared memory; the consumer warpgroups multiply them, one K=128 block at a time, and promote every
// block's partial sum into FP32 with its scales (two-level accumulation, DeepSeek-V3 report, section 3.5.2); another warp sends
// finished tiles to d.
// docs/kernel.md walks through this file; config.cuh holds the constants.
#include "config.cuh"
#include "ptx/barrier.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "scheduler.cuh"

constexpr int BLOCK_K = 128;                        // bytes, elements, and columns of one scale
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int CHUNKS = BLOCK_N / CHUNK_N;           // of one wgmma's width, that a warpgroup works through one by one
constexpr int WARPS = WARPGROUPS * 4;               // consumer warps, of 16 rows each
constexpr int THREADS = (WARPGROUPS + 1) * 128;     // the last warpgroup has the producing and the storing warp
constexpr int SCALE_N = gcd(CHUNK_N, 128);          // adjacent columns that are sure to share a scale of b
constexpr int B_SCALES = (128 - gcd(BLOCK_N, 128) + BLOCK_N + 127) / 128;  // scale columns a tile can touch
constexpr int STORE_N = gcd(BLOCK_N, 64);           // columns of one store: 128, 64 or 32 bytes, swizzled likewise

struct SharedStorage {
    alignas(1024) uint8_t a[STAGES][BLOCK_M * BLOCK_K];
    alignas(1024) uint8_t b[STAGES][BLOCK_N * BLOCK_K];
    alignas(1024) uint16_t d[BLOCK_N / STORE_N][BLOCK_M * STORE_N];
    alignas(128) float a_scales[STAGES][BLOCK_M];
    float b_scales[STAGES][4];
    uint64_t full[STAGES], empty[STAGES];           // mbarriers: the stage has landed / every reader is done with it
    uint64_t d_full, d_empty;                       // the same of d: the tile is complete / on its way
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "the host planned another amount of shared memory");
static_assert(BLOCK_M == 64 * WARPGROUPS && BLOCK_N == CHUNK_N * CHUNKS && B_SCALES <= 4 && CLUSTER <= 2);

struct Args {
    TensorMap a, b, a_scales, d;
    Problem problem;
};

struct Pipeline {
    uint32_t stage = 0, phase = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// Spins until the phase is over. In a debug build nothing hangs: after WAIT_LIMIT steps of 2^30 ns the kernel ends with a store
// to an address that names the warp, 16 * (warp + 1). (A `trap` here would make ptxas spill in the warpgroups.)
DEVICE void wait(uint64_t& barrier, uint32_t phase) {
    const uint32_t address = shared_address(&barrier);
    const uint32_t start = WAIT_LIMIT ? global_timer() >> 30 : 0;
    while (!barrier_try_wait(address, phase)) {
        if (WAIT_LIMIT && uint32_t(global_timer() >> 30) - start > WAIT_LIMIT)
            *reinterpret_cast<volatile uint32_t*>(16 * (threadIdx.x / 32 + 1)) = phase;
    }
}

DEVICE void produce(const Args& args, SharedStorage& smem) {
    tensor_prefetch(args.a), tensor_prefetch(args.b), tensor_prefetch(args.a_scales), tensor_prefetch(args.d);
    const Problem& problem = args.problem;
    const uint32_t scale_rows = (problem.n + 127) / 128, rank = CLUSTER > 1 ? cluster_rank() : 0;
    Scheduler scheduler(problem);
    Pipeline pipe;
    for (Tile tile; scheduler.next(tile);) {
        const uint32_t scale_row = tile.n / 128;
        const float* b_scales = problem.b_scales + scale_row * problem.b_scale_stride_n;
        for (uint32_t block = 0; block < problem.k_blocks; ++block, pipe.advance()) {
            const uint32_t stage = pipe.stage, k = block * BLOCK_K, full = shared_address(&smem.full[stage]);
            const uint32_t a = shared_address(smem.a[stage]), b = shared_address(smem.b[stage]);
            wait(smem.empty[stage], pipe.phase ^ 1);
            barrier_expect_bytes(full, problem.stage_bytes);  // all that lands here, whoever sends it
            // CTAs of a cluster that need the same operand load half of it each, for both.
            if constexpr (CLUSTER_N == 2)
                tensor_load_multicast(a + rank * (BLOCK_M / 2 * BLOCK_K), args.a, k, tile.m + rank * (BLOCK_M / 2), full, 3);
            else
                tensor_load(a, args.a, k, tile.m, full);
            if constexpr (CLUSTER_M == 2)
                tensor_load_multicast(b + rank * (BLOCK_N / 2 * BLOCK_K), args.b, k, tile.n + rank * (BLOCK_N / 2), full, 3);
            else
                tensor_load(b, args.b, k, tile.n, full);
            tensor_load(shared_address(smem.a_scales[stage]), args.a_scales, tile.m, block, full);
#pragma unroll
            for (int i = 0; i < B_SCALES; ++i) {
                const uint32_t bytes = scale_row + i < scale_rows ? 4 : 0;
                float_load(shared_address(&smem.b_scales[stage][i]), b_scales + i * problem.b_scale_stride_n, bytes);
            }
            float_load_arrive(full);
            b_scales += problem.b_scale_stride_k;
        }
    }
}

// What one thread needs of a K block's scales: of its two rows, and of the tile's scale columns.
struct Scales {
    float a[2], b[B_SCALES];
};

// Adds a chunk's partial sum to the result: s = rn(scale_a * scale_b), result = fma(s, partial, result).
// `boundary` is the tile's first column that belongs to the second scale column.
DEVICE void promote(float (&result)[BLOCK_N / 2], float (&partial)[CHUNK_N / 2], const Scales& scales, int chunk, int boundary) {
#pragma unroll
    for (int i = 0; i < CHUNK_N; i += SCALE_N) {
        const int column = chunk * CHUNK_N + i;
        float b = scales.b[BLOCK_N % 128 == 0 ? column / 128 : 0];
        if constexpr (BLOCK_N % 128 != 0) {
#pragma unroll
            for (int j = 1; j < B_SCALES; ++j) b = column >= boundary + (j - 1) * 128 ? scales.b[j] : b;
        }
        const float s[2] = {__fmul_rn(scales.a[0], b), __fmul_rn(scales.a[1], b)};
#pragma unroll
        for (int j = 0; j < SCALE_N / 2; ++j) {
            float& r = result[column / 2 + j];
            r = __fmaf_rn(s[j / 2 % 2], partial[i / 2 + j], r);
        }
    }
}

class Consumer {
    SharedStorage& smem;
    uint32_t warp, lane, row;                       // row: the first of this thread's two, within the tile
    uint32_t peer_empty;                            // the address of `empty` in the other CTA of the cluster
    Pipeline pipe;
    float partial[BANKS][CHUNK_N / 2] = {};         // what the tensor cores add up

    // Tells the producers that a stage has been read: every lane its own CTA's, since every lane has read scales that come from
    // there (and so racecheck can follow the order); one lane the other's of the cluster, which sends operands alone.
    DEVICE void release(uint32_t stage) {
        barrier_arrive(shared_address(&smem.empty[stage]));
        if constexpr (CLUSTER > 1)
            if (lane == 0) barrier_arrive_cluster(peer_empty + stage * sizeof(uint64_t));
    }

    // Queues the four wgmma of one chunk.
    DEVICE void multiply(float (&bank)[CHUNK_N / 2], uint32_t stage, int chunk) {
        const uint64_t a = matrix_descriptor(shared_address(smem.a[stage]) + warp / 4 * (64 * BLOCK_K));
        const uint64_t b = matrix_descriptor(shared_address(smem.b[stage]) + chunk * (CHUNK_N * BLOCK_K));
        pin(bank);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK_K / 32; ++k) wgmma(bank, a + k * 2, b + k * 2, k > 0);
        wgmma_commit();
    }

    DEVICE Scales load_scales(uint32_t stage) const {
        Scales scales{{smem.a_scales[stage][row], smem.a_scales[stage][row + 8]}, {}};
#pragma unroll
        for (int i = 0; i < B_SCALES; ++i) scales.b[i] = smem.b_scales[stage][i];
        return scales;
    }

public:
    DEVICE explicit Consumer(SharedStorage& storage) : smem(storage) {
        warp = warp_index(), lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
        if constexpr (CLUSTER > 1) peer_empty = cluster_address(shared_address(smem.empty), cluster_rank() ^ 1);
    }

    // Multiplies and promotes BLOCKS K blocks. With two banks a chunk is promoted while the next one is in the tensor cores; the
    // last one is waited for, since ptxas serialises wgmma whose accumulators are in flight on a loop's back edge.
    template <int BLOCKS> DEVICE void accumulate(float (&result)[BLOCK_N / 2], int boundary) {
        constexpr int STEPS = BLOCKS * CHUNKS;
        uint32_t stages[BLOCKS];                    // of each K block
        Scales scales[BLOCKS];
        const auto receive = [&](int block) {
            stages[block] = pipe.stage;
            wait(smem.full[pipe.stage], pipe.phase);
            pipe.advance();
        };
        receive(0);
#pragma unroll
        for (int i = 0; i < STEPS + BANKS - 1; ++i) {
            const int block = i / CHUNKS, chunk = i % CHUNKS;
            if (i < STEPS) multiply(partial[i % BANKS], stages[block], chunk);
            // The next stage and its scales: how long they take hides behind the wait that follows.
            if (i == 0) scales[0] = load_scales(stages[0]);
            if (chunk == CHUNKS - 1 && block + 1 < BLOCKS) {
                receive(block + 1);
                scales[block + 1] = load_scales(stages[block + 1]);
            }
            const int done = i - (BANKS - 1);       // the chunk to promote, one behind if there are two banks
            if (done < 0) continue;
            if (BANKS == 2 && i < STEPS) wgmma_wait<1>();
            else wgmma_wait<0>();
            pin(partial[done % BANKS]);
            if (done % CHUNKS == CHUNKS - 1) release(stages[done / CHUNKS]);
            promote(result, partial[done % BANKS], scales[done / CHUNKS], done % CHUNKS, boundary);
        }
    }

    // Converts the tile to BF16, once the one before is on its way, and hands it over to the storing warp.
    DEVICE void store(const float (&result)[BLOCK_N / 2], uint32_t phase) {
        const uint32_t lane = lane_index();         // anew, for the main loop has no register for these addresses
        // stmatrix: lanes 0-7, 8-15, 16-23, 24-31 address the rows of (top, left), (bottom, left), (top, right), (bottom, right)
        const uint32_t matrix_row = warp * 16 + lane % 16, swizzle = (matrix_row * STORE_N * 2 / 128) % (STORE_N / 8);
        wait(smem.d_empty, phase ^ 1);
#pragma unroll
        for (int column = 0; column < BLOCK_N; column += 16) {
            const float* r = &result[column / 2];
            const uint32_t unit = (column % STORE_N / 8 + lane / 16) ^ swizzle;  // of 16 bytes, within the row
            store_matrix_x4(shared_address(smem.d[column / STORE_N]) + matrix_row * (STORE_N * 2) + unit * 16,
                            to_bf16x2(r[0], r[1]), to_bf16x2(r[2], r[3]), to_bf16x2(r[4], r[5]), to_bf16x2(r[6], r[7]));
        }
        store_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&smem.d_full));
    }
};

DEVICE void consume(const Args& args, SharedStorage& smem) {
    Consumer consumer(smem);
    Scheduler scheduler(args.problem);
    uint32_t phase = 0;
    for (Tile tile; scheduler.next(tile); phase ^= 1) {
        float result[BLOCK_N / 2] = {};
        const int boundary = 128 - tile.n % 128;
        uint32_t blocks = args.problem.k_blocks;
        for (; blocks >= UNROLL; blocks -= UNROLL) consumer.accumulate<UNROLL>(result, boundary);
        if constexpr (UNROLL > 1)
            for (; blocks > 0; --blocks) consumer.accumulate<1>(result, boundary);
        consumer.store(result, phase);
    }
}

// Sends finished tiles to d. A warp of its own, since issuing a store waits while the copy engine is busy.
DEVICE void write_back(const Args& args, SharedStorage& smem) {
    Scheduler scheduler(args.problem);
    uint32_t phase = 0;
    for (Tile tile; scheduler.next(tile); phase ^= 1) {
        wait(smem.d_full, phase);
#pragma unroll
        for (int column = 0; column < BLOCK_N; column += STORE_N)
            if (tile.m < args.problem.m && tile.n + column < args.problem.n)
                tensor_store(args.d, tile.n + column, tile.m, shared_address(smem.d[column / STORE_N]));
        store_commit();
        store_wait_read<0>();
        barrier_arrive(shared_address(&smem.d_empty));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) fp8_gemm(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(memory);
    if (threadIdx.x < STAGES) {
        barrier_init(shared_address(&smem.full[threadIdx.x]), 2);  // the copies' bytes, and b's scales
        barrier_init(shared_address(&smem.empty[threadIdx.x]), 32 * WARPS + (CLUSTER - 1) * WARPS);  // as `release` arrives
        if (threadIdx.x == 0) barrier_init(shared_address(&smem.d_full), WARPS), barrier_init(shared_address(&smem.d_empty), 1);
        barrier_init_fence();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    const uint32_t warp = warp_index();
    if (warp >= WARPS) {
        if constexpr (WARPGROUPS > 1) registers_decrease<PRODUCER_REGISTERS>();
        if (warp == WARPS) {                        // else: so `warp` is no register of produce's, which has few
            if (elect_one()) produce(args, smem);
        } else if (warp == WARPS + 1) {
            if (elect_one()) write_back(args, smem);
        }
    } else {
        if constexpr (WARPGROUPS > 1) registers_increase<CONSUMER_REGISTERS>();
        consume(args, smem);
    }
    // No CTA leaves while another of its cluster may still write into it.
    if constexpr (CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    }
}
