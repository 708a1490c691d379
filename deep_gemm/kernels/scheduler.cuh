// Which output tile comes next. Persistent: every cluster starts at its own index and strides by the number of clusters.
#pragma once
#include "config.cuh"
#include "ptx/base.cuh"

struct Problem {
    uint32_t m, n;           // of the output
    uint32_t k_blocks;       // blocks of 128 along K, the last one zero-filled
    uint32_t band;           // tile rows that are walked together, so that operands are found in L2
    uint32_t stage_bytes;    // of a, b and a's scales for one K block; of a no more rows than there are
    const float* b_scales;   // [ceil(n / 128), k_blocks], any strides
    int64_t b_scale_stride_n, b_scale_stride_k;
};

struct Tile {
    uint32_t m, n;           // first row and column of this CTA's output
};

class Scheduler {
    const Problem& problem;
    uint32_t index, step, rows, columns;  // in units of a cluster's output
    uint32_t rank_m, rank_n;

public:
    DEVICE explicit Scheduler(const Problem& p) : problem(p) {
        constexpr uint32_t CLUSTER = CLUSTER_M * CLUSTER_N, HEIGHT = BLOCK_M * CLUSTER_M, WIDTH = BLOCK_N * CLUSTER_N;
        const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
        rank_m = rank / CLUSTER_N, rank_n = rank % CLUSTER_N;
        index = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
        rows = (p.m - 1) / HEIGHT + 1, columns = (p.n - 1) / WIDTH + 1;
    }

    // Bands of `band` tile rows, from top to bottom; within a band down the columns, from left to right. A tile of a cluster
    // may lie outside the output: it computes zeros and stores nothing.
    DEVICE bool next(Tile& tile) {
        if (index >= rows * columns) return false;
        const uint32_t band = index / (problem.band * columns), in_band = index - band * problem.band * columns;
        const uint32_t top = band * problem.band, height = min(problem.band, rows - top);
        const uint32_t column = in_band / height, row = top + in_band - column * height;
        tile.m = (row * CLUSTER_M + rank_m) * BLOCK_M;
        tile.n = (column * CLUSTER_N + rank_n) * BLOCK_N;
        index += step;
        return true;
    }
};
