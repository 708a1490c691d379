// d = a @ b.T for few rows of a, dense: as fast as b comes from memory.
//
// SWAPPED: b lies on the m side of wgmma, 64 rows of it to a warpgroup, and a on the n side, no wider than it has rows; else the other
// way round. A CTA has one output tile, or, with the others of its cluster, a share of the tile's K blocks: then each CTA adds up
// one part of the tile, from what the others send it, in the order of K. As much of b as shared memory holds is under way before
// anything is waited for: for the kernel before, too, if this one was launched to overlap with it.
// docs/kernel.md walks through this file; config.cuh holds the constants.
#include "config.cuh"
#include "problem.cuh"
#include "ptx/barrier.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "wait.cuh"

constexpr int BLOCK_K = 128;                        // bytes, elements, and columns of one scale
constexpr int HEIGHT = 64 * WARPGROUPS;             // of the m side; WIDTH of the n side
constexpr int TOKENS = SWAPPED ? WIDTH : HEIGHT;    // rows of a
constexpr int BLOCK_N = SWAPPED ? HEIGHT : WIDTH;   // rows of b
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int THREADS = CONSUMERS + 64;             // one warp sends for b, another for a
enum { FIRST, READY, B_READY, A_READY, READ };      // barriers of the CTA: what may be loaded into, waited for, written over
constexpr int PIECES = WIDTH / 8;                   // of 8 columns of wgmma: two rows by two columns for each thread
constexpr uint32_t AHEAD = 4;                       // stages that are filled while the other warps get ready
constexpr int WARPS = CONSUMERS / 32;
constexpr int SUM = PIECES * 512;                   // bytes of a warp's sums
constexpr int ROW = WIDTH * 2 + 16;                 // bytes of a row of the tile in shared memory: padded against bank conflicts
constexpr int B_SCALES = SWAPPED || 128 % WIDTH == 0 ? 1 : 2;  // columns of scales that a warpgroup's rows of b can touch
constexpr int RUN = 16;                             // columns of b, which have one scale: tiles begin at multiples of it
constexpr int RUNS = (WIDTH + RUN - 1) / RUN;
constexpr int A_SCALES = SWAPPED ? WIDTH / 4 : 2;   // that a thread needs of a K block
constexpr int SCALES = TOKENS < 32 ? 32 : TOKENS;   // of one stage, which starts at a multiple of 128 bytes
static_assert(B_SCALES == 1 || WIDTH % RUN == 0, "a run of columns straddles columns of scales");
static_assert(SWAPPED || HEIGHT * ROW <= (TOKENS + BLOCK_N) * BLOCK_K, "a tile's rows take more than one stage's operands");

// Shared memory, by address: how many stages there are is known at the launch.
struct Storage {
    uint32_t base, stages;
    DEVICE uint32_t b(uint32_t stage) const { return base + stage * (BLOCK_N * BLOCK_K); }
    DEVICE uint32_t a(uint32_t stage) const { return b(stages) + stage * (TOKENS * BLOCK_K); }
    DEVICE uint32_t a_scales(uint32_t stage) const { return a(stages) + stage * (SCALES * 4); }
    DEVICE uint32_t full(uint32_t stage) const { return a_scales(stages) + stage * 8; }    // mbarriers: b, a and its scales have landed,
    DEVICE uint32_t empty(uint32_t stage) const { return full(stages) + stage * 8; }       // every reader is done with them,
    DEVICE uint32_t received() const { return empty(stages); }                             // the other CTAs' sums are here:
    DEVICE uint32_t sums() const { return round_up(received() + 8, 16); }  // [others][warps that add theirs][SUM]
};

// What a CTA multiplies. The first copy waits for it, so nothing is divided: the split is a power of two, and there are one or two
// rows of tiles. In the grid a tile's parts of K lie beside each other, and so do a column's tiles. A cluster is the parts of a tile,
// or else the two tiles of a column, which share nothing: they are neighbours only (`Plan.cluster`).
struct Work {
    uint32_t m, n, end;                             // first row and column of the tile, and the first row that is not its own
    uint32_t column;                                // of tiles
    uint32_t first, blocks;                         // K blocks
    uint32_t rank, split;                           // which part of K, and into how many it is split

    DEVICE explicit Work(const Problem& problem) {
        split = problem.split, rank = cluster_rank() & (split - 1);  // 0 for both tiles of a column
        const uint32_t shift = __popc(split - 1), tile = blockIdx.x >> shift, two = problem.m > TOKENS;
        const uint32_t all = (problem.k + 127) / 128;
        column = tile >> two;
        m = (tile & two) * problem.tile_rows, n = column * BLOCK_N, end = min(problem.m, m + problem.tile_rows);
        first = all * rank >> shift, blocks = (all * (rank + 1) >> shift) - first;
    }
};

struct Pipeline {
    uint32_t stage = 0, phase = 0;
    DEVICE void advance(uint32_t stages, uint32_t blocks = 1) {
        stage += blocks;
        if (stage >= stages) stage = 0, phase ^= 1;
    }
};

// Sends for what K blocks need of b or of a, one after the other. The first few come while the other warps get ready. One thread.
struct Loader {
    const Args& args;
    const Storage& smem;
    const Work& work;
    uint32_t block = 0;
    Pipeline pipe;

    // `copy` sends for K block `k` into a stage, and has its barrier told.
    template <typename Copy> DEVICE void load(uint32_t until, const Copy& copy) {
#pragma unroll 1
        for (; block < until; ++block, pipe.advance(smem.stages)) {
            if (block >= smem.stages) wait(smem.empty(pipe.stage), pipe.phase ^ 1);
            copy(pipe.stage, work.first + block, smem.full(pipe.stage));
        }
    }

    DEVICE void load_b(uint32_t until) {
        load(until, [&](uint32_t stage, uint32_t k, uint32_t barrier) {
            barrier_expect_bytes(barrier, BLOCK_N * BLOCK_K);
            tensor_load(smem.b(stage), args.b, k * BLOCK_K, work.n, 0, barrier);
        });
    }

    // Has the first of a come into L2 while the kernel before still runs, which may be writing it; how long what follows takes, stages
    // hide. Each column of tiles sends for other K blocks.
    DEVICE void fetch_a() const {
        const uint32_t columns = (args.problem.n + BLOCK_N - 1) / BLOCK_N, until = min(work.blocks, 2 * smem.stages);
#pragma unroll 1
        for (uint32_t i = work.column; i < until; i += columns) {
            tensor_fetch(args.a, (work.first + i) * BLOCK_K, work.m, 0);
            tensor_fetch(args.a_scales, work.m, work.first + i, 0);
        }
    }

    DEVICE void load_a(uint32_t until) {
        load(until, [&](uint32_t stage, uint32_t k, uint32_t barrier) {
            barrier_expect_bytes(barrier, args.problem.box_rows * BLOCK_K + args.problem.scale_rows * 4);
            tensor_load(smem.a(stage), args.a, k * BLOCK_K, work.m, 0, barrier);
            tensor_load(smem.a_scales(stage), args.a_scales, work.m, k, 0, barrier);
        });
    }
};

// The bits of one number where the mask has ones, and of another where it has zeros.
DEVICE float blend(uint32_t mask, float ones, float zeros) {
    return __uint_as_float((mask & __float_as_uint(ones)) | (~mask & __float_as_uint(zeros)));
}

class Consumer {
    const Storage& smem;
    const Work& work;
    const bool reused;                              // stages are, by later K blocks
    const uint32_t nothing;                         // of the problem
    const float* b_scales;                          // of the warpgroup's rows and this CTA's K blocks
    int64_t b_scale_stride, second_b_scales;        // from one K block to the next; to the second column of scales, which
    uint32_t second[RUNS];                          // these runs have: a mask of ones, or zeros
    float b_scale[B_SCALES], next_b_scale[B_SCALES];  // of K block `lane` of these 32, and of the next
    uint32_t sums, stride;                          // what the others send of the warp's part, one after the other, and
    uint32_t mailbox, mailbox_barrier;              // where the warp's own go, and what counts them
    uint32_t warp = warp_index(), lane = threadIdx.x % 32, row = warp * 16 + lane / 4;  // of wgmma, and 8 more
    Pipeline pipe;
    float result[WIDTH / 2] = {};                   // rows lane / 4 and 8 more of the warp's 16, by columns
    float partial[2][WIDTH / 2] = {};               // what the tensor cores add up: of one K block, and of the next

    DEVICE void load_b_scales(float (&b)[B_SCALES], uint32_t block) const {
#pragma unroll
        for (int i = 0; i < B_SCALES; ++i) b[i] = block < work.blocks ? b_scales[block * b_scale_stride + i * second_b_scales] : 0;
    }

    // Goes on to the next 32 K blocks, of which `block` is the first.
    DEVICE void next_b_scales(uint32_t block) {
#pragma unroll
        for (int i = 0; i < B_SCALES; ++i) b_scale[i] = next_b_scale[i];
        load_b_scales(next_b_scale, block + 32 + lane);
    }

    // Queues the four wgmma of the K block that lies `i` stages behind `first`.
    DEVICE void multiply(float (&bank)[WIDTH / 2], uint32_t first, int i) {
        constexpr uint32_t UNITS = BLOCK_K / 16;    // of a row
        const uint32_t high = SWAPPED ? smem.b(first) : smem.a(first), wide = SWAPPED ? smem.a(first) : smem.b(first);
        const uint64_t left = matrix_descriptor(high / 16 + warp / 4 * 64 * UNITS) + i * HEIGHT * UNITS;
        const uint64_t right = matrix_descriptor(wide / 16) + i * WIDTH * UNITS;
        pin(bank);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BLOCK_K / 32; ++k) wgmma(bank, left + k * 2, right + k * 2, k > 0);
        wgmma_commit();
    }

    // The scales of a: of the thread's columns, or of its two rows.
    DEVICE void load_a_scales(float (&a)[A_SCALES], uint32_t stage) const {
        if constexpr (SWAPPED) {
#pragma unroll
            for (int j = 0; j < A_SCALES; j += 2) {
                const float2 two = load_shared_float2(smem.a_scales(stage) + (j * 4 + lane % 4 * 2) * 4);
                a[j] = two.x, a[j + 1] = two.y;
            }
        } else {
            a[0] = load_shared_float(smem.a_scales(stage) + row * 4), a[1] = load_shared_float(smem.a_scales(stage) + (row + 8) * 4);
        }
    }

    // Tells the loading warps that a stage has been read, once its last scale has.
    DEVICE void release(uint32_t stage, float last) const { barrier_arrive(smem.empty(stage) + zero_after(last, nothing)); }

    // Multiplies and promotes BLOCKS K blocks, of which `block` is the first. One is promoted while the next is multiplied. Their stages
    // lie one behind the other, for there is a multiple of UNROLL, or none is used again: so addresses are the first one's and a constant.
    // Whatever is computed between two K blocks, copies and tensor cores wait for.
    template <int BLOCKS> DEVICE void accumulate(uint32_t block) {
        float a_scales[2][A_SCALES], b[BLOCKS * B_SCALES];
        const uint32_t first = pipe.stage;
#pragma unroll
        for (int i = 0; i < BLOCKS * B_SCALES; ++i) b[i] = __shfl_sync(~0u, b_scale[i % B_SCALES], (block + i / B_SCALES) % 32);
        pin(b);                                     // ptxas would take each from its lane only when it is wanted
#pragma unroll
        for (int i = 0; i <= BLOCKS; ++i) {
            if (i < BLOCKS) {
                wait(smem.full(first) + i * 8, pipe.phase);
                multiply(partial[i % 2], first, i);
                load_a_scales(a_scales[i % 2], first + i);
            }
            if (i == 0) continue;
            const int done = i - 1;
            const float (&a)[A_SCALES] = a_scales[done % 2];
            float (&bank)[WIDTH / 2] = partial[done % 2];
            if (i < BLOCKS) wgmma_wait<1>();
            else wgmma_wait<0>();
            pin(bank);
            if (reused) release(first + done, a[A_SCALES - 1]);
            float s[B_SCALES][A_SCALES];
#pragma unroll
            for (int j = 0; j < B_SCALES * A_SCALES; ++j)
                s[j / A_SCALES][j % A_SCALES] = __fmul_rn(a[j % A_SCALES], b[done * B_SCALES + j / A_SCALES]);
#pragma unroll
            for (int j = 0; j < WIDTH / 2; ++j) {
                const int k = SWAPPED ? j / 4 * 2 + j % 2 : j / 2 % 2;
                const float scale = B_SCALES == 1 ? s[0][k] : blend(second[j * 2 / RUN], s[B_SCALES - 1][k], s[0][k]);
                result[j] = __fmaf_rn(scale, bank[j], result[j]);
            }
        }
        pipe.advance(smem.stages, BLOCKS);
    }

public:
    bool own;                                       // the warp's part of the tile is this CTA's

    DEVICE Consumer(const Problem& problem, const Storage& storage, const Work& w)
        : smem(storage), work(w), reused(w.blocks > storage.stages), nothing(unknown(problem.nothing)) {
        const uint32_t row = min(work.n + (SWAPPED ? warp / 4 * 64 : 0), problem.n - 1) / 128;
        b_scale_stride = problem.b_scale_stride_k;
        b_scales = problem.b_scales + row * problem.b_scale_stride_n + work.first * b_scale_stride;
        second_b_scales = (row + 1) * 128 < problem.n ? problem.b_scale_stride_n : 0;
        // Masks, not conditions: a condition would cost ptxas two instructions more for each of them, and K block.
#pragma unroll
        for (int i = 0; i < RUNS; ++i) second[i] = (work.n % 128 + i * RUN < 128 ? 0 : ~0u) | nothing;
        load_b_scales(b_scale, lane), load_b_scales(next_b_scale, 32 + lane);
        const uint32_t owner = warp * work.split / WARPS, share = WARPS >> __popc(work.split - 1);
        own = owner == work.rank, stride = share * SUM;
        sums = smem.sums() + (warp - owner * share) * SUM + lane * 16;
        mailbox = sums + (work.rank - (work.rank > owner)) * stride, mailbox_barrier = cluster_address(smem.received(), owner);
        mailbox = cluster_address(mailbox, owner);
    }

    DEVICE void multiply() {
        uint32_t block = 0;
        for (; any(block + UNROLL <= work.blocks); block += UNROLL) {
            if (block > 0 && block % 32 == 0) next_b_scales(block);
            accumulate<UNROLL>(block);
        }
        if (block > 0 && block % 32 == 0) next_b_scales(block);
        constexpr uint32_t HALF = UNROLL / 2;
        for (; HALF > 2 && any(block + HALF <= work.blocks); block += HALF) accumulate<HALF>(block);
        for (; any(block < work.blocks); ++block) accumulate<1>(block);
    }

    // Warp by warp the tile belongs to the CTAs of the cluster. Sends the warp's sums to its like in the CTA that has them.
    DEVICE void send() {
        if (own) return;
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
            const float* r = &result[j * 4];
            store_remote(mailbox + j * 512, float4{r[0], r[1], r[2], r[3]}, mailbox_barrier);
        }
    }

    // Adds up what the others have sent and the warp's own sums, in the order of K; as much at a time as there are registers for.
    DEVICE void add() {
        wait<true>(smem.received(), 0);
        constexpr int AT_ONCE = PIECES < 8 ? PIECES : PIECES % 8 ? PIECES / 2 : 8;
#pragma unroll
        for (int first = 0; first < PIECES; first += AT_ONCE) {
            float total[AT_ONCE * 4];
            uint32_t from = sums + first * 512;
#pragma unroll 1
            for (uint32_t part = 0; part < work.split; ++part) {
                const bool here = part == work.rank;
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const float* r = &result[(first + j) * 4];
                    float4 x{r[0], r[1], r[2], r[3]};
                    if (!here) x = load_shared_float4(from + j * 512);
                    float* t = &total[j * 4];
                    t[0] = part ? __fadd_rn(t[0], x.x) : x.x, t[1] = part ? __fadd_rn(t[1], x.y) : x.y;
                    t[2] = part ? __fadd_rn(t[2], x.z) : x.z, t[3] = part ? __fadd_rn(t[3], x.w) : x.w;
                }
                from += here ? 0 : stride;
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE * 4; ++j) result[first * 4 + j] = total[j];
        }
    }

    // To d, as BF16. b on the m side: of every piece 8 rows and 16 columns, once they are transposed; else whole rows of 16 bytes, by
    // way of shared memory where operands were.
    DEVICE void store(const Problem& problem) {
        const uint32_t tile = smem.base + warp * (16 * ROW);
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
            const float* r = &result[j * 4];
            const uint32_t first = to_bf16x2(r[0], r[1]), second = to_bf16x2(r[2], r[3]);
            if constexpr (SWAPPED) {
                const uint32_t left = transpose_matrix(first), right = transpose_matrix(second);
                const uint32_t m = work.m + j * 8 + lane / 4, n = work.n + warp * 16 + lane % 4 * 2;
                uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(problem.d) + m * problem.d_stride_m + n);
                if (m < work.end && n < problem.n) to[0] = left;
                if (m < work.end && n + 8 < problem.n) to[4] = right;
            } else {
                const uint32_t to = tile + lane / 4 * ROW + j * 16 + lane % 4 * 4;
                store_shared(to, first), store_shared(to + 8 * ROW, second);
            }
        }
        if constexpr (!SWAPPED) {
            __syncwarp();
#pragma unroll
            for (uint32_t i = lane; i < 16 * (WIDTH / 8); i += 32) {
                const uint32_t unit = i % (WIDTH / 8), r = i / (WIDTH / 8), m = work.m + warp * 16 + r, n = work.n + unit * 8;
                uint16_t* to = static_cast<uint16_t*>(problem.d) + m * problem.d_stride_m + n;
                if (m < work.end && n < problem.n) *reinterpret_cast<float4*>(to) = load_shared_float4(tile + r * ROW + unit * 16);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) fp8_gemm(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const Problem& problem = args.problem;
    const Storage smem{shared_address(memory), problem.stages};
    const Work work(problem);
    const uint32_t warp = warp_index(), soon = min(min(AHEAD, smem.stages), work.blocks);
    const bool at_once = work.blocks <= smem.stages;

    if (warp < WARPS) {
        Consumer consumer(problem, smem, work);
        if (elect_one()) {
            for (uint32_t i = warp; i < min(smem.stages, work.blocks); i += WARPS) {
                if (i >= AHEAD) barrier_init(smem.full(i), 2);
                if (work.blocks > smem.stages) barrier_init(smem.empty(i), CONSUMERS);
            }
            barrier_init_fence();
        }
        barrier_arrive<B_READY, CONSUMERS + 32>(), barrier_arrive<A_READY, CONSUMERS + 32>();
        if (work.split > 1) cluster_arrive();
        barrier_sync<READY, THREADS>();
        if (work.split > 1) cluster_wait();         // the others' barriers are ready, too
        consumer.multiply();
        if (work.split > 1) consumer.send();
        if constexpr (!SWAPPED) barrier_sync<READ, CONSUMERS>();  // nobody reads operands any more
        if (!consumer.own) return;
        if (work.split > 1) consumer.add();
        consumer.store(problem);
    } else if (warp == WARPS) {
        Loader loader{args, smem, work};
        if (elect_one()) {
            // The first copy leaves before other barriers are initialised. But where all of b is sent for at once, a is all that the CTA
            // waits for: a should not queue behind it.
            if (!at_once) barrier_init(smem.full(0), 2), barrier_init_fence(), loader.load_b(1);
            for (uint32_t i = loader.block; i < soon; ++i) barrier_init(smem.full(i), 2);
            barrier_init_fence();
        }
        barrier_arrive<FIRST, 64>();
        if (elect_one()) loader.load_b(soon);
        barrier_arrive<READY, THREADS>();
        if (work.split > 1) cluster_arrive();
        barrier_sync<B_READY, CONSUMERS + 32>();
        if (elect_one()) loader.load_b(work.blocks);
    } else {
        Loader loader{args, smem, work};
        // The next kernel, once it starts, fills its stages. Where this one has far more to come than its own hold, that takes memory
        // from it, and leaves the next one nothing to do while it waits for this one's end. Where all has been sent for, it takes none.
        const bool later = smem.stages * 5 < work.blocks * 3;
        if (elect_one()) {
            if (work.split > 1) {
                barrier_init(smem.received(), 1);
                barrier_init_fence();
                barrier_expect_bytes(smem.received(), (work.split - 1) * (WARPS >> __popc(work.split - 1)) * SUM);
            }
            tensor_prefetch(args.a), tensor_prefetch(args.a_scales);
            if (problem.overlaps) loader.fetch_a();
        }
        if (work.split > 1) cluster_arrive();
        barrier_sync<FIRST, 64>();
        if (elect_one()) {
            if (at_once) next_kernel_start();
            previous_kernel_wait();                 // which may write a, and read or write d
            if (!later) next_kernel_start();
            loader.load_a(soon);
        }
        barrier_arrive<READY, THREADS>();
        barrier_sync<A_READY, CONSUMERS + 32>();
        if (elect_one()) {
            if (later) loader.load_a((smem.stages + work.blocks) / 2), next_kernel_start();
            loader.load_a(work.blocks);
        }
    }
}
