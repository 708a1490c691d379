"""CUDA graphs of many launches, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

PAUSE_S = 0.02
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
