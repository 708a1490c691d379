// In debug mode: says which rows of a contiguous grouped layout cannot be meant so. One block, which prints ten rows at most.
#include "ptx/base.cuh"

extern "C" __global__ void fp8_gemm(const int* layout, uint32_t rows, uint32_t groups, uint32_t alignment) {
    __shared__ uint32_t printed;
    previous_kernel_wait();
    if (threadIdx.x == 0) printed = 0;
    __syncthreads();
    for (uint32_t row = threadIdx.x; row < rows; row += blockDim.x) {
        const int group = layout[row], first = layout[row / alignment * alignment];
        const bool outside = group < -1 || group >= int(groups), strange = !outside && group >= 0 && group != first;
        if ((!outside && !strange) || atomicAdd(&printed, 1) >= 10) continue;
        if (outside) printf("deep_gemm: grouped_layout[%u] is %d, expected -1 to %u: the row is treated as padding\n", row, group, groups - 1);
        else printf("deep_gemm: grouped_layout[%u] is %d, but %d where its block of %u rows starts: groups start at multiples of %u\n",
                    row, group, first, alignment, alignment);
    }
}
