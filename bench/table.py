"""Writes the README's speed table from a results file: `python -m bench.table [FILE]`, by default the newest one."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- bench -->", "<!-- /bench -->"
OURS, PEER = "deep_gemm", "cublaslt_tensorwise"
FORK, LOOP = "sgl_deep_gemm", "cublaslt_loop"  # beside which grouped rows stand: one of them
GROUPED = {"contiguous": "groups, M of each, N, K", "masked": "groups, max M, N, K, real rows of each (about)"}

DENSE, DENSE_PDL = "dense", "dense_pdl"  # the second of few rows, with launches that overlap
# What DeepSeek's DeepGEMM 2.6.1 took beside cuBLASLt tensor-wise on an H200, for M = 1, 16, 64, 128 (docs/facts.md).
UPSTREAM = {
    (2112, 7168): (1.292, 1.070, 1.107, 1.133),
    (24576, 1536): (1.221, 1.202, 1.101, 1.044),
    (32768, 512): (1.134, 1.145, 1.096, 1.169),
    (7168, 16384): (1.107, 1.011, 1.056, 1.295),
    (4096, 7168): (1.152, 0.923, 1.088, 1.002),
    (7168, 2048): (1.139, 1.093, 1.005, 1.222),
}
UPSTREAM_MS = (1, 16, 64, 128)
UPSTREAM_OVERLAP_US = 0.25  # less, where its launches overlap: 0.15 to 0.35

Row = dict[str, Any]


def upstream_us(row: Row) -> float | None:
    """What DeepSeek's library would have taken in this run, by cuBLASLt's time; none for another shape."""
    m, n, k = row["shape"]
    if (n, k) not in UPSTREAM or m not in UPSTREAM_MS or not row["us"].get(PEER):
        return None
    us = UPSTREAM[n, k][UPSTREAM_MS.index(m)] * row["us"][PEER]
    return us - UPSTREAM_OVERLAP_US if row["family"] == DENSE_PDL else us


def faster_than_upstream(rows: Sequence[Row], family: str) -> float | None:
    """The geometric mean of DeepSeek's time / ours over the rows of few rows."""
    measured = [row for row in rows if row["family"] == family and row["us"][OURS]]
    ratios = [us / row["us"][OURS] for row in measured if (us := upstream_us(row))]
    return statistics.geometric_mean(ratios) if ratios else None


def geometric_means(rows: Sequence[Row], field: str = "us", to: str = PEER, family: str = DENSE) -> dict[int, float]:
    """For each M, the geometric mean of ours / cuBLASLt tensor-wise (or another) over its N, K."""
    ratios: dict[int, list[float]] = {}
    for row in rows:
        if row["family"] == family and (us := row.get(field)) and us[OURS] and us.get(to):
            ratios.setdefault(row["shape"][0], []).append(us[OURS] / us[to])
    return {m: statistics.geometric_mean(values) for m, values in ratios.items()}


class Mean(NamedTuple):
    other: str
    ratio: float


def other(row: Row) -> str:
    """Beside what ours stands."""
    return PEER if row["family"] in (DENSE, DENSE_PDL) else next(name for name in row["us"] if name != OURS)


def family_means(rows: Sequence[Row]) -> dict[str, Mean]:
    """For each grouped family, the geometric mean of ours / the other."""
    means: dict[str, Mean] = {}
    for family in GROUPED:
        measured = [row for row in rows if row["family"] == family and all(row["us"].values())]
        if measured:
            ratios = [row["us"][OURS] / row["us"][other(row)] for row in measured]
            means[family] = Mean(other(measured[0]), statistics.geometric_mean(ratios))
    return means


def newest(folder: Path = RESULTS) -> Path | None:
    """The results file of `make bench` with the latest start."""
    files = (path for path in folder.glob("*.json") if not path.stem.endswith("-host"))
    return max(files, key=lambda path: json.loads(path.read_text())["time"], default=None)


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _us(us: float | None) -> str:
    return f"{us:.1f}" if us else "-"


def _teraflops(row: Row, field: str) -> str:
    us = row.get(field, {}).get(OURS)
    return f"{us:.1f} ({row['flop'] / us / 1e6:.0f})" if us else "-"


def _ratio(us: dict[str, float | None] | None, to: str = PEER) -> str:
    return f"{ours / peer:.2f}" if us and (ours := us[OURS]) and (peer := us.get(to)) else "-"


def _grouped(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each grouped family that was measured."""
    for family, axes in GROUPED.items():
        measured = [row for row in rows if row["family"] == family]
        if measured:
            yield from ("", _line(f"{family}: {axes}", "ours (TFLOPS)", other(measured[0]), "ratio"))
            yield _line(*["---"] * 4)
        for row in measured:
            us, to = row["us"], other(row)
            yield _line(", ".join(map(str, row["shape"])), _teraflops(row, "us"), _us(us[to]), _ratio(us, to))


def _few_rows(rows: Sequence[Row], title: str) -> Iterator[str]:
    """A table of N, K by M, if there are rows."""
    ms = sorted({row["shape"][0] for row in rows})
    if not rows:
        return
    cells = {tuple(row["shape"]): f"{_us(row['us'][OURS])} ({_ratio(row['us'])})" for row in rows}
    yield from ("", _line(f"{title}: N, K; us (ratio)", *(f"M={m}" for m in ms)), _line(*["---"] * (len(ms) + 1)))
    for n, k in dict.fromkeys((row["shape"][1], row["shape"][2]) for row in rows):
        yield _line(f"{n}, {k}", *(cells.get((m, n, k), "-") for m in ms))


def render(results: Row, source: str) -> str:
    """The text between the markers: M > 128 as prefill, in us and TFLOPS, the rest as decode, in us; then groups."""
    rows: list[Row] = results["rows"]
    dense = [row for row in rows if row["family"] == DENSE]
    prefill = [row for row in dense if row["shape"][0] > 128]
    decode = [row for row in dense if row["shape"][0] <= 128]
    machine, versions = results["machine"], results["versions"]
    commit = results["commit"][:12] + " with local changes" * bool(results.get("dirty"))
    beside = any(row["us"].get(FORK) for row in prefill)
    lines = [
        f"{machine['gpu']}, driver {machine.get('driver_version')}, CUDA {versions['cuda']}, torch {versions['torch']},"
        f" commit {commit}, {results['time'][:10]}. us per launch, nothing in L2; ratio = ours / "
        "cuBLASLt tensor-wise (`torch._scaled_mm` with two scalar scales: less work than ours); for groups, to "
        "what stands beside them.",
        "",
        _line(
            "prefill: M, N, K", "ours, burst (TFLOPS)", "tensor-wise", "block-wise", "bf16", "ratio", "ours, sustained",
            "ratio", *[f"{FORK} burst, sustained", "ratios"] * beside,
        ),
        _line(*["---"] * (8 + 2 * beside)),
    ]  # fmt: skip
    for row in prefill:
        us, held = row["us"], row.get("us_sustained")
        fork = (f"{_us(us.get(FORK))}, {_us((held or {}).get(FORK))}", f"{_ratio(us, FORK)}, {_ratio(held, FORK)}")
        lines.append(
            _line(
                ", ".join(map(str, row["shape"])), _teraflops(row, "us"), _us(us[PEER]), _us(us["cublaslt_block"]),
                _us(us["bf16"]), _ratio(us), _teraflops(row, "us_sustained"), _ratio(held), *fork[: 2 * beside],
            )
        )  # fmt: skip
    lines += _few_rows(decode, "decode")
    lines += _few_rows(
        [row for row in rows if row["family"] == DENSE_PDL], "decode, launches overlap (`set_pdl(True)`)"
    )
    lines += _grouped(rows)
    means = [f"M={m} {mean:.3f}" for m, mean in geometric_means(rows).items()]
    means += [f"M={m} sustained {mean:.3f}" for m, mean in geometric_means(rows, "us_sustained").items()]
    for field, when in (("us", ""), ("us_sustained", " sustained")):
        means += [f"M={m}{when} to {FORK} {mean:.3f}" for m, mean in geometric_means(rows, field, FORK).items()]
    means += [f"M={m} overlapping {mean:.3f}" for m, mean in geometric_means(rows, family=DENSE_PDL).items()]
    means += [f"{family} {mean.ratio:.3f}" for family, mean in family_means(rows).items()]
    return "\n".join(
        [*lines, "", f"Geometric mean of the ratios: {', '.join(means)}. All figures: [{source}]({source})."]
    )


def replace(text: str, table: str) -> str:
    """The text with the table between its markers."""
    head, _, rest = text.partition(START)
    _, marker, tail = rest.partition(END)
    if not marker:
        raise ValueError(f"no {START} .. {END} in the text")
    return f"{head}{START}\n{table}\n{END}{tail}"


def table_of(path: Path) -> str:
    return render(json.loads(path.read_text()), path.resolve().relative_to(ROOT).as_posix())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.table", description="Writes the README's speed table from a results file.")
    parser.add_argument("file", type=Path, nargs="?", help=f"a file in {RESULTS} (default: the newest)")
    path: Path | None = parser.parse_args(argv).file or newest()
    if path is None:
        parser.error(f"no results in {RESULTS}: run `make bench` on a Hopper GPU")
    if not (path.is_file() and path.resolve().is_relative_to(ROOT)):
        parser.error(f"{path} is no file below {ROOT}")
    README.write_text(replace(README.read_text(), table_of(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
