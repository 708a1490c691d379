"""Draws the README's figures from a results file: `python -m bench.plot [FILE]`, by default the newest one.

docs/figures/roofline.png: every row's speed over its arithmetic intensity, under what the GPU's memory and tensor cores
can do. docs/figures/peers.png: the speed of prefill and of grouped rows beside the other implementations of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.table import DENSE, DENSE_PDL, FORK, LOOP, OURS, PEER, RESULTS, ROOT, Row, newest, other
from deep_gemm.runtime.device import memory_gbps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = ROOT / "docs" / "figures"
FLOP_PER_CLOCK = 8192  # FP8, of an SM
NAMES = {
    OURS: "deep_gemm (this library)",
    PEER: "cuBLASLt FP8, tensor-wise scales",
    "cublaslt_block": "cuBLASLt FP8, block scales",
    "bf16": "cuBLASLt BF16",
    FORK: "sgl-deep-gemm (fork of DeepGEMM)",
    LOOP: "cuBLASLt FP8 in a loop",
}
COLOURS = {
    OURS: "#0b6e4f",
    PEER: "#c9822b",
    "cublaslt_block": "#8d6ab8",
    "bf16": "#9a9a9a",
    FORK: "#3b6fb6",
    LOOP: "#3b6fb6",
}
MARKERS = {DENSE: "o", DENSE_PDL: "D", "contiguous": "s", "masked": "^"}
FAMILIES = {DENSE_PDL: "dense, launches overlap"}  # that are called otherwise than in results
BARE_LOOP = {"NVIDIA H200": 1547}  # TFLOPS of a main loop and nothing else, in bursts (docs/facts.md)


def roof(results: Row) -> tuple[float, float]:
    """TFLOPS of the tensor cores at the highest clock, and bytes per second of the memory (in TB/s)."""
    machine = results["machine"]
    mhz = float(str(machine["clocks.max.sm"]).split()[0])
    return machine["sms"] * FLOP_PER_CLOCK * mhz / 1e6, memory_gbps(machine["gpu"]) / 1e3


def teraflops(row: Row, name: str) -> float | None:
    us = row["us"].get(name)
    return row["flop"] / us / 1e6 if us else None


def draw_roofline(axes: Axes, results: Row) -> None:
    peak, memory = roof(results)
    knee, ends = peak / memory, (1.0, 1e4)
    axes.plot([ends[0], knee, ends[1]], [ends[0] * memory, peak, peak], color="#444444", linewidth=1.2, zorder=1)
    axes.text(
        1.3, 1.3 * memory * 1.25, f"memory, {memory:.1f} TB/s", rotation=38, rotation_mode="anchor", color="#444444"
    )
    axes.text(
        ends[1], peak * 1.08, f"tensor cores at {results['machine']['clocks.max.sm']}", ha="right", color="#444444"
    )
    if bare := BARE_LOOP.get(results["machine"]["gpu"]):
        label = f"a main loop and nothing else, {bare} TFLOPS at 700 W"
        axes.plot(
            [bare / memory, ends[1]], [bare] * 2, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), label=label
        )
    for name, size, filled in ((PEER, 22, False), (OURS, 30, True)):
        for family, marker in MARKERS.items() if filled else [(DENSE, MARKERS[DENSE])]:
            rows = [row for row in results["rows"] if row["family"] == family and teraflops(row, name)]
            if not rows:
                continue
            label = f"{NAMES[name]}, {FAMILIES.get(family, family)}" if filled else NAMES[name]
            axes.scatter(
                [row["flop"] / row["bytes"] for row in rows],
                [teraflops(row, name) or 0 for row in rows],
                s=size,
                marker=marker,
                facecolors=COLOURS[name] if filled else "none",
                edgecolors=COLOURS[name],
                linewidths=1,
                label=label,
                zorder=3 if filled else 2,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(2, peak * 1.6)
    axes.set_xlabel("FLOP per byte that has to be moved once")
    axes.set_ylabel("TFLOPS")
    axes.set_title("Every shape of the benchmark under the roofline", loc="left")
    axes.legend(loc="lower right", frameon=False)


def draw_bars(axes: Axes, rows: Sequence[Row], names: Sequence[str], title: str) -> None:
    """A cluster of horizontal bars for each row, in TFLOPS."""
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        speeds = [teraflops(row, name) or 0 for row in rows]
        places = [y + (i - (len(names) - 1) / 2) * height for y in range(len(rows))]
        bars = axes.barh(places, speeds, height * 0.92, color=COLOURS[name], label=NAMES[name])
        axes.bar_label(bars, [f"{x:.0f}" if x else "" for x in speeds], padding=2, fontsize=7, color="#333333")
    kinds = ["" if row["family"] == DENSE else f"{row['family']} " for row in rows]
    axes.set_yticks(
        range(len(rows)), [kind + ", ".join(map(str, row["shape"])) for kind, row in zip(kinds, rows, strict=True)]
    )
    axes.invert_yaxis()
    axes.set_xlabel("TFLOPS")
    axes.set_title(title, loc="left")
    axes.margins(x=0.08)
    axes.legend(loc="upper center", bbox_to_anchor=(0.35, -0.12), ncol=2, frameon=False)


def draw(results: Row, folder: Path) -> list[Path]:
    """Writes both figures. Raises: SystemExit without matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("bench.plot needs matplotlib: pip install matplotlib") from None

    machine, versions = results["machine"], results["versions"]
    source = f"{machine['gpu']}, CUDA {versions['cuda']}, torch {versions['torch']}, {results['time'][:10]}, bursts"
    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 140}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        draw_roofline(axes, results)
        figure.supxlabel(source, fontsize=7, color="#666666", x=0.99, ha="right")
        figure.savefig(folder / "roofline.png", metadata={"Software": None})
        plt.close(figure)

        rows: list[Row] = results["rows"]
        prefill = [row for row in rows if row["family"] == DENSE and row["shape"][0] > 128]
        groups = [row for row in rows if row["family"] not in (DENSE, DENSE_PDL)]
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 7), layout="constrained")
        names = [name for name in COLOURS if any(teraflops(row, name) for row in prefill)]
        draw_bars(left, prefill, names, "Prefill: M, N, K")
        if groups:
            names = (OURS, other(groups[0]))
            draw_bars(right, groups, names, "Grouped: groups, rows of each, N, K, real rows")
        figure.supxlabel(source, fontsize=7, color="#666666", x=0.99, ha="right")
        figure.savefig(folder / "peers.png", metadata={"Software": None})
        plt.close(figure)
    return [folder / "roofline.png", folder / "peers.png"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.plot", description="Draws the README's figures from a results file.")
    parser.add_argument("file", type=Path, nargs="?", help=f"a file in {RESULTS} (default: the newest)")
    parser.add_argument("--output", type=Path, default=FIGURES, help=f"folder for the figures (default: {FIGURES})")
    args = parser.parse_args(argv)
    path: Path | None = args.file or newest()
    if path is None:
        parser.error(f"no results in {RESULTS}: run `make bench` on a Hopper GPU")
    if not path.is_file():
        parser.error(f"{path} is no file")
    for figure in draw(json.loads(path.read_text()), args.output):
        print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
