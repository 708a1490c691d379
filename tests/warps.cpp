// Runs the scheduling warps of kernels/scheduler.cuh on a CPU: a fiber for each lane, CTAs interleaved at random, also between
// the two sides of an atomic. Reads problems, one a line, and prints the tiles of every CTA; tests/test_scheduler.py checks them.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iostream>
#include <random>
#include <utility>
#include <vector>

#define DEVICE inline
#define __device__
using std::max, std::min;

struct TensorMap {
    alignas(64) uint8_t opaque[128];
};
struct {
    uint32_t x;
} blockIdx, gridDim;

struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool waiting = false, done = false;
    int exchanges = 0;
};
struct Warp {
    uint32_t cta;
    Lane lanes[32];
    uint64_t exchanged[2][32];
};
ucontext_t outside;
Warp* warp;      // whose turn it is
uint32_t lane;

void yield() {
    Lane& self = warp->lanes[lane];
    swapcontext(&self.context, &outside);
}

// What every lane of the warp passes, once all have.
const uint64_t* exchange(uint64_t value) {
    Lane& self = warp->lanes[lane];
    uint64_t* values = warp->exchanged[self.exchanges++ % 2];
    values[lane] = value;
    self.waiting = true;
    yield();
    return values;
}

uint32_t lane_index() { return lane; }
uint32_t __shfl_sync(unsigned, uint32_t value, uint32_t from) { return exchange(value)[from % 32]; }
uint32_t __ballot_sync(unsigned, bool vote) {
    const uint64_t* votes = exchange(vote);
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i) result |= uint32_t(votes[i] != 0) << i;
    return result;
}
uint32_t uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }
uint32_t inclusive_sum(uint32_t value) {
    const uint64_t* values = exchange(value);
    uint32_t sum = 0;
    for (uint32_t i = 0; i <= lane; ++i) sum += values[i];
    return sum;
}
int __popc(uint32_t x) { return __builtin_popcount(x); }
int __ffs(uint32_t x) { return __builtin_ffs(x); }
int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
uint32_t round_up(uint32_t value, uint32_t multiple) { return (value + multiple - 1) / multiple * multiple; }
uint32_t atomic_add(uint32_t* address, uint32_t value) {
    yield();
    return std::exchange(*address, *address + value);
}
uint32_t cluster_rank();

#include "scheduler.cuh"

constexpr uint32_t CLUSTER = CLUSTER_M * CLUSTER_N;
uint32_t cluster_rank() { return warp->cta % CLUSTER; }

Problem problem;
std::vector<std::deque<uint32_t>> sent;  // to the second CTA of each cluster, by the first

// As `schedule` and `claim` in fp8_gemm.cu.
void schedule() {
    Scheduler scheduler(problem);
    Tile tile{};
    for (;;) {
        if (problem.kind == DENSE) scheduler.next_of_all(tile);
        else scheduler.next(tile);
        exchange(0);
        if (lane == 0)
            printf("%u %u %u %u %u %u %u %u %u %u\n", warp->cta, tile.m, tile.n, tile.group, tile.batch, tile.end, tile.k,
                   tile.k_blocks, tile.apart, uint32_t(tile.rows));
        if (uniform(tile.rows) == Tile::NONE) break;
        std::deque<uint32_t>& numbers = sent[warp->cta / CLUSTER];
        if (!problem.counter) {
            scheduler.stride();
        } else if (cluster_rank() == 0) {
            scheduler.claim();
            if (CLUSTER > 1 && lane == 0) numbers.push_back(scheduler.number);
        } else {
            while (numbers.empty()) yield();
            scheduler.number = numbers.front();
            exchange(0);
            if (lane == 0) numbers.pop_front();
            exchange(0);
        }
    }
    warp->lanes[lane].done = true;
    yield();
}

void launch(uint32_t ctas, std::mt19937& random) {
    std::vector<Warp> warps(ctas);
    std::vector<Warp*> live;
    gridDim.x = ctas;
    sent.assign(ctas / CLUSTER, {});
    for (Warp& w : warps) {
        w.cta = uint32_t(live.size());
        live.push_back(&w);
        for (Lane& l : w.lanes) {
            getcontext(&l.context);
            l.context.uc_stack.ss_sp = l.stack.data(), l.context.uc_stack.ss_size = l.stack.size();
            makecontext(&l.context, schedule, 0);
        }
    }
    while (!live.empty()) {
        const size_t chosen = random() % live.size();
        warp = live[chosen], blockIdx.x = warp->cta;
        for (uint32_t turns = 1 + random() % 8; turns; --turns) {
            int waiting = 0, done = 0;
            for (lane = 0; lane < 32; ++lane) {
                Lane& l = warp->lanes[lane];
                if (!l.waiting && !l.done) swapcontext(&outside, &l.context);
                waiting += l.waiting, done += l.done;
            }
            if (done && done < 32 && waiting + done == 32) std::abort();  // some left the loop, others wait for them
            if (waiting == 32)
                for (Lane& l : warp->lanes) l.waiting = false;
            if (done == 32) {
                live.erase(live.begin() + chosen);
                break;
            }
        }
    }
}

// A line: seed, CTAs, launches, fields of Problem, how many numbers the layout has, and these.
int main() {
    uint32_t seed, ctas, launches, size;
    while (std::cin >> seed >> ctas >> launches >> problem.kind >> problem.m >> problem.n >> problem.k >> problem.tile_rows >>
           problem.band >> problem.counter >> problem.groups >> problem.alignment >> size) {
        std::vector<int> layout(size);
        for (int& x : layout) std::cin >> x;
        problem.layout = layout.data();
        std::mt19937 random(seed);
        for (uint32_t i = 0; i < launches; ++i) {
            launch(ctas, random);
            printf("left %u\n", claimed[COLUMN_SCALES ? 0 : problem.counter]);
        }
    }
}
