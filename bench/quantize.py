"""How fast the casts to FP8 are on this GPU, beside copying as many bytes: python -m bench.quantize --output FOLDER

A CUDA graph holds several launches over several inputs, each into memory of its own, so that nothing is found in L2.
Our kernel, PyTorch's copy_ of as many bytes (read and written together), and the same cast by PyTorch take turns; a
figure is the median of nine. Bytes are those that have to be read and written: of what is counted on the device, the
real rows. Before it is timed, a cast is held against the one by PyTorch, bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.graph import capture, turn_us
from bench.run import as_text, commit, machine, on_hopper, slug, versions
from deep_gemm import quantize
from deep_gemm.runtime import quantization

TURNS = 9
REPLAY_US = 1000
SETS_BYTES = 2**28  # that all inputs together have of real rows; five times an H200's L2
OUTPUTS_BYTES = 2**33  # of a graph, at most
COPY_GBPS = 4000  # about; decides how many launches make REPLAY_US

Cast = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A cast of tensors of one shape. real: the part of the rows that is cast."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    cast: Cast
    real: float = 1.0

    def inputs(self) -> list[torch.Tensor]:
        x = torch.randn(self.shape, device="cuda").to(self.dtype)
        return [x, *(x.clone() for _ in range(max(1, round(SETS_BYTES / (self.real * x.nbytes)))))]


def cases() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype in (bf16, fp16, fp32):
        yield Case("per_token", dtype, (8192, 7168), quantize.per_token_cast_to_fp8)
    yield Case("per_token", bf16, (16384, 7168), quantize.per_token_cast_to_fp8)
    yield Case("per_token", bf16, (4096, 7168), quantize.per_token_cast_to_fp8)
    yield Case("per_token", bf16, (128, 7168), quantize.per_token_cast_to_fp8)
    for dtype in (bf16, fp32):
        yield Case("per_token of x.mT", dtype, (8192, 7168), lambda x: quantize.per_token_cast_to_fp8(x.mT))
    blocks = torch.arange(64, dtype=torch.int32, device="cuda") // 16
    starts, sizes = blocks * 2048, torch.full_like(blocks, 2048)
    yield Case("groups, transposed", bf16, (8192, 7168), lambda x: quantize.transposed_cast_of_groups(x, starts, sizes))
    for dtype in (bf16, fp16, fp32):
        yield Case("per_block", dtype, (7168, 18432), quantize.per_block_cast_to_fp8)
    for dtype in (bf16, fp32):
        yield Case("per_channel", dtype, (8192, 7168), quantize.per_channel_cast_to_fp8)
    for dtype in (bf16, fp32):
        yield Case("swiglu", dtype, (8192, 4096), quantize.swiglu_cast_to_fp8)
    yield Case("swiglu", bf16, (16384, 2 * 18432), quantize.swiglu_cast_to_fp8)
    for rows in (192, 20):
        counts = torch.full((32,), rows, dtype=torch.int32, device="cuda")

        def masked(x: torch.Tensor, counts: torch.Tensor = counts) -> tuple[torch.Tensor, torch.Tensor]:
            return quantize.swiglu_cast_to_fp8(x, masked_m=counts)

        yield Case(f"swiglu, {rows} real rows", bf16, (32, 1024, 4096), masked, rows / (1024))


@contextmanager
def by_torch() -> Generator[None, None, None]:
    """Casts as on a GPU that the kernels are not for."""
    kept = quantize._is_offered, quantization.again  # pyright: ignore[reportPrivateUsage]
    quantize._is_offered = lambda x: False  # pyright: ignore[reportPrivateUsage]
    quantization.again = lambda key, x, counts: None
    try:
        yield
    finally:
        quantize._is_offered, quantization.again = kept  # pyright: ignore[reportPrivateUsage]


def differs(case: Case, x: torch.Tensor) -> bool:
    ours = case.cast(x)
    with by_torch():
        theirs = case.cast(x)
    rows = round(case.real * x.shape[-2])
    if case.real < 1:
        ours, theirs = (tuple(y[..., :rows, :] for y in pair) for pair in (ours, theirs))
    return any(
        not torch.equal(a.view(whole), b.view(whole))
        for a, b, whole in zip(ours, theirs, (torch.uint8, torch.int32), strict=True)
    )


def measure(case: Case) -> dict[str, Any]:
    inputs = case.inputs()
    written = sum(y.nbytes for y in case.cast(inputs[0]))
    moved = round(case.real * (inputs[0].nbytes + written))
    row: dict[str, Any] = {"cast": case.name, "dtype": str(case.dtype).removeprefix("torch."), "shape": case.shape}
    row["bytes"] = moved
    if differs(case, inputs[0]):
        return row | {"error": "other bits than PyTorch's"}
    torch.cuda.empty_cache()  # graphs have memory of their own
    launches = max(4, min(round(REPLAY_US * COPY_GBPS * 1e3 / moved), OUTPUTS_BYTES // written))
    half = -(-moved // 2 // 1024) * 1024
    halves = [torch.zeros(half, dtype=torch.uint8, device="cuda") for _ in range(2 * SETS_BYTES // moved + 2)]
    pairs = list(zip(halves, halves[1:] + halves[:1], strict=True))
    graphs = {
        "ours": (capture(lambda x: case.cast(x)[0], inputs, launches), launches),
        "copy": (capture(lambda pair: pair[1].copy_(pair[0]), pairs, launches), launches),
    }
    with by_torch():
        graphs["torch"] = (capture(lambda x: case.cast(x)[0], inputs[:1], 1), 1)
    turns = [{name: turn_us(graph) / count for name, (graph, count) in graphs.items()} for _ in range(TURNS)]
    us = {name: round(statistics.median(turn[name] for turn in turns), 2) for name in graphs}
    gbps = {name: round(moved / us[name] / 1e3) for name in ("ours", "copy")}
    return row | {"us": us, "gbps": gbps, "share_of_copy": round(us["copy"] / us["ours"], 3)}


def main() -> int:
    parser = argparse.ArgumentParser("bench.quantize", description="Times casts to FP8.")
    parser.add_argument("--only", default="", help="casts whose name has this in it (default: all)")
    parser.add_argument("--output", type=Path, help="folder for the results (default: none are kept)")
    args = parser.parse_args()
    if not on_hopper("quantize"):
        return 1
    torch.manual_seed(0)
    started, gpu = datetime.now(timezone.utc), machine()
    about: dict[str, Any] = {"time": started.isoformat(timespec="seconds"), "machine": gpu, "versions": versions()}
    about |= commit()
    print(f"{'cast':24} {'dtype':9} {'shape':20} {'us':>8} {'GB/s':>6} {'copy':>6} {'share':>6} {'by torch, us':>13}")
    rows: list[dict[str, Any]] = []
    for case in cases():
        if args.only not in case.name:
            continue
        row = measure(case)
        rows.append(row)
        torch.cuda.empty_cache()
        head = f"{row['cast']:24} {row['dtype']:9} {'x'.join(map(str, row['shape'])):20}"
        if "error" in row:
            print(head, row["error"])
            continue
        us, gbps = row["us"], row["gbps"]
        tail = f"{gbps['ours']:6} {gbps['copy']:6} {row['share_of_copy']:6.3f} {us['torch']:13.1f}"
        print(f"{head} {us['ours']:8.2f} {tail}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"{started:%Y-%m-%d}-{slug(gpu['gpu'])}-quantize.json"
        path.write_text(as_text(about, rows))
        print(path)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
