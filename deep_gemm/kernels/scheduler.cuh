// Which output tile comes next. Persistent: every cluster starts with its own number and strides by the number of clusters, or,
// where tiles cost unequally much, claims them one by one.
// The kinds of multiplication differ here, and in little else. One warp schedules, and hands out tiles to the others.
// Dense ones are the producing thread's own business: the first tile is waited for.
#pragma once
#include "config.cuh"
#include "problem.cuh"

struct Tile {
    uint32_t m, n;            // first row and column of this CTA's output
    uint32_t group;           // of b
    uint32_t batch;           // of a and d: the group where each has its own rows, else 0
    uint32_t end, right;      // rows and columns from here on are nobody's
    uint32_t k;               // first column
    uint32_t k_blocks;        // blocks of 128 along K, the last one zero-filled
    uint32_t apart;           // not 0: the CTA beside it along M has a tile of another b
    enum : uint32_t { TOGETHER, SCATTERED, NONE } rows;  // SCATTERED: not all up to `end` are the group's. NONE: no tile is left
};

// How many tiles a launch has claimed: 0 at first, and after every launch. The host sees to it that launches which may run at
// the same time have counters of their own.
__device__ uint32_t claimed[COLUMN_SCALES ? 1 : COUNTERS];

// Whether groups have their own K, which takes column scales. Then they have all rows, and none of the other kinds occurs.
DEVICE bool along_k(const Problem& problem) { return COLUMN_SCALES && problem.kind >= K_GROUPED; }

// Looks at groups `base` .. `base` + 31, each by one lane. Whatever layout holds, they lie within the tensors.
struct Groups {
    uint32_t base;
    uint32_t start = 0, count = 0;   // the group's first row (or column, along K), and how many it has

    DEVICE void look(const Problem& problem) {
        const uint32_t group = base + lane_index(), size = along_k(problem) ? problem.k : problem.m;
        const auto at = [&](uint32_t i) { return min(uint32_t(max(problem.layout[i], 0)), size); };
        const uint32_t before = __shfl_sync(~0u, start + count, 31);  // K_GROUPED: where the groups before these end
        start = 0, count = group < problem.groups ? at(group) : 0;
        if (problem.kind == (COLUMN_SCALES ? K_ENDS : ENDS)) {
            const uint32_t end = count;
            if (group > 0 && group < problem.groups) start = min(round_up(at(group - 1), problem.alignment), size);
            count = end > start ? end - start : 0;
        }
        if (COLUMN_SCALES && problem.kind == K_GROUPED) {
            const uint32_t blocks = count / 128, end = before / 128 + inclusive_sum(blocks);  // in blocks no sum overflows
            start = min(end - blocks, size / 128) * 128, count = min(end, size / 128) * 128 - start;
        }
    }
};

class Scheduler {
    static constexpr uint32_t CLUSTER = CLUSTER_M * CLUSTER_N, HEIGHT = BLOCK_M * CLUSTER_M, WIDTH = BLOCK_N * CLUSTER_N;
    const Problem& problem;
    uint32_t columns;
    Groups groups;
    uint32_t gone = 0;               // tiles of the groups before these
    uint32_t last = 0;               // tiles of these groups, up to and including the lane's own

    DEVICE void look_at_groups() {
        groups.look(problem);
        const uint32_t rows = along_k(problem) ? problem.m : groups.count;
        last = inclusive_sum(groups.base + lane_index() < problem.groups ? (rows + HEIGHT - 1) / HEIGHT * columns : 0);
    }

    // Tile `i` of so many rows of tiles: bands of `band` rows, from top to bottom; in a band down the columns, from left to right
    // and, in the next one, back, for the last columns of b are still in L2.
    DEVICE void place(Tile& tile, uint32_t i, uint32_t rows) const {
        // Divisions take long, and the first tile is waited for: none where there is one band, or a band is one row.
        const uint32_t size = problem.band * columns, band = i < size ? 0 : i / size, in_band = i - band * size;
        const uint32_t top = band * problem.band, height = min(problem.band, rows - top);
        const uint32_t column = height == 1 ? in_band : in_band / height, row = top + in_band - column * height;
        const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
        tile.m = (row * CLUSTER_M + rank / CLUSTER_N) * problem.tile_rows, tile.end = min(problem.m, tile.m + problem.tile_rows);
        tile.n = ((band % 2 ? columns - 1 - column : column) * CLUSTER_N + rank % CLUSTER_N) * BLOCK_N;
        tile.right = problem.n;
    }

    // Every one of `total` tiles is followed by a claim of its cluster's. Who makes the last one leaves 0 for the next launch. (A
    // cluster without any tile has a number below `clusters`, and claims nothing.)
    DEVICE void finish(uint32_t total) const {
        const uint32_t clusters = gridDim.x / CLUSTER;
        if (problem.counter && number >= clusters && number + 1 == total + clusters) claimed[problem.counter] = 0;
    }

    // The group that a tile's rows belong to, by the first row that belongs to any; ~0 where all are padding.
    DEVICE void find_group(Tile& tile) const {
        uint32_t count = 0, end = tile.m;
        tile.group = ~0u;
#pragma unroll
        for (uint32_t i = 0; i < BLOCK_M; i += 32) {
            const uint32_t row = tile.m + i + lane_index(), group = row < problem.m ? problem.layout[row] : ~0u;
            const uint32_t real = __ballot_sync(~0u, group < problem.groups);
            if (tile.group == ~0u && real) tile.group = __shfl_sync(~0u, group, __ffs(real) - 1);
            const uint32_t own = __ballot_sync(~0u, group == tile.group && group < problem.groups);
            if (own) end = tile.m + i + 32 - __clz(own), count += __popc(own);
        }
        tile.rows = count == end - tile.m ? Tile::TOGETHER : Tile::SCATTERED;
        tile.end = min(tile.end, end);
    }

public:
    uint32_t number = blockIdx.x / CLUSTER;  // of the next tile, in units of a cluster's output

    DEVICE explicit Scheduler(const Problem& p) : problem(p), columns((p.n - 1) / WIDTH + 1) {
        groups.base = 0u - 32;  // before the first ones, which have no tiles
    }

    // The next tile of all rows and columns. One of a cluster may lie outside the output: nothing of it is stored.
    DEVICE void next_of_all(Tile& tile) {
        const uint32_t rows = (problem.m - 1) / HEIGHT + 1, tiles = rows * columns, clusters = gridDim.x / CLUSTER;
        const uint32_t rank = blockIdx.x / CLUSTER, turn = number - rank;  // the first tile of all clusters' turn
        // In the last turn, where no more than half of the clusters would have a tile, two share one: its left and right chunk,
        // each of which takes half the time; if chunks can not be stored by themselves, its upper and lower 64 rows.
        const bool halved = BLOCK_M == 128 && turn > 0 && turn < tiles && (tiles - turn) * 2 <= clusters;
        const uint32_t i = halved ? turn + rank / 2 : number;
        tile.rows = i < tiles ? Tile::TOGETHER : Tile::NONE;
        if (tile.rows == Tile::NONE) return;
        place(tile, i, rows);
        tile.group = tile.batch = tile.k = tile.apart = 0, tile.k_blocks = (problem.k + 127) / 128;
        if (halved) {
            if (NARROWS) tile.n += rank % 2 * CHUNK_N, tile.right = min(tile.right, tile.n + CHUNK_N);
            else tile.m += rank % 2 * 64, tile.end = min(tile.end, tile.m + 64);
        }
    }

    // Goes on to the next tile of this cluster's share.
    DEVICE void stride() { number += gridDim.x / CLUSTER; }

    // Goes on to the first tile that no cluster has, behind those that they start with. All lanes of a warp.
    DEVICE void claim() {
        uint32_t count = 0;
        if (lane_index() == 0) count = atomic_add(&claimed[problem.counter], 1);
        number = gridDim.x / CLUSTER + uniform(count);
    }

    // The next tile of groups. All lanes of a warp.
    DEVICE void next(Tile& tile) {
        if (!COLUMN_SCALES && problem.kind == CONTIGUOUS) {
            for (;; stride()) {
                next_of_all(tile);
                if (tile.rows == Tile::NONE) return;
                find_group(tile);
                if (CLUSTER_M == 2) {
                    Tile other{tile.m + (cluster_rank() == 0 ? BLOCK_M : -BLOCK_M)};  // `end` is not asked for
                    find_group(other);
                    tile.apart = tile.group != other.group && tile.group != ~0u && other.group != ~0u;
                    if (tile.group == ~0u) tile.group = other.group;  // it has no rows, but takes part in the other's copies
                }
                if (tile.group != ~0u) return;
            }
        }
        tile.rows = Tile::NONE;
        for (uint32_t total; number - gone >= (total = __shfl_sync(~0u, last, 31));) {
            gone += total, groups.base += 32;
            if (groups.base >= problem.groups) return finish(gone);
            look_at_groups();
        }
        const uint32_t i = number - gone, owner = __popc(__ballot_sync(~0u, last <= i));  // the first lane with more tiles
        const uint32_t before = __shfl_sync(~0u, last, owner - 1);
        const uint32_t start = __shfl_sync(~0u, groups.start, owner), count = __shfl_sync(~0u, groups.count, owner);
        place(tile, i - (owner > 0 ? before : 0), ((along_k(problem) ? problem.m : count) + HEIGHT - 1) / HEIGHT);
        tile.group = groups.base + owner, tile.batch = problem.kind == ENDS ? 0 : tile.group;
        tile.k = tile.apart = 0, tile.k_blocks = (problem.k + 127) / 128, tile.rows = Tile::TOGETHER;
        if (along_k(problem)) {
            tile.k = start, tile.k_blocks = (count + 127) / 128;
        } else {
            tile.m += start, tile.end = start + count;
        }
    }
};
