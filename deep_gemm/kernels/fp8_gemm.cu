// d = a @ b.T on Hopper, dense or grouped: E4M3 operands with an FP32 scale per 1x128 of a and per 128x128 of b, BF16 result; or,
// for weight gradients (COLUMN_SCALES), with one per 1x128 of b as well, FP32 result, added to c.
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
#include "storage.cuh"
#include "store.cuh"
#include "tiles.cuh"

// What is brought into a stage: everything as soon as it is empty; or, the first time, when its barrier is new, everything, or b
// and its scales alone, and the rest later.
enum Turn { LATER, FIRST, FIRST_B, FIRST_A };

// Brings one tile's operands, K blocks `block` .. `blocks` - 1. PLAIN: one box brings all rows of a, and there is no pace to keep.
template <bool PLAIN, Turn TURN = LATER>
DEVICE void load(const Args& args, SharedStorage& smem, const Tile& tile, Pipeline& pipe, uint32_t block, uint32_t blocks) {
    const Problem& problem = args.problem;
    const bool own_maps = along_k(problem);  // a group's a and b are matrices of their own
    const TensorMap& a_map = own_maps ? problem.maps[tile.group * 2] : args.a;
    const TensorMap& b_map = own_maps ? problem.maps[tile.group * 2 + 1] : args.b;
    const uint32_t b_group = own_maps ? 0 : tile.group, a_group = own_maps ? 0 : tile.batch;
    if (own_maps) tensor_map_acquire(&a_map), tensor_map_acquire(&b_map);
    const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
    const uint32_t rows = tile.end > tile.m ? min(tile.end - tile.m, uint32_t(BLOCK_M)) : 0;
    const uint32_t loaded = CLUSTER_N == 2 ? problem.box_rows * 2 : rows <= problem.box_rows ? problem.box_rows : round_up(rows, problem.box_rows);
    const bool narrow = NARROWS && tile.right <= tile.n + CHUNK_N;  // the first chunk's columns, or none, are all there are
    const uint32_t bytes = (loaded + (narrow ? CHUNK_N : BLOCK_N)) * BLOCK_K + problem.scale_rows * 4 + (COLUMN_SCALES ? BLOCK_N * 4 : 0);
    const uint32_t scale_row = tile.n / 128, scale_rows = (problem.n + 127) / 128;
    const uint32_t late = !problem.counter ? ~0u : tile.k_blocks > CLAIM_AHEAD ? tile.k_blocks - CLAIM_AHEAD : 0;
    const float* b_scales = problem.b_scales + tile.group * problem.b_scale_stride_g + scale_row * problem.b_scale_stride_n +
                            block * problem.b_scale_stride_k;
#pragma unroll 1
    for (; block < blocks; ++block, pipe.advance()) {
        const uint32_t stage = pipe.stage, full = shared_address(&smem.full[stage]);
        if constexpr (TURN == LATER) wait(smem.empty[stage], pipe.phase ^ 1);
        else if constexpr (TURN != FIRST_A) barrier_init(full, arrivals(0)), barrier_init_fence();
        if (!PLAIN && problem.pace) spin(problem.pace);
        if (TURN == LATER && block == late) barrier_arrive_cluster(cluster_address(shared_address(&smem.claim), 0));
        const uint32_t k = block * BLOCK_K, a = shared_address(smem.a[stage]), b = shared_address(smem.b[stage]);
        if constexpr (TURN != FIRST_A) barrier_expect_bytes(full, bytes);  // all that lands here, whoever sends it
        // CTAs of a cluster that need the same operand load half of it each, for both.
        if constexpr (TURN != FIRST_B) {
            if constexpr (CLUSTER_N == 2)
                tensor_load_multicast(a + rank * (BLOCK_M / 2 * BLOCK_K), a_map, k, tile.m + rank * (BLOCK_M / 2), a_group, full, 3);
            else
                tensor_load(a, a_map, k, tile.m, a_group, full);
            if constexpr (!PLAIN && CLUSTER_N == 1)
#pragma unroll 1
                for (uint32_t row = problem.box_rows; row < rows; row += problem.box_rows)
                    tensor_load(a + row * BLOCK_K, a_map, k, tile.m + row, a_group, full);
        }
        if constexpr (TURN != FIRST_A) {
            if (CLUSTER_M == 1 || tile.apart) {
                tensor_load(b, b_map, k, tile.n, b_group, full);
                if ((NARROWS || CLUSTER_M == 2) && !narrow)
                    tensor_load(b + BLOCK_N / 2 * BLOCK_K, b_map, k, tile.n + BLOCK_N / 2, b_group, full);
            } else if (rank == 0 || !narrow) {
                tensor_load_multicast(b + rank * (BLOCK_N / 2 * BLOCK_K), b_map, k, tile.n + rank * (BLOCK_N / 2), b_group, full, 3);
            }
        }
        if constexpr (TURN != FIRST_B)
            tensor_load(shared_address(smem.a_scales[stage]), args.a_scales, tile.m, tile.k / 128 + block, a_group, full);
        if constexpr (TURN == FIRST_A) continue;
        if constexpr (COLUMN_SCALES) {
            tensor_load(shared_address(smem.b_scales[stage]), args.b_scales, tile.n, tile.k / 128 + block, b_group, full);
        } else {
#pragma unroll
            for (int i = 0; i < B_SCALES; ++i) {
                const uint32_t size = scale_row + i < scale_rows ? 4 : 0;
                float_load(shared_address(&smem.b_scales[stage][i]), b_scales + i * problem.b_scale_stride_n, size);
            }
            float_load_arrive(full);
            b_scales += problem.b_scale_stride_k;
        }
    }
}

// How many K blocks of the first tile `start` brings. (In clusters the other CTA has to be ready.)
DEVICE uint32_t started(const Problem& problem) {
    return CLUSTER == 1 && problem.kind == DENSE ? min(AHEAD, (problem.k + 127) / 128) : 0;
}

// Has the first rows of a come into L2 while the kernel before still runs, which may be writing them. Each CTA sends for one box. One
// thread.
DEVICE void fetch_a(const Args& args) {
    const uint32_t blocks = (args.problem.k + 127) / 128, box = blockIdx.x / blocks, k = blockIdx.x - box * blocks;
    const uint32_t m = box * args.problem.box_rows;
    if (m >= args.problem.m) return;
    tensor_fetch(args.a, k * BLOCK_K, m, 0);
    tensor_fetch(args.a_scales, m, k, 0);
}

// Initialises the barriers of the first stages, and sends for what fills them, while the other warps get ready: what comes first
// is waited for longest. Launched to overlap with the kernel before, it does not wait for that one before it sends for b, which
// that one does not write. Leaves the tile for `produce` to hand out. One thread.
DEVICE void start(const Args& args, SharedStorage& smem) {
    uint32_t blocks = started(args.problem);
    if (blocks > 0) {
        Tile tile;
        Scheduler(args.problem).next_of_all(tile);
        if (tile.rows == Tile::NONE) blocks = 0;
        smem.tiles[0] = tile;
        Pipeline pipe, again;
        if (args.problem.overlaps) {
            load<true, FIRST_B>(args, smem, tile, pipe, 0, blocks);
            previous_kernel_wait();
            next_kernel_start();
            load<true, FIRST_A>(args, smem, tile, again, 0, blocks);
        } else {
            load<true, FIRST>(args, smem, tile, pipe, 0, blocks);
        }
    }
    for (uint32_t i = blocks; i < AHEAD; ++i) barrier_init(shared_address(&smem.full[i]), arrivals(0));
}

// Brings the operands of every tile, and hands out dense ones. One thread.
DEVICE void produce(const Args& args, SharedStorage& smem) {
    const Problem& problem = args.problem;
    if (problem.kind == DENSE) previous_kernel_wait();
    Scheduler scheduler(problem);
    uint32_t block = started(problem);
    Pipeline pipe{block % STAGES, block / STAGES};
    for (Tiles tiles(smem);; tiles.release(), block = 0) {
        Tile tile;
        if (problem.kind != DENSE) {
            tile = tiles.get();
        } else if (block > 0) {                     // the first one, which `start` has left there
            barrier_arrive(shared_address(&smem.tile_full[0]));
            tile = smem.tiles[0], scheduler.stride();
        } else {
            scheduler.next_of_all(tile), scheduler.stride();
            hand_out(smem, tile, tiles.index);
        }
        if (tile.rows == Tile::NONE) return;
        const bool one_box = CLUSTER_N == 2 || min(tile.end - tile.m, uint32_t(BLOCK_M)) <= problem.box_rows;
        if (problem.pace || !one_box) load<false>(args, smem, tile, pipe, block, tile.k_blocks);
        else load<true>(args, smem, tile, pipe, block, tile.k_blocks);
    }
}

// What one thread needs of a K block's scales: of its two rows, and of the tile's scale columns.
struct Scales {
    float a[2], b[B_SCALES];
};

// The same where every column has a scale: of the thread's columns in a chunk.
struct ColumnScales {
    static constexpr int COUNT = COLUMN_SCALES ? CHUNK_N / 4 : 1;
    float b[COUNT];
};

// Adds a chunk's partial sum to the result: s = rn(scale_a * scale_b), result = fma(s, partial, result).
// `boundary` is the tile's first column that belongs to the second scale column, somewhere from LOW to HIGH.
template <int LOW, int HIGH>
DEVICE void promote(float (&result)[BLOCK_N / 2], float (&partial)[CHUNK_N / 2], const Scales& scales, int chunk, int boundary) {
#pragma unroll
    for (int i = 0; i < CHUNK_N; i += SCALE_N) {
        const int column = chunk * CHUNK_N + i;
        float b = scales.b[BLOCK_N % 128 == 0 ? column / 128 : 0];
        if constexpr (BLOCK_N % 128 != 0) {
#pragma unroll
            for (int j = 1; j < B_SCALES; ++j) {
                const int beyond = column - (j - 1) * 128;
                if (beyond >= HIGH || (beyond >= LOW && beyond >= boundary)) b = scales.b[j];
            }
        }
        const float s[2] = {__fmul_rn(scales.a[0], b), __fmul_rn(scales.a[1], b)};
#pragma unroll
        for (int row = 0; row < 2; ++row)   // one after the other, so that s stays at the operand's port
#pragma unroll
            for (int j = 0; j < SCALE_N / 2; ++j) {
                if (j / 2 % 2 != row) continue;
                float& r = result[column / 2 + j];
                r = __fmaf_rn(s[row], partial[i / 2 + j], r);
            }
    }
}

// The same with a scale for each of the thread's columns.
DEVICE void promote(float (&result)[BLOCK_N / 2], float (&partial)[CHUNK_N / 2], const Scales& scales, const ColumnScales& columns,
                    int chunk) {
#pragma unroll
    for (int j = 0; j < CHUNK_N / 2; ++j) {
        float& r = result[chunk * CHUNK_N / 2 + j];
        r = __fmaf_rn(__fmul_rn(scales.a[j / 2 % 2], columns.b[j / 4 * 2 + j % 2]), partial[j], r);
    }
}

class Consumer {
    SharedStorage& smem;
    uint32_t warp, lane;
    uint32_t peer_empty;                            // the address of `empty` in the other CTA of the cluster
    uint32_t nothing;                               // of the problem
    Pipeline pipe;
    float partial[BANKS][CHUNK_N / 2] = {};         // what the tensor cores add up

    // Tells the producers that a stage has been read: every lane its own CTA's, since every lane has read scales that come from
    // there (and so racecheck can follow the order); one lane the other's of the cluster, which sends operands alone.
    DEVICE void release(uint32_t stage, uint32_t zero = 0) {
        barrier_arrive(shared_address(&smem.empty[stage]) + zero);
        if constexpr (CLUSTER > 1)
            if (lane_index() == 0) barrier_arrive_cluster(peer_empty + stage * sizeof(uint64_t));
    }

    // Queues the four wgmma of one chunk.
    DEVICE void multiply(float (&bank)[CHUNK_N / 2], uint32_t stage, int chunk) {
        constexpr uint32_t ROW = BLOCK_K / 16;      // units of a row
        const uint64_t a = matrix_descriptor(shared_address(smem.a) / 16 + (stage * BLOCK_M + warp / 4 * 64) * ROW);
        const uint64_t b = matrix_descriptor(shared_address(smem.b) / 16 + (stage * BLOCK_N + chunk * CHUNK_N) * ROW);
        pin(bank);
        wgmma_fence();
        wgmma_block(bank, a, b);
        wgmma_commit();
    }

    DEVICE Scales load_scales(uint32_t stage) const {
        Scales scales{{smem.a_scales[stage][row], smem.a_scales[stage][row + 8]}, {}};
        if constexpr (!COLUMN_SCALES)
#pragma unroll
            for (int i = 0; i < B_SCALES; ++i) scales.b[i] = smem.b_scales[stage][i];
        return scales;
    }

    DEVICE ColumnScales load_column_scales(uint32_t stage, int chunk) const {
        ColumnScales scales;
        if constexpr (COLUMN_SCALES)
#pragma unroll
            for (int j = 0; j < CHUNK_N / 4; ++j) scales.b[j] = smem.b_scales[stage][chunk * CHUNK_N + j / 2 * 8 + lane % 4 * 2 + j % 2];
        return scales;
    }

public:
    uint32_t row;                                   // the first of this thread's two, within the tile

    DEVICE Consumer(const Problem& problem, SharedStorage& storage) : smem(storage), nothing(COLUMN_SCALES ? problem.nothing : 0) {
        warp = warp_index(), lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
        if constexpr (CLUSTER > 1) peer_empty = cluster_address(shared_address(smem.empty), cluster_rank() ^ 1);
    }

    // Leaves out a K block, for rows that are nobody's.
    DEVICE void skip() {
        wait(smem.full[pipe.stage], pipe.phase);
        release(pipe.stage);
        pipe.advance();
    }

    DEVICE bool has_rows(uint32_t m, uint32_t end) const { return m + warp / 4 * 64 < end; }

    // Multiplies and promotes BLOCKS K blocks. With two banks a chunk is promoted while the next one is in the tensor cores; the
    // last one is waited for, since ptxas serialises wgmma whose accumulators are in flight on a loop's back edge.
    template <int BLOCKS, int CHUNKS = ::CHUNKS, int LOW = 1, int HIGH = 128>
    DEVICE void accumulate(float (&result)[BLOCK_N / 2], int boundary) {
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
            const ColumnScales columns = load_column_scales(stages[done / CHUNKS], done % CHUNKS);
            if (BANKS == 2 && i < STEPS) wgmma_wait<1>();
            else wgmma_wait<0>();
            pin(partial[done % BANKS]);
            // Scales of columns were loaded just now, those of rows a K block ago.
            const uint32_t zero = COLUMN_SCALES ? zero_after(columns.b[ColumnScales::COUNT - 1], nothing) : 0;
            if (done % CHUNKS == CHUNKS - 1) release(stages[done / CHUNKS], zero);
            if constexpr (COLUMN_SCALES) promote(result, partial[done % BANKS], scales[done / CHUNKS], columns, done % CHUNKS);
            else promote<LOW, HIGH>(result, partial[done % BANKS], scales[done / CHUNKS], done % CHUNKS, boundary);
        }
    }

    // Converts tile number `count`, counted from 1, to BF16, part by part, each once the one before is on its way, and hands it over
    // to the storing warp. Leaves zeros for the next one: between conversions they take no time, and 250 clk on their own.
    DEVICE void store(float (&result)[BLOCK_N / 2], uint32_t count) {
        const uint32_t lane = lane_index();         // anew, for the main loop has no register for these addresses
        // stmatrix: lanes 0-7, 8-15, 16-23, 24-31 address the rows of (top, left), (bottom, left), (top, right), (bottom, right)
        const uint32_t matrix_row = warp * 16 + lane % 16, swizzle = (matrix_row * STORE_N * 2 / 128) % (STORE_N / 8);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            wait(smem.d_empty, ((count - 1) * PARTS + part + 1) % 2);
#pragma unroll
            for (int column = 0; column < PART_N; column += 16) {
                float* r = &result[(part * PART_N + column) / 2];
                const uint32_t unit = (column % STORE_N / 8 + lane / 16) ^ swizzle;  // of 16 bytes, within the row
                store_matrix_x4(shared_address(smem.d[column / STORE_N]) + matrix_row * (STORE_N * 2) + unit * 16,
                                to_bf16x2(r[0], r[1]), to_bf16x2(r[2], r[3]), to_bf16x2(r[4], r[5]), to_bf16x2(r[6], r[7]));
#pragma unroll
                for (int j = 0; j < 8; ++j) r[j] = zero();
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&smem.d_full));
        }
    }
};

// Multiplies and promotes K blocks, UNROLL at a time. Choosing a scale for every short run of columns takes longer than can be
// hidden: then there is a loop for each of RANGES ranges of the boundary, in which few columns have a choice.
template <int LOW> DEVICE void accumulate_most(Consumer& consumer, float (&result)[BLOCK_N / 2], uint32_t& blocks, int boundary) {
    constexpr int HIGH = LOW - 1 + 128 / RANGES;
    if constexpr (HIGH < 128)
        if (any(boundary > HIGH)) return accumulate_most<HIGH + 1>(consumer, result, blocks, boundary);
    for (; any(blocks >= UNROLL); blocks -= UNROLL) consumer.accumulate<UNROLL, CHUNKS, LOW, HIGH>(result, boundary);
}

DEVICE void consume(const Args& args, SharedStorage& smem) {
    Consumer consumer(args.problem, smem);
    float result[BLOCK_N / 2] = {};
    for (Tiles tiles(smem);;) {
        const Tile& tile = tiles.get();
        if (uniform(tile.rows) == Tile::NONE) break;
        const uint32_t m = tile.m, end = tile.end, n = tile.n, batch = tile.batch;
        const bool narrow = NARROWS && tile.right <= n + CHUNK_N;
        const bool has_rows = consumer.has_rows(m, end);
        uint32_t blocks = has_rows ? tile.k_blocks : 0, skipped = has_rows ? 0 : tile.k_blocks;
        tiles.release();
        const int boundary = 128 - n % 128;
        // Loops that end by a vote are uniform to ptxas. By a number read from memory they are not, and then it computes stages,
        // phases and descriptors in every thread, and moves them to uniform registers before each wgmma (docs/facts.md).
        if constexpr (NARROWS)
            for (; any(narrow && blocks > 0); --blocks) consumer.accumulate<1, 1>(result, boundary);
        accumulate_most<1>(consumer, result, blocks, boundary);
        if constexpr (UNROLL > 1)
            for (; any(blocks > 0); --blocks) consumer.accumulate<1>(result, boundary);
        for (; any(skipped > 0); --skipped) consumer.skip();
        if constexpr (COLUMN_SCALES) store_sum(args.problem, result, m + consumer.row, end, n, batch);
        else consumer.store(result, tiles.index);
    }
}

// No CTA leaves while another of its cluster may still write into it.
DEVICE void leave() {
    __syncwarp();
    if constexpr (CLUSTER > 1) cluster_sync();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) fp8_gemm(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(memory);
    const uint32_t warp = warp_index();
    if (elect_one()) {
        if (warp == WARPS + 3) {
            tensor_prefetch(args.a), tensor_prefetch(args.b), tensor_prefetch(args.a_scales);
            start(args, smem);
        } else {
            // One thread of each warp: threads that initialise barriers by their index take ptxas a loop over lanes.
            for (uint32_t i = AHEAD + warp; i < BARRIERS; i += THREADS / 32 - 1)
                barrier_init(shared_address(smem.full) + i * sizeof(uint64_t), arrivals(i));
            if (warp == 0 && CLUSTER == 1 && args.problem.overlaps && args.problem.kind == DENSE) fetch_a(args);
        }
        barrier_init_fence();
    }
    if constexpr (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    if (warp < WARPS) {
        if constexpr (WARPGROUPS > 1) registers_increase<CONSUMER_REGISTERS>();
        consume(args, smem);
        leave();
    } else {
        if constexpr (WARPGROUPS > 1) registers_decrease<PRODUCER_REGISTERS>();
        if (warp == WARPS) {
            if constexpr (!COLUMN_SCALES) clear_padding(args.problem);
        } else if (warp == WARPS + 1) {
            if constexpr (!COLUMN_SCALES) write_back(args, smem);
        } else if (warp == WARPS + 2) {
            schedule(args, smem);
        } else {
            if (elect_one()) produce(args, smem);
        }
        leave();
    }
}
