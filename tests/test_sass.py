"""What is read out of a cubin, held against the compiler's own words and against nvdisasm."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
from probe import LOCAL_MEMORY, PROBE, SERIALISED

from deep_gemm.errors import InvalidInputError, MissingDependencyError
from deep_gemm.runtime import sass, tools
from deep_gemm.runtime.compiler import Source, obtain

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)(\.[A-Z0-9.]+)?.*/\* 0x[0-9a-f]{16} \*/$", re.MULTILINE
)


def words_of(log: str) -> dict[str, int]:
    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return {
        "registers": figure(r"Used (\d+) registers"),
        "local_bytes": figure(r"(\d+) bytes stack frame"),
        "shared_bytes": figure(r"(\d+) bytes smem"),
    }


@pytest.mark.parametrize("source", [PROBE, SERIALISED, LOCAL_MEMORY])
def test_the_compiler_says_the_same(source: Source):
    cubin = obtain(source)
    info = sass.read(cubin.image, "probe")
    assert words_of(cubin.log) == {name: getattr(info, name) for name in ("registers", "local_bytes", "shared_bytes")}
    assert info.registers > 0
    assert info.local_bytes == cubin.local_bytes


def test_what_the_probe_holds():
    info = sass.read(obtain(PROBE).image, "probe")
    assert (info.qgmma, info.warpgroup_arrives, info.warpgroup_waits) == (2, 1, 1)
    assert info.ffma == 4
    assert (info.local_bytes, info.local_loads, info.local_stores, info.shared_bytes) == (0, 0, 0, 0)
    assert info.setmaxnreg == 0


def test_serialised_wgmmas_show():
    info = sass.read(obtain(SERIALISED).image, "probe")
    assert info.warpgroup_arrives == info.warpgroup_waits == info.qgmma > 2


def test_local_memory_shows():
    info = sass.read(obtain(LOCAL_MEMORY).image, "probe")
    assert info.local_bytes == 256 and info.local_loads and info.local_stores
    assert info.shared_bytes == 33 * 4


def test_a_kernel_that_is_not_there():
    with pytest.raises(InvalidInputError, match=r"^the cubin has no kernel 'fp8_gemm', expected one of: probe$"):
        sass.read(obtain(PROBE).image)


def test_without_pyelftools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(MissingDependencyError, match=r"^reading a cubin needs pyelftools: pip install pyelftools$"):
        sass.read(b"")


def listing_of(source: Source) -> str:
    try:
        return sass.disassemble(obtain(source).image)
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("source", [PROBE, SERIALISED, LOCAL_MEMORY])
def test_nvdisasm_counts_the_same(source: Source):
    found = INSTRUCTION.findall(listing_of(source))
    names = Counter(name for name, _ in found)
    kinds = Counter(name + suffix.split(".")[1] for name, suffix in found if name == "WARPGROUP" for suffix in [suffix])
    info = sass.read(obtain(source).image, "probe")
    assert info.instructions == len(found)
    assert info.qgmma == names["QGMMA"]
    assert info.ffma == names["FFMA"]
    assert info.local_loads == names["LDL"]
    assert info.local_stores == names["STL"]
    assert info.warpgroup_arrives == kinds["WARPGROUPARRIVE"]
    assert info.warpgroup_waits == kinds["WARPGROUPDEPBAR"]
    assert info.setmaxnreg == names["USETMAXREG"]


def test_without_nvdisasm(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(tools.importlib.metadata, "files", lambda package: [])
    with pytest.raises(MissingDependencyError) as caught:
        sass.disassemble(b"")
    assert str(caught.value) == (
        f"nvdisasm is neither on PATH nor in CUDA_HOME ({tmp_path}): pip install nvidia-cuda-nvdisasm"
    )


def test_where_a_program_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    for folder in (tmp_path / "toolkit" / "bin", tmp_path / "path"):
        with pytest.raises(MissingDependencyError, match=r"buy one$"):
            tools.find("no-such-tool", "no-such-package-anywhere", "buy one")
        folder.mkdir(parents=True)
        program = folder / "nvdisasm"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert tools.find("nvdisasm", "no-such-package-anywhere", "buy one") == program
