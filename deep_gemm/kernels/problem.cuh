// What the host tells a kernel.
#pragma once
#include "ptx/base.cuh"

enum Kind : uint32_t {
    DENSE,       // d[m, n] = a[m, k] @ b[n, k].T
    CONTIGUOUS,  // layout[m] names the group, and so the b, of every row of a and d; others than 0 .. groups - 1 are padding
    ENDS,        // group g has the rows from the multiple of `alignment` after layout[g - 1] up to layout[g]
    MASKED,      // a[group], d[group]: layout[g] rows are real
    K_GROUPED,   // d[group]: a and b hold layout[g] columns for group g, one group after the other
    K_ENDS,      // the same, columns as the rows of ENDS
};

struct Problem {              // what every launch needs comes first: one line of the cache
    uint32_t kind;
    uint32_t m, n;            // of the output; of one group's, where each has its own
    uint32_t k;               // columns of a; of all groups together where they are grouped along K
    union {
        uint32_t band;        // of tiles: rows of them that are walked together, so that operands are found in L2
        uint32_t split;       // of strips: into how many parts K is split, a power of two
    };
    uint32_t tile_rows;       // of a tile: BLOCK_M, or fewer where they are shared out evenly
    uint32_t box_rows;        // rows of a, and
    uint32_t scale_rows;      // of its scales, that one copy brings
    uint32_t counter;         // in `claimed`; 0: none, then each cluster's tiles are known beforehand
    uint32_t groups;
    uint32_t stages;          // K blocks in flight, where that is not compiled in
    uint32_t overlaps;        // whether the launch may overlap with the kernel before
    const float* b_scales;    // [groups, ceil(n / 128), k / 128], any strides
    int64_t b_scale_stride_n, b_scale_stride_k, b_scale_stride_g;
    uint32_t alignment;       // of where a group starts
    uint32_t clear_padding;   // whether padding rows of d become zeros
    const int* layout;
    void* d;
    int64_t d_stride_m, d_stride_g;
    const float* c;           // what an FP32 result is added to, with d's strides; or nothing
    const uint8_t *a, *b;     // where groups have their own K: the first group's, and
    TensorMap* maps;          // the maps of a and b, group by group
    uint32_t pace;            // clocks from one K block to the next, at least
    uint32_t nothing;         // 0, which ptxas does not know (wait.cuh, `zero_after`)
};

struct Args {
    TensorMap a, b, a_scales, b_scales, d;  // of three dimensions: columns, rows, groups
    Problem problem;
};
