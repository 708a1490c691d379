"""The log of shapes: what is written while serving, and read to compile for it."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from deep_gemm import gemm, recorded
from deep_gemm.config import Config
from deep_gemm.errors import InvalidInputError
from deep_gemm.problem import Kind, Problem
from deep_gemm.runtime import device
from deep_gemm.runtime.device import H200, MODELS

DENSE = Problem(100, 2112, 7168)
MASKED = Problem(4096, 4096, 7168, Kind.MASKED, 32, expected_m=0)
PLAIN = Config()
LINE = {
    "kind": "dense", "m": 100, "n": 2112, "k": 7168, "groups": 1, "expected_m": None, "alignment": 1,
    "column_scales": False, "gpu": "NVIDIA H200", "sms": 132, "num_sms": None, "tc_util": 100, "block": [1, 1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_written_yet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recorded, "_written", set())
    monkeypatch.setattr(recorded, "_complained", set())


@pytest.mark.parametrize("gpu", MODELS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(
    "problem",
    [
        DENSE,
        MASKED,
        Problem(8192, 4096, 7168, Kind.CONTIGUOUS, 8, alignment=128),
        Problem(8192, 4096, 7168, Kind.ENDS, 8, expected_m=100, alignment=64),
        Problem(2048, 768, 4096 * 128, Kind.K_GROUPED, 128, column_scales=True),
    ],
    ids=lambda problem: problem.kind.name,
)
def test_a_round_trip(problem: Problem, gpu: device.Device, tmp_path: Path):
    config = Config(num_sms=70, tc_util=50, block_m=64, block_n=16)
    for each in (config, replace(config, pdl=True, batch_invariant=True), PLAIN):
        recorded.append(tmp_path / "log", problem, gpu, each)
    found = recorded.read(tmp_path / "log")
    assert found == [(problem, gpu, config), (problem, gpu, PLAIN)]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_each_problem_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for _ in range(3):
        recorded.append(tmp_path / "log", DENSE, H200, PLAIN)
    recorded.append(tmp_path / "other", DENSE, H200, PLAIN)
    assert json.loads((tmp_path / "log").read_text()) == json.loads((tmp_path / "other").read_text()) == LINE
    monkeypatch.setattr(recorded, "MOST_KNOWN", 5)  # memory is bounded: then a line may be there twice
    for m in (1, 2, 3, 4, 5, 6, 100):
        recorded.append(tmp_path / "log", replace(DENSE, m=m), H200, PLAIN)
        assert len(recorded._written) <= 5
    assert len((tmp_path / "log").read_text().splitlines()) == 8
    assert sorted(record.problem.m for record in recorded.read(tmp_path / "log")) == [1, 2, 3, 4, 5, 6, 100]


def test_calls_record_what_they_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the plan of a problem, so not twice; and nothing without the setting."""
    monkeypatch.setattr(device, "current", lambda index: H200)
    gemm._plan.cache_clear()
    gemm.plan_of(DENSE)
    monkeypatch.setenv("DG_RECORD_SHAPES", str(tmp_path / "log"))
    for problem in (DENSE, MASKED, MASKED):
        gemm.plan_of(problem)
    assert [record.problem for record in recorded.read(tmp_path / "log")] == [MASKED]
    gemm._plan.cache_clear()


def test_lines_of_threads_and_processes_do_not_mix(tmp_path: Path):
    children = []
    for child in range(4):
        if not (pid := os.fork()):
            recorded._written.clear()
            for m in range(1, 200):
                recorded.append(tmp_path / "log", replace(DENSE, m=child * 1000 + m), H200, PLAIN)
            os._exit(0)
        children.append(pid)
    threads = [
        threading.Thread(
            target=lambda i=i: [
                recorded.append(tmp_path / "log", replace(DENSE, m=i * 1000 + m), H200, PLAIN) for m in range(1, 200)
            ]
        )
        for i in range(4, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    want = sorted(i * 1000 + m for i in range(8) for m in range(1, 200))
    assert sorted(record.problem.m for record in recorded.read(tmp_path / "log")) == want


def test_a_file_that_cannot_be_written_is_complained_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    for m in (1, 2):
        recorded.append(tmp_path / "file" / "log", replace(DENSE, m=m), H200, PLAIN)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("deep_gemm: shapes cannot be recorded (")
    assert record.getMessage().endswith("set DG_RECORD_SHAPES to a file of yours")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "sparse"}, {"kind": 0}, {"m": 0}, {"m": 1.0}, {"m": True}, {"n": "8"}, {"k": None}, {"groups": 0},
        {"expected_m": -1}, {"alignment": 0}, {"sms": 0}, {"num_sms": 0}, {"tc_util": 0}, {"block": [1]}, {"block": 1},
        {"m": 10**30}, {"n": 7}, {"k": 20}, {"block": [7, 1]}, {"tc_util": 101},
        {"kind": "masked", "column_scales": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_is_no_record(change: dict[str, object], tmp_path: Path):
    path = tmp_path / "log"
    path.write_text(json.dumps(LINE) + "\n\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(InvalidInputError) as caught:
        recorded.read(path)
    assert str(caught.value).startswith(f'line 3 of {path} is \'{{"kind": ')
    assert str(caught.value).endswith("): remove the line")


@pytest.mark.parametrize("line", ["", "[]", "7", "null", '{"kind": "dense"}'])
def test_other_lines_that_are_none(line: str, tmp_path: Path):
    path = tmp_path / "log"
    path.write_text(f"{line}\n")
    if not line:
        assert recorded.read(path) == []
        return
    with pytest.raises(InvalidInputError, match=r"^line 1 of .*, expected a problem as DG_RECORD_SHAPES writes it"):
        recorded.read(path)


def test_lines_that_were_not_finished_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The last one, and those that another process went on behind."""
    recorded.append(tmp_path / "log", DENSE, H200, PLAIN)
    for more in (json.dumps(LINE | {"m": 7})[:40], json.dumps(LINE) + "\n", "[" * 100_000 + "\n", "{"):
        with (tmp_path / "log").open("a") as file:
            file.write(more)
    recorded.append(tmp_path / "log", replace(DENSE, m=8), H200, PLAIN)
    assert [record.problem for record in recorded.read(tmp_path / "log")] == [DENSE]
    (record,) = caplog.records
    assert record.getMessage() == f"deep_gemm: 3 lines of {tmp_path / 'log'} are no JSON, and passed over"


@pytest.mark.parametrize("place", ["fifo", "/dev/full", "folder"])
def test_what_is_no_file_stops_no_call(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / place
    if place == "fifo":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    for m in (1, 2):
        recorded.append(path, replace(DENSE, m=m), H200, PLAIN)
    (record,) = caplog.records
    assert record.getMessage().startswith("deep_gemm: shapes cannot be recorded (")


def test_a_file_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(InvalidInputError, match=r" cannot be read as a log of shapes: "):
            recorded.read(path)
