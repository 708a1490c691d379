"""CUDA graphs of many launches, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

PAUSE_S = 0.02


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
