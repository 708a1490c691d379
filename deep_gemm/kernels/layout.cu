// Copies FP32 scales of any strides into rows along M, the order in which the GEMM's copy engine reads them.
//
// Axes are batch, row and column; columns are along M, adjacent in the output. In the input it is mostly the rows that are: a block
// reads a tile along whichever of the two has the smaller stride, and writes it along M from shared memory.
#include "ptx/base.cuh"
#include "tile.cuh"

constexpr int STEPS = ELEMENTS / THREADS;           // elements of one thread, all in flight at once

struct Args {
    const float* input;
    float* output;
    int64_t rows, columns;
    int64_t input_batch, input_row, input_column;   // strides, in elements
    int64_t output_batch, output_row;
    uint32_t batches, row_tiles;
    uint32_t tile_rows, along_rows;                 // the tile's shape, and whether it is read along rows
};

DEVICE uint32_t clamp(int64_t size, uint32_t limit) { return size < limit ? uint32_t(size) : limit; }

// A step moves threads by so many rows and columns. LANES: neighbouring threads along the axis that is read or written.
template <int ROWS, bool ALONG_ROWS> DEVICE void copy_tile(const Args& args, uint32_t batch, float* tile) {
    constexpr int COLUMNS = ELEMENTS / ROWS, PITCH = COLUMNS + 32 / ROWS;  // a warp along rows stores to 32 different banks
    const int64_t first_row = int64_t(blockIdx.x % args.row_tiles) * ROWS;
    const int64_t first_column = int64_t(blockIdx.x / args.row_tiles) * COLUMNS;
    const uint32_t rows = clamp(args.rows - first_row, ROWS), columns = clamp(args.columns - first_column, COLUMNS);
    {
        constexpr int LANES = ALONG_ROWS ? ROWS : COLUMNS, STEP = THREADS / LANES;
        constexpr int DOWN = ALONG_ROWS ? 0 : STEP, ACROSS = ALONG_ROWS ? STEP : 0;
        static_assert(STEP > 0, "a step reads whole lines of the tile");
        const uint32_t lane = threadIdx.x % LANES, line = threadIdx.x / LANES;
        const uint32_t row = ALONG_ROWS ? lane : line, column = ALONG_ROWS ? line : lane;
        const float* input = args.input + batch * args.input_batch + (first_row + row) * args.input_row +
                             (first_column + column) * args.input_column;
        const int64_t stride = DOWN * args.input_row + ACROSS * args.input_column;
        float values[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i, input += stride)
            values[i] = row + i * DOWN < rows && column + i * ACROSS < columns ? *input : 0;
#pragma unroll
        for (int i = 0; i < STEPS; ++i) tile[(row + i * DOWN) * PITCH + column + i * ACROSS] = values[i];
    }
    __syncthreads();
    constexpr int LANES = COLUMNS < THREADS ? COLUMNS : THREADS, STEP = THREADS / LANES;
    const uint32_t row = threadIdx.x / LANES, column = threadIdx.x % LANES;
    float* output = args.output + batch * args.output_batch + (first_row + row) * args.output_row + first_column + column;
#pragma unroll
    for (int down = 0; down < ROWS; down += STEP, output += STEP * args.output_row)
#pragma unroll
        for (int across = 0; across < COLUMNS; across += LANES)
            if (row + down < rows && column + across < columns)
                output[across] = tile[(row + down) * PITCH + column + across];
}

extern "C" __global__ void __launch_bounds__(THREADS, 5) to_mn_major(const __grid_constant__ Args args) {
    __shared__ float tile[ELEMENTS + 32];
    const uint32_t batch = blockIdx.z * gridDim.y + blockIdx.y;
    if (batch >= args.batches) return;
    if (!args.along_rows) return copy_tile<WIDE_ROWS, false>(args, batch, tile);
    switch (args.tile_rows) {
        case 1: return copy_tile<1, true>(args, batch, tile);
        case 2: return copy_tile<2, true>(args, batch, tile);
        case 4: return copy_tile<4, true>(args, batch, tile);
        case 8: return copy_tile<8, true>(args, batch, tile);
        case 16: return copy_tile<16, true>(args, batch, tile);
        case 32: return copy_tile<32, true>(args, batch, tile);
    }
}
