// Describes the a and b of every group along K to the copy engine: [m, K] and [n, K], each K-major, one group's behind the other's.
// One warp. The maps of args describe one group that had all of K; what differs is replaced.
#include "scheduler.cuh"
#include "ptx/tma.cuh"

DEVICE void describe(TensorMap* to, const TensorMap& from, const uint8_t* operand, uint32_t rows, uint32_t start, uint32_t columns) {
    *to = from;
    const uint64_t pitch = round_up(max(columns, 16u), 128);
    tensor_map_replace(to, operand + uint64_t(rows) * start, max(columns, 1u), rows, pitch);
}

extern "C" __global__ void fp8_gemm(const __grid_constant__ Args args) {
    previous_kernel_wait();
    const Problem& problem = args.problem;
    Groups groups{};
    for (; groups.base < problem.groups; groups.base += 32) {
        groups.look(problem);
        const uint32_t group = groups.base + threadIdx.x;
        if (group >= problem.groups) continue;
        describe(&problem.maps[group * 2], args.a, problem.a, problem.m, groups.start, groups.count);
        describe(&problem.maps[group * 2 + 1], args.b, problem.b, problem.n, groups.start, groups.count);
    }
    tensor_map_release();
}
