"""What all tests share: a cache of kernels of this run's own, and no GPU tests where there is no Hopper GPU.

`--results FOLDER` keeps the outcome of a run on a GPU: <date>-<gpu>.json, with the machine, versions and commit.
`--strict-kernels` runs with DG_JIT_STRICT=1, once all kernels that the planner may choose are compiled.
`--fuzz-minutes M` lets each seed of the fuzzer's slice go on for so long; the cases are counted in the outcome.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from deep_gemm import kernels_for
from deep_gemm.runtime import cache, compiler

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; tests start others, which inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return f"needs a Hopper GPU: PyTorch {torch.__version__} sees no CUDA device"
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        return f"needs a Hopper GPU (9.0): {torch.cuda.get_device_name()} has compute capability {capability}"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="FOLDER", help="keep the outcome of a run on a GPU there")
    parser.addoption("--strict-kernels", action="store_true", help="let no call on a GPU compile")
    parser.addoption("--fuzz-minutes", type=float, metavar="M", help="fuzz for so long with each seed, not 40 cases")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder = config.getoption("--results")
    if folder is None or hasattr(config, "workerinput") or _why_no_gpu():  # xdist's processes know of their own tests
        return
    from bench.run import commit, machine, slug, versions

    tests: dict[str, Counter[str]] = {}
    fuzzed = {"minutes_of_each_seed": config.getoption("--fuzz-minutes"), "cases": 0}
    figures: dict[str, dict[str, object]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if outcome != "passed" or report.when == "call":
                tests.setdefault(report.nodeid.partition("[")[0], Counter())[outcome] += 1
                told = dict(report.user_properties)
                fuzzed["cases"] += told.pop("cases", 0)
                if told:
                    figures[report.nodeid] = told
    strict = bool(config.getoption("--strict-kernels"))
    now, gpu = datetime.now(timezone.utc), machine()
    total = sum(tests.values(), Counter())
    about = {"time": now.isoformat(timespec="seconds"), **commit(), "machine": gpu, "versions": versions()}
    about |= {"strict_kernels": strict, "total": total, "fuzzed": fuzzed, "figures": figures}
    about |= {"tests": dict(sorted(tests.items()))}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now.date()}-{slug(gpu['gpu'])}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    terminalreporter.write_line(f"{path}: {dict(total)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _why_no_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def memory_goes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """To the GPU after each of its tests: several processes share it, and some tests need a large part."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that this run's kernels are cached in, one for all of its processes; nothing from earlier runs."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    os.environ["DG_JIT_CACHE_DIR"] = str(folder)
    if request.config.getoption("--strict-kernels") and not _why_no_gpu():
        compiler.compile_many([kernel.source() for debug in (False, True) for kernel in kernels_for(debug=debug)])
        os.environ["DG_JIT_STRICT"] = "1"
    return folder


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process as it starts, with an empty cache of its own; returns that cache's folder."""
    for name in list(os.environ):
        if name.startswith("DG_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_said", set())
    compiler._memory.clear()
    return tmp_path / "cache"
