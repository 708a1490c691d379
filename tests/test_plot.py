"""The README's figures, drawn from a results file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_bench import results

from bench import plot
from bench.table import newest

PNG = b"\x89PNG\r\n\x1a\n"


def test_figures_of_the_newest_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert plot.main(["--output", str(tmp_path / "figures")]) == 0
    figures = [tmp_path / "figures" / name for name in ("roofline.png", "peers.png")]
    assert capsys.readouterr().out.split() == [str(path) for path in figures]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 20_000 for path in figures)


def test_every_row_is_drawn():
    """Where its speed and its intensity say, under the roof."""
    import matplotlib.pyplot as plt

    path = newest()
    assert path
    measured = json.loads(path.read_text())
    figure, axes = plt.subplots()
    plot.draw_roofline(axes, measured)
    drawn = {tuple(point) for points in axes.collections for point in points.get_offsets().tolist()}
    peak, memory = plot.roof(measured)
    for row in measured["rows"]:
        speed, intensity = plot.teraflops(row, "deep_gemm"), row["flop"] / row["bytes"]
        assert speed and (intensity, speed) in drawn
        assert speed < min(peak, intensity * memory)
    plt.close(figure)


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    """No grouped rows, and a GPU that is not known."""
    measured = results(0.5)
    measured["machine"] |= {"gpu": "NVIDIA H800", "sms": 132, "clocks.max.sm": "1755 MHz"}
    assert plot.roof(measured) == pytest.approx((1897.8, 3.0), rel=1e-3)
    assert [path.read_bytes()[:8] for path in plot.draw(measured, tmp_path)] == [PNG, PNG]


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        plot.main(["nowhere.json"])
    assert "nowhere.json is no file" in capsys.readouterr().err
