// How a CTA's tiles get from who schedules them to who works on them.
#pragma once
#include "config.cuh"
#include "scheduler.cuh"
#include "storage.cuh"

// Hands out the next tile of this CTA, NONE after the last. Whoever reads it releases it. One thread.
DEVICE void hand_out(SharedStorage& smem, const Tile& tile, uint32_t index) {
    wait(smem.tile_empty[index % TILES], index / TILES % 2 ^ 1);
    smem.tiles[index % TILES] = tile;
    barrier_arrive(shared_address(&smem.tile_full[index % TILES]));
}

// The tiles that were handed out, one after the other.
class Tiles {
    SharedStorage& smem;

public:
    uint32_t index = 0;
    DEVICE explicit Tiles(SharedStorage& storage) : smem(storage) {}
    DEVICE const Tile& get() const {
        wait(smem.tile_full[index % TILES], index / TILES % 2);
        return smem.tiles[index % TILES];
    }
    DEVICE void release() { barrier_arrive(shared_address(&smem.tile_empty[index++ % TILES])); }
};

// Goes on to a tile that nobody has, as late as may be, so that no CTA has two while another has none. A cluster's first CTA
// claims for both.
DEVICE void claim(Scheduler& scheduler, SharedStorage& smem, uint32_t phase) {
    if (CLUSTER > 1 && cluster_rank() == 1) {
        if (elect_one()) barrier_expect_bytes(shared_address(&smem.claim), 4);
        wait<true>(smem.claim, phase);
        scheduler.number = smem.next_number;
    } else {
        wait(smem.claim, phase);
        scheduler.claim();
        if (CLUSTER > 1 && elect_one())
            store_remote(cluster_address(shared_address(&smem.next_number), 1), scheduler.number,
                         cluster_address(shared_address(&smem.claim), 1));
    }
}

// Hands out the tiles of groups.
DEVICE void schedule(const Args& args, SharedStorage& smem) {
    if (args.problem.kind == DENSE) return;
    previous_kernel_wait();
    Scheduler scheduler(args.problem);
    Tile tile;
    for (uint32_t index = 0;; ++index) {
        scheduler.next(tile);
        if (elect_one()) hand_out(smem, tile, index);
        __syncwarp();
        if (uniform(tile.rows) == Tile::NONE) break;
        if (args.problem.counter) claim(scheduler, smem, index % 2);
        else scheduler.stride();
    }
}
