"""CUDA graphs of many launches, and how long they take; and how long the CPU takes for single ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")

Case = tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]  # a function, and the arguments of each call in turn

PAUSE_S = 0.02
WARM_UP_TURNS = 5
SUSTAINED_S = 1.5


def capture(run: Callable[[T], torch.Tensor], sets: Sequence[T], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of so many launches, over the sets in turn. run returns its output."""
    run(sets[0])  # compiles, and makes handles and workspaces, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs: list[torch.Tensor] = []  # held, so that an implementation that allocates its output rotates too
    with torch.cuda.graph(graph):
        outputs.extend(run(sets[i % len(sets)]) for i in range(launches))
    return graph


def turn_us(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, after a pause and one to warm up."""
    time.sleep(PAUSE_S)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def sustained_us(graph: torch.cuda.CUDAGraph, burst_us: float) -> float:
    """The median of what 20 ms took, over the second half of SUSTAINED_S at load. Two pieces are always in flight."""
    replays = max(1, round(20_000 / burst_us))
    pieces = max(4, round(SUSTAINED_S * 1e6 / (replays * burst_us)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(pieces + 1)]
    events[0].record()
    for before, event in zip([events[0], *events], events[1:], strict=False):
        for _ in range(replays):
            graph.replay()
        event.record()
        before.synchronize()
    torch.cuda.synchronize()
    half = events[len(events) // 2 :]
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(half)) * 1e3 / replays


def host_us(cases: dict[str, Case], batch: int, batches: int) -> dict[str, list[float]]:
    """What every single call costs the CPU, from calling to being back, without the clock's own share.

    Cases take turns, `batch` calls at a time on the default stream; then the GPU is waited for, so that its queue never
    is full. Garbage collection is left on.
    """
    clock = time.perf_counter_ns
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(WARM_UP_TURNS + batches):
        for name, (function, sets) in cases.items():
            taken: list[int] = []
            torch.cuda.synchronize()
            for _, arguments in zip(range(batch), cycle(sets), strict=False):
                begun = clock()
                function(*arguments)
                taken.append(clock() - begun)
            if turn >= WARM_UP_TURNS:
                times[name] += [each / 1e3 for each in taken]
    torch.cuda.synchronize()
    overhead = statistics.median(-(clock() - clock()) for _ in range(1000)) / 1e3
    return {name: [each - overhead for each in every] for name, every in times.items()}
