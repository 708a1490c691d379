// Casts of BF16, FP16 and FP32 to E4M3 with a scale for each group of 128, to the bits of deep_gemm/quantize.py.
//
// cast_rows: a group is 128 elements of a row, read and written by eight lanes. cast_tile: a block of threads holds 128 x 128 elements
// in registers; a group is all of them or a column, and columns may leave as rows. Rows and columns are those of the input in memory.
#include "exact.cuh"

constexpr uint32_t GROUP = 128;
constexpr uint32_t LANES = 8, ROWS_AT_ONCE = 32 / LANES;  // of a warp: lanes that share a group of a row, and how many groups there are
constexpr uint32_t PIECE = 8;                             // bytes that a thread stores at once of a column that leaves as a row

struct Args {
    const uint8_t* input;
    uint8_t* values;
    float* scales;
    const int* counts;                                    // of gated rows, for each batch; null: all
    const int *starts, *sizes;                            // for every 128 rows: the first row of their group, and its rows; null: one group
    int64_t input_batch, scales_batch;                    // strides: of the input in bytes, of scales in elements
    uint32_t input_row, scales_line;                      // scales of one row of tiles, or of one column of groups, are adjacent
    uint32_t batches, rows, columns;                      // of what is cast
    uint32_t row_tiles, column_tiles;
    uint32_t tile_groups_log2;                            // groups side by side in a tile of cast_rows
    uint32_t of_blocks, use_ue8m0;                        // flags: of cast_tile, one scale for all; scales are powers of two
};

template <bool FIRST, class A, class B> struct Conditional { using Type = A; };
template <class A, class B> struct Conditional<false, A, B> { using Type = B; };

// Types of elements. `largest` is the maximum of |x| word by word, NaN above all; so_far has no signs.
struct Words16 {
    using Bits = uint16_t;
    static constexpr int BYTES = 2;
    DEVICE static uint32_t largest(uint32_t so_far, uint32_t word) { return max_u16x2(so_far, word & 0x7FFF7FFF); }
    DEVICE static uint32_t of_word(uint32_t word) { return max(word & 0xFFFF, word >> 16); }
};

struct BF16 : Words16 {
    DEVICE static float low(uint32_t word) { return __uint_as_float(word << 16); }
    DEVICE static float high(uint32_t word) { return __uint_as_float(word & 0xFFFF0000); }
    DEVICE static float value(uint32_t bits) { return low(bits); }
};

struct FP16 : Words16 {
    DEVICE static float low(uint32_t word) { return half_to_float(word); }
    DEVICE static float high(uint32_t word) { return half_to_float(word >> 16); }
    DEVICE static float value(uint32_t bits) { return low(bits); }
};

struct FP32 {
    using Bits = uint32_t;
    static constexpr int BYTES = 4;
    DEVICE static uint32_t largest(uint32_t so_far, uint32_t word) {
        return __float_as_uint(max_or_nan(__uint_as_float(so_far), fabsf(__uint_as_float(word))));
    }
    DEVICE static uint32_t of_word(uint32_t word) { return word; }
    DEVICE static float value(uint32_t bits) { return __uint_as_float(bits); }
};

template <class T> constexpr uint32_t CHUNK = 16 / T::BYTES;  // elements that a thread loads at once

DEVICE uint32_t word(const uint4& x, uint32_t i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// An element of a chunk; i is known when this is compiled.
template <class T> DEVICE float element(const uint4& chunk, uint32_t i) {
    if constexpr (T::BYTES == 4) return __uint_as_float(word(chunk, i));
    else return i % 2 ? T::high(word(chunk, i / 2)) : T::low(word(chunk, i / 2));
}

template <class T> DEVICE uint4 largest(uint4 so_far, const uint4& chunk) {
    return {T::largest(so_far.x, chunk.x), T::largest(so_far.y, chunk.y), T::largest(so_far.z, chunk.z), T::largest(so_far.w, chunk.w)};
}

template <class T> DEVICE uint32_t largest(uint32_t so_far, const uint4& chunk) {
    return T::largest(T::largest(T::largest(T::largest(so_far, chunk.x), chunk.y), chunk.z), chunk.w);
}

// Four quotients, packed.
template <class Element> DEVICE uint32_t four(Element x, const float* divisors, const float* reciprocals, uint32_t stride) {
    float q[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) q[i] = quotient(x(i), divisors[i * stride], reciprocals[i * stride]);
    return join(to_e4m3x2(q[0], q[1]), to_e4m3x2(q[2], q[3]));
}

DEVICE void store(uint8_t* to, const uint32_t (&words)[1]) { *reinterpret_cast<uint32_t*>(to) = words[0]; }
DEVICE void store(uint8_t* to, const uint32_t (&words)[2]) { *reinterpret_cast<uint2*>(to) = {words[0], words[1]}; }

DEVICE uint32_t batch() { return blockIdx.z * gridDim.y + blockIdx.y; }

// ---- rows ----

__device__ constexpr uint32_t log2_of(uint32_t x) { return x < 2 ? 0 : 1 + log2_of(x / 2); }

// Groups of a lane, one below the other, so that 64 bytes of a thread are in flight, of gated ones 128. A gated one is FP32.
template <class T, bool GATED> constexpr uint32_t STEPS = T::BYTES == 2 ? STEPS_OF_16_BITS : 1;
template <class T, bool GATED> constexpr uint32_t ROWS_OF_WARP = ROWS_AT_ONCE * STEPS<T, GATED>;

template <class T, bool GATED> DEVICE uint32_t tile_rows_log2(const Args& args) {
    return log2_of(ROW_THREADS / 32 * ROWS_OF_WARP<T, GATED>) - args.tile_groups_log2;
}

struct Place {
    uint32_t batch, rows, tile;                           // rows: of the batch, that are cast
};

// Casts a lane's part of a group, x(chunk, i), if it is `inside`, and stores it and the scale.
template <class T, class Element>
DEVICE void finish_group(const Args& args, bool inside, uint32_t column, float amax, float* scale_at, uint8_t* values, Element x) {
    const Scale scale = scale_of(amax, args.use_ue8m0);
    if (inside && threadIdx.x % LANES == 0) *scale_at = scale.value;
#pragma unroll
    for (uint32_t chunk = 0; chunk < GROUP / CHUNK<T> / LANES; ++chunk) {
        uint32_t words[CHUNK<T> / 4];
#pragma unroll
        for (uint32_t i = 0; i < CHUNK<T>; i += 4)
            words[i / 4] = four([&](uint32_t j) { return x(chunk, i + j); }, &scale.divisor, &scale.reciprocal, 0);
        if (inside && column + chunk * LANES * CHUNK<T> < args.columns) store(values + chunk * LANES * CHUNK<T>, words);
    }
}

// GATED: a row has the gates and then as many other factors; silu(gate) * factor is what is cast.
template <class T, bool GATED> DEVICE void cast_rows(const Args& args, const Place& place) {
    constexpr uint32_t INPUTS = GATED ? 2 : 1, CHUNKS = GROUP / CHUNK<T> / LANES;
    using X = typename Conditional<GATED, FP32, T>::Type;  // what is cast
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row_tile = place.tile / args.column_tiles, column_tile = place.tile - row_tile * args.column_tiles;
    const uint32_t group = (column_tile << args.tile_groups_log2) + (warp & (1 << args.tile_groups_log2) - 1);
    const uint32_t first_column = group * GROUP, column = first_column + lane % LANES * CHUNK<T>;
    const uint32_t row = (row_tile << tile_rows_log2<T, GATED>(args)) + (warp >> args.tile_groups_log2) * ROWS_OF_WARP<T, GATED> + lane / LANES;
    const uint8_t* batch = args.input + place.batch * args.input_batch;
    uint4 raw[STEPS<T, GATED>][INPUTS][CHUNKS];
#pragma unroll
    for (uint32_t step = 0; step < STEPS<T, GATED>; ++step) {
        // Past the ends something of the same group is read again, which changes no maximum.
        const uint8_t* input = batch + uint64_t(min(row + step * ROWS_AT_ONCE, place.rows - 1)) * args.input_row;
#pragma unroll
        for (uint32_t i = INPUTS; i-- > 0;)  // the gates last: ptxas lets loads wait whose values are wanted late
#pragma unroll
            for (uint32_t chunk = 0; chunk < CHUNKS; ++chunk) {
                const uint32_t at = column + chunk * LANES * CHUNK<T>;
                raw[step][i][chunk] = load_once(input + uint64_t((at < args.columns ? at : first_column) + i * args.columns) * T::BYTES);
            }
    }
    uint8_t* values = args.values + (uint64_t(place.batch) * args.rows + row) * args.columns + column;
    float* scales = args.scales + place.batch * args.scales_batch + uint64_t(group) * args.scales_line + row;
    const auto of_group = [](uint32_t top) {              // the maximum of eight lanes
#pragma unroll
        for (uint32_t distance = 1; distance < LANES; distance *= 2) top = X::largest(top, __shfl_xor_sync(~0u, top, distance));
        return top;
    };
    if constexpr (GATED) {
#pragma unroll
        for (uint32_t step = 0; step < STEPS<T, GATED>; ++step) {
            float gated[CHUNKS][CHUNK<T>];
            uint32_t top = 0;
#pragma unroll
            for (uint32_t chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
                for (uint32_t i = 0; i < CHUNK<T>; ++i) {
                    gated[chunk][i] = __fmul_rn(silu(element<T>(raw[step][0][chunk], i)), element<T>(raw[step][1][chunk], i));
                    top = X::largest(top, __float_as_uint(gated[chunk][i]));
                }
            finish_group<T>(args, row + step * ROWS_AT_ONCE < place.rows, column, X::value(of_group(top)), scales + step * ROWS_AT_ONCE,
                            values + step * ROWS_AT_ONCE * uint64_t(args.columns), [&](uint32_t chunk, uint32_t i) { return gated[chunk][i]; });
        }
    } else {
        uint32_t tops[STEPS<T, GATED>] = {};
#pragma unroll
        for (uint32_t step = 0; step < STEPS<T, GATED>; ++step)
#pragma unroll
            for (uint32_t chunk = 0; chunk < CHUNKS; ++chunk) tops[step] = largest<T>(tops[step], raw[step][0][chunk]);
        constexpr bool TWO = STEPS<T, GATED> == 2;        // maxima of 16 bits, which travel together
        const uint32_t top = of_group(TWO ? X::of_word(tops[0]) | X::of_word(tops[STEPS<T, GATED> - 1]) << 16 : tops[0]);
#pragma unroll
        for (uint32_t step = 0; step < STEPS<T, GATED>; ++step)
            finish_group<T>(args, row + step * ROWS_AT_ONCE < place.rows, column, X::value(TWO ? top >> 16 * step & 0xFFFF : top),
                            scales + step * ROWS_AT_ONCE, values + step * ROWS_AT_ONCE * uint64_t(args.columns),
                            [&](uint32_t chunk, uint32_t i) { return element<T>(raw[step][0][chunk], i); });
    }
}

template <class T> DEVICE void cast_rows(const Args& args) {
    if (batch() < args.batches) cast_rows<T, false>(args, {batch(), args.rows, blockIdx.x});
}

// Tiles of batches that have `counts` rows, those of a batch behind those of the one before. Each lane knows of one of 32 batches how
// many rows it has, and how many tiles there are up to its last.
class Tiles {
    const Args& args;
    uint32_t first = 0, next = 0, before = 0, end = 0, rows = 0;  // the first of the 32 batches, of the next; tiles before them; the lane's

  public:
    DEVICE explicit Tiles(const Args& args) : args(args) {}

    // Where tile `number` is, if there is one. Numbers ascend from call to call.
    DEVICE bool find(uint32_t number, uint32_t tile_rows_log2, Place& place) {
        uint32_t found;
        while (!(found = __ballot_sync(~0u, number < end))) {
            if (next >= args.batches) return false;
            first = next, next += 32, before = __shfl_sync(~0u, end, 31);
            const uint32_t mine = first + lane_index();
            const int count = mine < args.batches ? args.counts[mine] : 0;
            rows = count < 0 ? 0 : min(uint32_t(count), args.rows);
            end = before + inclusive_sum((rows + (1 << tile_rows_log2) - 1 >> tile_rows_log2) * args.column_tiles);
        }
        const uint32_t lane = __ffs(found) - 1, start = __shfl_sync(~0u, end, lane - 1);
        place = {first + lane, __shfl_sync(~0u, rows, lane), number - (lane ? start : before)};
        return true;
    }
};

template <class T> DEVICE void cast_gated_rows(const Args& args) {
    Place place{batch(), args.rows, blockIdx.x};
    if (place.batch >= args.batches) return;
    Tiles tiles(args);
    for (uint32_t number = blockIdx.x;; number += gridDim.x) {
        if (args.counts && !tiles.find(number, tile_rows_log2<T, true>(args), place)) return;
        cast_rows<T, true>(args, place);
        if (!args.counts) return;
    }
}

// ---- tiles of 128 x 128 ----

template <class T, bool TRANSPOSED> DEVICE void cast_tile(const Args& args) {
    constexpr uint32_t WARPS = TILE_THREADS / 32, WIDTH = GROUP / CHUNK<T>, LINES = TILE_THREADS / WIDTH, ROWS = GROUP / LINES;
    static_assert(ROWS >= 4 && ROWS <= PIECE, "a thread has so many chunks, one below the other: a word or two of each of its columns");
    __shared__ uint4 tops[WARPS * WIDTH];
    alignas(16) __shared__ float divisors[GROUP], reciprocals[GROUP];  // of columns
    alignas(16) __shared__ uint8_t transposed[TRANSPOSED ? GROUP * GROUP : 16];
    const uint32_t row_tile = blockIdx.x / args.column_tiles, column_tile = blockIdx.x % args.column_tiles;
    const uint32_t tile_row = row_tile * GROUP, tile_column = column_tile * GROUP;
    uint32_t start = 0, size = args.rows;                 // of the group of rows
    if (batch() >= args.batches) return;
    if (TRANSPOSED && args.starts) {
        start = args.starts[row_tile], size = args.sizes[row_tile];
        if (start > tile_row || size > args.rows - start || start + size < tile_row + GROUP) return;  // of no group
    }
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = threadIdx.x % WIDTH, line = threadIdx.x / WIDTH;
    const uint32_t row = tile_row + line * ROWS, column = tile_column + chunk * CHUNK<T>;
    const uint8_t* input = args.input + batch() * args.input_batch + uint64_t(column < args.columns ? column : tile_column) * T::BYTES;
    uint4 raw[ROWS], top{};
#pragma unroll
    for (uint32_t i = 0; i < ROWS; ++i) raw[i] = load_once(input + uint64_t(min(row + i, args.rows - 1)) * args.input_row);  // as in cast_rows
#pragma unroll
    for (uint32_t i = 0; i < ROWS; ++i) top = largest<T>(top, raw[i]);

    float* scales = args.scales + batch() * args.scales_batch + uint64_t(row_tile) * args.scales_line;
    if (!TRANSPOSED && args.of_blocks) {
        auto* of_warps = reinterpret_cast<uint32_t*>(tops);
        const uint32_t of_warp = __reduce_max_sync(~0u, T::of_word(largest<T>(0, top)));
        if (lane == 0) of_warps[warp] = of_warp;
        __syncthreads();
        if (threadIdx.x < GROUP) {
            const Scale scale = scale_of(T::value(__reduce_max_sync(~0u, of_warps[lane % WARPS])), args.use_ue8m0);
            divisors[threadIdx.x] = scale.divisor, reciprocals[threadIdx.x] = scale.reciprocal;
            if (threadIdx.x == 0) scales[column_tile] = scale.value;
        }
    } else {
#pragma unroll
        for (uint32_t distance = WIDTH; distance < 32; distance *= 2)  // the lines of a warp
            top = largest<T>(top, {__shfl_xor_sync(~0u, top.x, distance), __shfl_xor_sync(~0u, top.y, distance),
                                   __shfl_xor_sync(~0u, top.z, distance), __shfl_xor_sync(~0u, top.w, distance)});
        if (lane < WIDTH) tops[warp * WIDTH + lane] = top;
        __syncthreads();
        if (threadIdx.x < GROUP) {
            const auto* of_warps = reinterpret_cast<const typename T::Bits*>(tops) + threadIdx.x;
            uint32_t bits = 0;
#pragma unroll
            for (uint32_t i = 0; i < WARPS; ++i) bits = max(bits, uint32_t(of_warps[i * GROUP]));
            const Scale scale = scale_of(T::value(bits), args.use_ue8m0);
            divisors[threadIdx.x] = scale.divisor, reciprocals[threadIdx.x] = scale.reciprocal;
            if (tile_column + threadIdx.x < args.columns) scales[tile_column + threadIdx.x] = scale.value;
        }
    }
    __syncthreads();
    const float *of_chunk = divisors + chunk * CHUNK<T>, *inverse = reciprocals + chunk * CHUNK<T>;
    if constexpr (!TRANSPOSED) {
        uint8_t* values = args.values + (uint64_t(batch()) * args.rows + row) * args.columns + column;
#pragma unroll
        for (uint32_t i = 0; i < ROWS; ++i, values += args.columns) {
            uint32_t words[CHUNK<T> / 4];
#pragma unroll
            for (uint32_t j = 0; j < CHUNK<T>; j += 4)
                words[j / 4] = four([&](uint32_t k) { return element<T>(raw[i], j + k); }, of_chunk + j, inverse + j, 1);
            if (row + i < args.rows && column < args.columns) store(values, words);
        }
        return;
    }

    // What a thread has of a column is a unit. That of line u is kept as number u ^ turn, so that no two of a warp meet in a bank.
    const auto unit = [&](uint32_t column, uint32_t line) {
        const uint32_t turn = column / CHUNK<T> * (PIECE / ROWS) % LINES;
        return transposed + column * GROUP + (line ^ turn) * ROWS;
    };
#pragma unroll
    for (uint32_t j = 0; j < CHUNK<T>; ++j) {
        uint32_t words[ROWS / 4];
#pragma unroll
        for (uint32_t i = 0; i < ROWS; i += 4)
            words[i / 4] = four([&](uint32_t k) { return element<T>(raw[i + k], j); }, of_chunk + j, inverse + j, 0);
        store(unit(chunk * CHUNK<T> + j, line), words);
    }
    __syncthreads();
    const uint32_t down = threadIdx.x % (GROUP / PIECE) * PIECE;
    uint8_t* values = args.values + (uint64_t(batch()) * args.rows + start) * args.columns + (tile_row - start) + down;
#pragma unroll
    for (uint32_t i = 0; i < GROUP; i += TILE_THREADS / (GROUP / PIECE)) {
        const uint32_t across = i + threadIdx.x / (GROUP / PIECE);
        if (tile_column + across < args.columns && tile_row + down < args.rows)
            *reinterpret_cast<uint2*>(values + uint64_t(tile_column + across) * size) = *reinterpret_cast<const uint2*>(unit(across, down / ROWS));
    }
}

// TILES: blocks of cast_tile an SM, so that enough bytes are in flight; no more registers than they leave are needed.
#define ENTRY(NAME, THREADS, BLOCKS, CAST) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Args args) { CAST(args); }
#define ENTRIES(NAME, TYPE, TILES)                                   \
    ENTRY(token_##NAME, ROW_THREADS, 5, cast_rows<TYPE>)             \
    ENTRY(gated_##NAME, ROW_THREADS, 3, cast_gated_rows<TYPE>)       \
    ENTRY(tile_##NAME, TILE_THREADS, TILES, (cast_tile<TYPE, false>)) \
    ENTRY(transposed_##NAME, TILE_THREADS, TILES, (cast_tile<TYPE, true>))

ENTRIES(bf16, BF16, 3)
ENTRIES(fp16, FP16, 3)
ENTRIES(fp32, FP32, 2)
