"""The benchmark's arithmetic and its table. The measuring itself needs a GPU: `make bench`."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

import deep_gemm
from bench import graph, grouped, run, table
from bench.peer import Peer, answers
from deep_gemm import problem as problems
from deep_gemm import reference
from deep_gemm.cli import LAYERS
from deep_gemm.problem import Problem
from deep_gemm.testing import calc_diff

H200_L2 = 60 << 20


def results(scale: float) -> table.Row:
    rows = []
    for (_, n, k), m in product(LAYERS, run.MS):
        problem = Problem(m, n, k)
        us = dict.fromkeys(run.IMPLEMENTATIONS, 10.0) | {"deep_gemm": 10.0 * scale, "bf16": None}
        row = {"family": "dense", "shape": [m, n, k], "us": us, "flop": problem.flop, "bytes": problem.bytes}
        rows.append(row | ({"us_sustained": us} if m == run.SUSTAINED_M else {}))
    return {
        "dirty": False,
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "machine": {"gpu": "NVIDIA H200", "driver_version": "580"},
        "versions": {"cuda": "13.0", "torch": "2.11.0"},
        "rows": rows,
    }


@pytest.mark.parametrize(("m", "layer"), list(product(run.MS, LAYERS)))
def test_operands_never_fit_in_l2_and_fit_in_memory(m: int, layer: tuple[str, int, int]):
    problem = Problem(m, *layer[1:])
    sets, launches = run.counts(problem, H200_L2)
    assert (sets - 1) * problem.bytes >= 4 * H200_L2
    assert 5 * sets * problem.bytes < 4e9  # the same in BF16, and outputs
    assert launches % sets == 0
    assert 0.3 < launches * problem.flop / 1.3e9 / run.REPLAY_US < 2 or m < 4096


def test_geometric_means():
    rows = results(0.5)["rows"]
    assert table.geometric_means(rows) == pytest.approx(dict.fromkeys(run.MS, 0.5))
    assert table.geometric_means(rows, "us_sustained") == pytest.approx({4096: 0.5})
    rows[0]["us"]["deep_gemm"] = None  # an error
    rows[1]["us"]["cublaslt_tensorwise"] = None
    assert table.geometric_means(rows) == pytest.approx(dict.fromkeys(run.MS, 0.5))


def test_table():
    text = table.render(results(0.5), "bench/results/x.json")
    assert "| 4096, 7168, 2048 | 5.0 (24052) | 10.0 | 10.0 | - | 0.50 | 5.0 (24052) | 0.50 |" in text
    assert "| 7168, 2048 | 5.0 (0.50) | 5.0 (0.50) | 5.0 (0.50) | 5.0 (0.50) |" in text
    assert "M=1 0.500" in text and "M=4096 sustained 0.500" in text and "commit 0123456789ab" in text


def test_launches_that_overlap_have_a_table_of_their_own():
    about = results(0.5)
    assert "overlap" not in table.render(about, "x")
    few = [row | {"family": table.DENSE_PDL} for row in about["rows"] if row["shape"][0] <= 128]
    text = table.render(about | {"rows": about["rows"] + few}, "x")
    assert "| decode, launches overlap (`set_pdl(True)`): N, K; us (ratio) | M=1 | M=16 | M=64 | M=128 |" in text
    assert "M=1 overlapping 0.500" in text
    assert text.count("| 7168, 2048 | 5.0 (0.50) | 5.0 (0.50) | 5.0 (0.50) | 5.0 (0.50) |") == 2
    assert " overlapping " in run.line_of(few[0])


def test_beside_deepseek_s_library():
    rows = results(0.5)["rows"]
    row = next(row for row in rows if row["shape"] == [64, 4096, 7168])
    assert table.upstream_us(row) == pytest.approx(10.88)
    assert table.upstream_us(row | {"family": table.DENSE_PDL}) == pytest.approx(10.63)
    assert table.upstream_us(row | {"shape": [64, 4096, 4096]}) is None
    assert table.upstream_us(next(row for row in rows if row["shape"][0] == 4096)) is None
    assert table.faster_than_upstream(rows, table.DENSE) == pytest.approx(2 * 1.115, abs=0.01)
    assert table.faster_than_upstream(rows, table.DENSE_PDL) is None


def test_the_file_is_json_with_a_line_for_each_row():
    about = results(1.0)
    rows = about.pop("rows")
    text = run.as_text(about, rows)
    assert json.loads(text) == about | {"rows": rows}
    assert len([line for line in text.splitlines() if '"family"' in line]) == len(rows) == 30


def test_table_tells_of_local_changes():
    assert "commit 0123456789ab with local changes," in table.render(results(1.0) | {"dirty": True}, "x")


def test_a_line_for_every_row():
    for row in results(2.0)["rows"]:
        assert " 2.000 " in run.line_of(row)
    assert run.line_of(row | {"error": "7 elements differ"}).endswith("7 elements differ")


def test_replace():
    text = f"a\n{table.START}\nold\n{table.END}\nb\n"
    assert table.replace(text, "new") == f"a\n{table.START}\nnew\n{table.END}\nb\n"
    with pytest.raises(ValueError, match="no <!-- bench -->"):
        table.replace("a", "new")


def test_newest(tmp_path: Path):
    assert table.newest(tmp_path) is None
    for name, time in (("2026-01-02-h200.json", "2026-01-02T00:00:00"), ("2026-01-01-z.json", "2026-01-01T00:00:00")):
        (tmp_path / name).write_text(json.dumps({"time": time}))
    (tmp_path / "2026-01-03-h200-host.json").write_text(json.dumps({"time": "2026-01-03T00:00:00"}))
    assert table.newest(tmp_path) == tmp_path / "2026-01-02-h200.json"


def test_readme_has_the_newest_results():
    newest = table.newest()
    if newest is None:
        pytest.skip("no results yet: make bench")
    text = table.README.read_text()
    assert table.replace(text, table.table_of(newest)) == text, "run: python -m bench.table"


def test_names_of_files():
    assert [run.slug(x) for x in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")] == ["h200", "h100-80gb-hbm3"]


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 1
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_rows_outlive_a_benchmark_that_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While the host is timed they lie beside the file of an earlier run, which only a whole one replaces."""
    monkeypatch.setattr(run, "on_hopper", lambda program: True)
    monkeypatch.setattr(run, "machine", lambda: {"gpu": "NVIDIA H200", "l2_bytes": 1})
    monkeypatch.setattr(run, "measure", lambda *given: results(1.0)["rows"][0])
    for name in ("compile_all_s", "eager_call_us", "layout_share_of_copy"):
        monkeypatch.setattr(run, name, dict)
    arguments = ["--family", "dense", "--m", "4096", "--n", "2112", "--output", str(tmp_path)]

    def ended():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "first_call_s", dict)
    assert run.main(arguments) == 0
    (whole,) = tmp_path.iterdir()
    before = whole.read_text()
    monkeypatch.setattr(run, "first_call_s", ended)
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments)
    assert whole.read_text() == before
    assert len(json.loads((tmp_path / f"{whole.name}.part").read_text())["rows"]) == 1
    monkeypatch.setattr(run, "first_call_s", dict)
    assert run.main(arguments) == 0
    assert list(tmp_path.iterdir()) == [whole]


@pytest.mark.gpu
def test_a_row_on_the_gpu():
    row = run.measure(Problem(64, 2112, 7168), torch.cuda.get_device_properties(0).L2_cache_size, 1, False)
    assert "error" not in row and not row.get("refused")
    assert all(us > 1 for us in row["us"].values())


@pytest.mark.parametrize("file", ["/nonexistent.json", "/etc/hostname"])
def test_the_table_takes_files_of_this_repository_alone(file: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        table.main([file])
    assert f"{file} is no file below" in capsys.readouterr().err


def test_a_first_call_is_timed_in_a_process_of_its_own():
    taken = run.first_call_s("cpu", turns=1)
    assert list(taken) == ["empty_cache", "warm_cache"]
    assert all(0 < seconds < 60 for seconds in taken.values())


def test_compiling_is_timed_on_as_many_cores_as_asked_for():
    taken = run.compile_all_s(cores=1, most=2)
    assert taken["cores"] == 1 and 0 < taken["seconds"] < 60


def grouped_rows() -> list[table.Row]:
    return [
        {"family": x.family, "shape": x.numbers, "us": {"deep_gemm": 8.0, "sgl_deep_gemm": 10.0}}
        | {"flop": run.work(x).flop, "bytes": run.work(x).bytes}
        for x in grouped.SHAPES
    ]


@pytest.mark.parametrize("shape", grouped.SHAPES)
def test_grouped_operands_never_fit_in_l2_and_twice_in_memory(shape: grouped.Shape):
    assert grouped.Shape.of(shape.family, shape.numbers) == shape
    sets, launches = run.counts(run.work(shape), H200_L2)
    assert (sets - 1) * run.work(shape).bytes >= 4 * H200_L2 and launches % sets == 0
    rows = shape.groups * shape.m
    assert 2 * sets * (rows * (shape.k + 2 * shape.n) + shape.groups * shape.n * shape.k) < 40e9  # two processes


def test_counts_of_groups():
    of_192, of_20 = (grouped.Shape("masked", 32, 4096, 8, 16, tokens).counts for tokens in (192, 20))
    assert 134 <= min(of_192) < 160 and 220 < max(of_192) <= 249
    assert 14 <= min(of_20) < max(of_20) <= 25
    assert grouped.Shape("masked", 2, 512, 8, 16, 512).counts == [512, 512]
    assert len(grouped.SHAPES) == 16


def test_a_dense_multiplication_for_a_peer():
    shape = grouped.Shape.of(grouped.DENSE, [40, 136, 144])
    assert shape.numbers == [40, 136, 144] and shape.counts == [40]
    x = grouped.Operands.random(shape, "cpu")
    d = grouped.run(x)[0]
    expected = reference.fp8_gemm_nt(x.a[0], x.a_scales[0], x.b[0], x.b_scales[0])
    assert calc_diff(d, expected) < 1e-5


def test_a_table_with_a_peer_beside_prefill():
    about = results(0.5)
    for row in about["rows"]:
        if row["shape"][0] == 4096:
            row["us"] = row["us"] | {"sgl_deep_gemm": 8.0}
            row["us_sustained"] = row["us_sustained"] | {"sgl_deep_gemm": 4.0}
    text = table.render(about, "x")
    assert "| ratio | sgl_deep_gemm burst, sustained | ratios |\n" in text
    assert "| 0.50 | 5.0 (24052) | 0.50 | 8.0, 4.0 | 0.62, 1.25 |\n" in text
    assert "M=4096 to sgl_deep_gemm 0.625, M=4096 sustained to sgl_deep_gemm 1.250" in text


@pytest.mark.parametrize("family", ["contiguous", "masked"])
def test_a_wrong_bit_in_a_group_is_found(family: str):
    shape = grouped.Shape(family, 3, 128, 136, 144, 20 if family == "masked" else 128)
    x = grouped.Operands.random(shape, "cpu")
    assert len(x.counts) == 3 and x.layout.dtype == torch.int32
    x.d.fill_(float("nan"))
    grouped.run(x)  # the CPU's own order of additions: not yet the exact bits
    pairs = (x.a, x.a_scales), (x.b, x.b_scales), x.d, x.layout
    described = (
        problems.masked(*pairs, 20) if family == "masked" else problems.contiguous(*pairs, False, 128, None, True)
    )
    reference.multiply(*described, exact=True)
    assert run.wrong_in_groups(x) == 0
    last = x.by_group(x.d)[2]
    last[: x.counts[2]].view(torch.int16).bitwise_xor_(1)
    assert run.wrong_in_groups(x) == min(32, x.counts[2]) * 136
    if family == "masked":
        last[x.counts[2]] = 0
        assert run.wrong_in_groups(x) == min(32, x.counts[2]) * 136 + 1


def test_tables_of_groups():
    about = results(0.5)
    about["rows"] += grouped_rows()
    text = table.render(about, "x")
    assert "| contiguous: groups, M of each, N, K | ours (TFLOPS) | sgl_deep_gemm | ratio |" in text
    assert "| 4, 8192, 4096, 7168 | 8.0 (240518) | 10.0 | 0.80 |" in text
    assert "| 32, 4096, 7168, 2048, 20 | 8.0 " in text
    assert "contiguous 0.800, masked 0.800" in text and "M=1 0.500" in text
    about["rows"][-1]["us"] = {"deep_gemm": None, "cublaslt_loop": None}
    assert "| 32, 4096, 7168, 2048, 20 | - | - | - |" in table.render(about, "x")


def test_a_line_for_every_grouped_row():
    for row in grouped_rows():
        assert run.line_of(row).startswith(f"{row['family']:10} {row['shape'][0]}, ") and "  0.800 " in run.line_of(row)
    assert " - " in run.line_of(row | {"us": {"deep_gemm": 8.0, "sgl_deep_gemm": None}})


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with another deep_gemm, which prints when it is imported."""
    (tmp_path / "deep_gemm").mkdir()
    (tmp_path / "deep_gemm" / "__init__.py").write_text("import os\nprint('hello')\nos.system('echo hello')\n")
    return tmp_path


def test_a_peer_answers_whatever_it_prints(package: Path):
    peer = Peer(package)
    try:
        assert peer.version is None and peer.ask("free") == {}
        with pytest.raises(RuntimeError, match="AssertionError"):
            peer.ask("replay")  # nothing was captured
        with pytest.raises(RuntimeError, match="KeyError"):
            peer.ask({"family": "masked"})
        peer.process.kill()
        peer.process.wait()
        assert peer.ask("free") == {}  # in a new process
    finally:
        peer.close()


def test_launches_of_a_peer_overlap_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    monkeypatch.setattr(grouped.Operands, "random", lambda shape: grouped.run)
    monkeypatch.setattr(graph, "capture", lambda run, sets, launches: seen.append(deep_gemm.get_pdl()))
    about = {"family": grouped.DENSE, "shape": [1, 16, 16], "seed": 0, "sets": 1, "launches": 1}
    requests = [json.dumps(about | {"pdl": pdl}) for pdl in (True, False, True, False)]
    assert list(answers(iter(requests)))[1:] == [{}] * 4
    assert seen == [True, False, True, False]


def test_a_peer_that_does_not_come(package: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.raises(RuntimeError, match="expected a deep_gemm in"):
        Peer(tmp_path_factory.mktemp("empty"))
    (package / "deep_gemm" / "__init__.py").write_text("raise ImportError")
    with pytest.raises(RuntimeError, match="the peer died"):
        Peer(package)
    (package / "deep_gemm" / "__init__.py").write_text("import time\ntime.sleep(60)")
    with pytest.raises(RuntimeError, match="did not answer in 2 s"):
        Peer(package, timeout_s=2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [grouped.SHAPES[4], grouped.SHAPES[-1]], ids=["contiguous", "masked"])
def test_a_grouped_row_on_the_gpu(shape: grouped.Shape):
    row = run.measure_grouped(shape, torch.cuda.get_device_properties(0).L2_cache_size, 1, None)
    assert "error" not in row and not row.get("refused")
    assert all(us > 1 for us in row["us"].values())
