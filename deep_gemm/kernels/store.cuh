// To d: finished tiles from shared memory, FP32 sums from registers, and zeros for padding rows.
#pragma once
#include "config.cuh"
#include "ptx/tma.cuh"
#include "storage.cuh"
#include "tiles.cuh"

// Sends rows `from` .. `to` of a part of a finished tile to d, those of the tile's group.
DEVICE void write_rows(const Problem& problem, const SharedStorage& smem, const Tile& tile, uint32_t part, uint32_t from, uint32_t to) {
    constexpr uint32_t UNITS = PART_N / 8, BATCH = 4;  // units of 16 bytes; how many a lane loads before it stores them
    uint16_t* const d = static_cast<uint16_t*>(problem.d) + tile.batch * problem.d_stride_g + tile.m * problem.d_stride_m + tile.n +
                        part * PART_N;
#pragma unroll 1
    for (uint32_t first = from * UNITS + lane_index(); first < to * UNITS; first += 32 * BATCH) {
        uint4 values[BATCH];
        bool owned[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const uint32_t i = min(first + j * 32, to * UNITS - 1), row = i / UNITS, column = i % UNITS * 8;
            owned[j] = problem.kind != CONTIGUOUS || problem.layout[tile.m + row] == tile.group;
            const uint32_t unit = column % STORE_N / 8 ^ (row * STORE_N * 2 / 128) % (STORE_N / 8);  // as `store` swizzled it
            values[j] = *reinterpret_cast<const uint4*>(&smem.d[column / STORE_N][row * STORE_N + unit * 8]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const uint32_t i = first + j * 32, row = i / UNITS, column = i % UNITS * 8;
            if (owned[j] && i < to * UNITS && tile.n + part * PART_N + column < tile.right)
                *reinterpret_cast<uint4*>(d + row * problem.d_stride_m + column) = values[j];
        }
    }
}

// Sends finished tiles to d: by the copy engine what makes whole boxes, row by row what is left. A warp of its own, since issuing
// a store waits while the copy engine is busy. The proxy fence may stand on either side of the barrier, as long as it is in the
// CTA of the copy (Lustig, Cooksey, Giroux: Mixed-Proxy Extensions for the NVIDIA PTX Memory Consistency Model, section 5.4);
// here nobody who multiplies waits for it.
DEVICE void write_back(const Args& args, SharedStorage& smem) {
    tensor_prefetch(args.d);
    for (Tiles tiles(smem);; tiles.release()) {
        const Tile& tile = tiles.get();
        if (tile.rows == Tile::NONE) break;
        const uint32_t rows = tile.end > tile.m ? min(tile.end - tile.m, uint32_t(BLOCK_M)) : 0;
        const uint32_t boxed = tile.rows == Tile::SCATTERED ? 0 : tile.end == args.problem.m ? rows : rows / STORE_M * STORE_M;
#pragma unroll 1
        for (uint32_t part = 0; part < PARTS; ++part) {
            wait(smem.d_full, (tiles.index * PARTS + part) % 2);
            if (elect_one()) {
                store_fence();
#pragma unroll 1
                for (uint32_t row = 0; row < boxed; row += STORE_M)
#pragma unroll
                    for (int column = 0; column < PART_N; column += STORE_N)
                        if (tile.n + part * PART_N + column < tile.right)
                            tensor_store(args.d, tile.n + part * PART_N + column, tile.m + row, tile.batch,
                                         shared_address(smem.d[column / STORE_N]) + row * (STORE_N * 2));
                store_commit();
                store_wait_read<0>();
            }
            __syncwarp();
            if (boxed < rows) write_rows(args.problem, smem, tile, part, boxed, rows);
            barrier_arrive(shared_address(&smem.d_empty));
        }
    }
}

// Adds FP32 sums to c and writes them to d: those of a thread, whose rows are `row` and `row` + 8. Leaves zeros.
DEVICE void store_sum(const Problem& problem, float (&result)[BLOCK_N / 2], uint32_t row, uint32_t end, uint32_t n, uint32_t batch) {
#pragma unroll
    for (int j = 0; j < BLOCK_N / 4; ++j) {
        const uint32_t r = row + j % 2 * 8, column = n + j / 2 * 8 + lane_index() % 4 * 2;
        if (r >= end || column >= problem.n) continue;
        const int64_t offset = batch * problem.d_stride_g + r * problem.d_stride_m + column;
        float2 sum{result[j * 2], result[j * 2 + 1]};
        if (problem.c) {
            const float2 c = *reinterpret_cast<const float2*>(problem.c + offset);
            sum.x = __fadd_rn(c.x, sum.x), sum.y = __fadd_rn(c.y, sum.y);
        }
        *reinterpret_cast<float2*>(static_cast<float*>(problem.d) + offset) = sum;
    }
#pragma unroll
    for (float& r : result) r = 0;
}

// Fills rows of d with zeros.
DEVICE void clear_rows(const Problem& problem, uint32_t from, uint32_t to) {
#pragma unroll 1
    for (; from < to; ++from)
#pragma unroll 1
        for (uint32_t column = lane_index() * 8; column < problem.n; column += 32 * 8)
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(problem.d) + from * problem.d_stride_m + column) = uint4{};
}

// Fills padding rows with zeros: of CONTIGUOUS, all of them; of ENDS, those up to where the next group may start.
DEVICE void clear_padding(const Problem& problem) {
    if (!problem.clear_padding) return;
    previous_kernel_wait();
    if (problem.kind == CONTIGUOUS) {
        for (uint32_t first = blockIdx.x * 32; first < problem.m; first += gridDim.x * 32) {
            const uint32_t row = first + lane_index();
            uint32_t padding = __ballot_sync(~0u, row < problem.m && uint32_t(problem.layout[row]) >= problem.groups);
            for (; padding; padding &= padding - 1) clear_rows(problem, first + __ffs(padding) - 1, first + __ffs(padding));
        }
    } else {
        for (uint32_t group = blockIdx.x; group < problem.groups; group += gridDim.x) {
            const uint32_t end = min(uint32_t(max(problem.layout[group], 0)), problem.m);
            clear_rows(problem, end, min(round_up(end, problem.alignment), problem.m));
        }
    }
}
