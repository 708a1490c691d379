"""From a kernel's text to a cubin, without a GPU: compilers, options, errors, and the way through the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from probe import ALONE, LOCAL_MEMORY, PROBE, SERIALISED, SETMAXNREG_IGNORED, SLOW, WAIT_INJECTED, WRONG, numbered

from deep_gemm.errors import CompileError, InvalidInputError, MissingDependencyError, MissingKernelError
from deep_gemm.runtime import compiler, sass, tools
from deep_gemm.runtime.cache import Cache
from deep_gemm.runtime.compiler import Cubin, Source, compile_many, cubin_for, obtain

pytestmark = pytest.mark.usefixtures("fresh")


def entries_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# The compilers


def test_a_cubin():
    cubin = compiler.compile(PROBE)
    assert cubin.image[:4] == b"\x7fELF"
    assert ".target sm_90a" in cubin.ptx and "wgmma.mma_async" in cubin.ptx
    assert "registers" in cubin.log
    assert (cubin.local_bytes, cubin.warnings, cubin.performance_warnings) == (0, [], [])


@pytest.mark.parametrize(
    "source, words",
    [
        (SERIALISED, ["Potential Performance Loss", "wgmma", "serialized"]),
        (WAIT_INJECTED, ["(C751"]),
        (SETMAXNREG_IGNORED, ["C7508", "setmaxnreg"]),
    ],
)
def test_what_makes_it_slow_is_told(source: Source, words: list[str]):
    cubin = compiler.compile(source)
    assert cubin.performance_warnings == cubin.warnings
    assert any(all(word in line for word in words) for line in cubin.performance_warnings)


@pytest.mark.parametrize("injected", ["warpgroup.wait", "wgmma.wait_group"], ids=["up to 13.0", "13.5"])
def test_an_injected_wait_by_any_wording(injected: str):
    line = f"ptxas info    : (C7517) {injected} is injected in around line 64 by compiler to allow use of registers"
    assert compiler.Cubin(b"", "", f"ptxas info    : 0 bytes gmem\n{line}\n").performance_warnings == [line]


def test_a_warning_of_another_kind():
    source = Source("warn.cu", 'extern "C" __global__ void warn() { int unused; }\n')
    cubin = compiler.compile(source)
    assert cubin.warnings and not cubin.performance_warnings


def test_an_error(fresh: Path):
    with pytest.raises(CompileError) as caught:
        compiler.compile(WRONG)
    error = caught.value
    assert 'identifier "missing_name" is undefined' in error.log and "probe.cu(2)" in error.log
    assert "-std=c++17" in error.options
    assert error.source_path and error.source_path.is_relative_to(fresh / "failed")
    assert error.source_path.read_text() == WRONG.text
    assert (error.source_path.parent / "ptx" / "wgmma.cuh").read_text() == WRONG.headers[0][1]
    assert error.source_path.with_suffix(".log").read_text() == error.log
    message = str(error)
    assert message.startswith("probe.cu does not compile.\nCompiler: NVRTC ")
    assert f"\nOptions: {' '.join(error.options)}\nSource: {error.source_path}\n" in message
    assert message.endswith(error.log)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.log, copy.source_path) == (message, error.log, error.source_path)


def test_an_error_with_a_header_that_is_not_there():
    with pytest.raises(CompileError, match=r'cannot open source file "ptx/wgmma.cuh"'):
        compiler.compile(Source(PROBE.name, PROBE.text))


def test_an_error_where_nothing_can_be_written(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fresh.write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CompileError) as caught:
        compiler.compile(WRONG)
    assert caught.value.source_path and caught.value.source_path.parent.parent == tmp_path
    monkeypatch.setattr("tempfile.tempdir", str(fresh))
    with pytest.raises(CompileError, match=r"\nSource: not kept, for nothing can be written\n") as caught:
        compiler.compile(WRONG)
    assert caught.value.source_path is None


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch):
    compiler._load_nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(MissingDependencyError, match=r"^NVRTC, .* pip install cuda-bindings nvidia-cuda-nvrtc; "):
        obtain(PROBE)
    monkeypatch.undo()
    compiler._load_nvrtc.cache_clear()


FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 99.1, V99.1.42"; exit; fi
[ -f ptx/wgmma.cuh ] || exit 1
echo "$@" >> "$0.calls"
grep -q missing_name probe.cu && { echo "probe.cu(2): error: missing_name"; exit 1; }
printf image > kernel.cubin
printf ptx > probe.ptx
echo "0 bytes stack frame"
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sass, "interleave", lambda image: image)  # which is not one of an ELF file
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(FAKE_NVCC)
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("name", ["DG_JIT_NVCC_COMPILER", "DG_NVCC_COMPILER"])
@pytest.mark.parametrize("use_nvrtc", [None, "0", "1"])
def test_naming_nvcc_uses_it(
    name: str, use_nvrtc: str | None, fake_nvcc: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, str(fake_nvcc))
    if use_nvrtc:
        monkeypatch.setenv("DG_JIT_USE_NVRTC", use_nvrtc)
    assert compiler.compile(PROBE) == Cubin(b"image", "ptx", "0 bytes stack frame")
    (call,) = Path(f"{fake_nvcc}.calls").read_text().splitlines()
    target = "-gencode=arch=compute_90a,code=sm_90a -cubin --keep -I. -o kernel.cubin"
    assert call == f"{target} -std=c++17 --ptxas-options=-v --ptxas-options=--warn-on-spills probe.cu"
    assert cubin_for(PROBE) == b"image"
    monkeypatch.delenv(name)
    monkeypatch.delenv("DG_JIT_USE_NVRTC", raising=False)
    assert cubin_for(PROBE)[:4] == b"\x7fELF"
    assert len(entries_of(fresh)) == 2


def test_nvcc_is_found(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(tools.shutil, "which", lambda program, path=None: path and f"{path}/{program}")
    assert cubin_for(PROBE) == b"image"
    monkeypatch.setattr(tools.shutil, "which", lambda program, path=None: None)
    monkeypatch.setattr(tools.importlib.metadata, "files", lambda package: [])
    with pytest.raises(MissingDependencyError) as caught:
        cubin_for(PROBE)
    assert str(caught.value) == (
        f"nvcc is neither on PATH nor in CUDA_HOME ({tmp_path}): "
        "set CUDA_HOME to a CUDA toolkit, or unset DG_JIT_USE_NVRTC to compile without one"
    )


def test_an_error_of_nvcc(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    with pytest.raises(CompileError, match=r"^probe.cu does not compile.\nCompiler: nvcc V99.1.42\n") as caught:
        obtain(WRONG)
    assert caught.value.log == "probe.cu(2): error: missing_name"


def test_a_program_that_is_no_nvcc(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvcc.write_text("#!/bin/sh\necho a toaster\n")
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    with pytest.raises(
        InvalidInputError, match=r"nvcc --version says 'a toaster\\n', expected an nvcc: set DG_JIT_NVCC"
    ):
        obtain(PROBE)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
def test_a_real_nvcc(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "0")
    cubin = obtain(PROBE)
    assert sass.read(cubin.image, "probe").qgmma == 2
    assert "registers" in cubin.log and not cubin.warnings
    assert "wgmma.mma_async" in compiler.compile(PROBE).ptx
    assert compiler.compile(SERIALISED).performance_warnings
    with pytest.raises(CompileError) as caught:
        obtain(WRONG)
    assert 'identifier "missing_name" is undefined' in caught.value.log


# The settings


def test_debug(fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    for value in "01":
        monkeypatch.setenv("DG_JIT_DEBUG", value)
        source = numbered(int(value))
        cubin_for(source)
        cubin_for(source)
        compiler._memory.clear()
        cubin_for(source)
        said = capfd.readouterr().err.splitlines()
        if value == "0":
            assert said == []
    (entry,) = [path for path in entries_of(fresh) if path.name in said[0]]
    assert said[0] == f"deep_gemm: miss: {entry}"
    assert said[1].startswith("deep_gemm: probe.cu: NVRTC ") and said[1].endswith(" s")
    assert said[2:] == ["deep_gemm: in memory: probe", f"deep_gemm: hit: {entry}"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("DG_JIT_PRINT_COMPILER_COMMAND", "--gpu-architecture=sm_90a -std=c++17 "),
        ("DG_JIT_PRINT_NVCC_COMMAND", "--gpu-architecture=sm_90a -std=c++17 "),
        ("DG_JIT_PTXAS_VERBOSE", "registers"),
        ("DG_PTXAS_VERBOSE", "registers"),
    ],
)
def test_what_is_printed(name: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    for value in "01":
        monkeypatch.setenv(name, value)
        compiler.compile(PROBE)
        assert (words in capfd.readouterr().err) is (value == "1")


@pytest.mark.parametrize("version", [(12, 8), (12, 9), (13, 0)], ids=str)
def test_nvrtc_caches_nothing(
    version: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Older ones know neither a cache nor the option."""
    nvrtc, name = compiler._load_nvrtc()

    class Versioned:
        nvrtcVersion = staticmethod(lambda: (0, *version))

        def __getattr__(self, attribute: str) -> Any:
            return getattr(nvrtc, attribute)

    monkeypatch.setattr(compiler, "_load_nvrtc", lambda: (Versioned(), name))
    monkeypatch.setenv("DG_JIT_PRINT_COMPILER_COMMAND", "1")
    assert compiler.compile(PROBE).image
    assert (" --no-cache " in capfd.readouterr().err) is (version >= (12, 9))


def test_ffmas_are_interleaved_unless_that_is_disabled(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sass, "interleave", lambda image: b"interleaved " + image)
    images: list[bytes] = []
    for value in ("0", "1", "0"):
        monkeypatch.setenv("DG_DISABLE_FFMA_INTERLEAVE", value)
        images.append(cubin_for(PROBE))
    assert images[0] == images[2] == b"interleaved " + images[1]
    assert images[1][:4] == b"\x7fELF"
    assert len(entries_of(fresh)) == 2


def test_a_cubin_of_another_interleaving_is_no_hit(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    for yields in ((4, 16), (4, 4), (4, 16)):
        monkeypatch.setattr(sass, "YIELDS", yields)
        cubin_for(PROBE)
    assert len(entries_of(fresh)) == 2


def test_ffmas_of_nvcc(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    monkeypatch.setattr(sass, "interleave", lambda image: b"interleaved " + image)
    assert compiler.compile(PROBE).image == b"interleaved image"


@pytest.mark.parametrize("image", [b"", b"image", b"\x7fELF" + bytes(200)], ids=len)
def test_output_that_cannot_be_read_is_used_as_it_is(image: bytes, monkeypatch: pytest.MonkeyPatch):
    with pytest.warns(RuntimeWarning, match=r"the FFMAs of probe.cu stay as .*; NVRTC .*DG_DISABLE_FFMA_INTERLEAVE=1"):
        assert compiler._Job(PROBE)._interleaved(image) == image
    monkeypatch.setenv("DG_DISABLE_FFMA_INTERLEAVE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler._Job(PROBE)._interleaved(image) == image


def test_without_pyelftools(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "elftools", None)
        with pytest.warns(RuntimeWarning, match=r"the FFMAs of probe.cu stay as .*: pip install pyelftools"):
            as_compiled = cubin_for(PROBE)
        with pytest.raises(MissingDependencyError, match="pip install pyelftools"):
            sass.read(as_compiled)
    assert sass.read(cubin_for(PROBE), "probe").ffma == sass.read(as_compiled, "probe").ffma
    assert len(entries_of(fresh)) == 2  # what is installed later finds no kernel that was left as compiled


def test_ffma_bits_are_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("DG_PRINT_REG_REUSE", "0")
    compiler.compile(PROBE)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("DG_PRINT_REG_REUSE", "1")
    bits = sass.ffma_bits(cubin_for(PROBE))["probe"]
    assert capfd.readouterr().err == f"deep_gemm: probe: {bits}, as compiled\n"
    cubin_for(PROBE)
    assert capfd.readouterr().err == ""  # nothing was compiled

    monkeypatch.setattr(sass, "interleave", lambda image: b"interleaved")
    monkeypatch.setattr(sass, "ffma_bits", lambda image: {"probe": "0101" if image == b"interleaved" else "1111"})
    compiler.compile(PROBE)
    assert capfd.readouterr().err == "deep_gemm: probe: 1111, interleaved to 0101\n"


def test_the_command_of_nvcc_is_printed(
    fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    monkeypatch.setenv("DG_JIT_PRINT_COMPILER_COMMAND", "1")
    compiler.compile(PROBE)
    assert capfd.readouterr().err.startswith(
        f"deep_gemm: env TMPDIR=. {fake_nvcc} -gencode=arch=compute_90a,code=sm_90a -cubin "
    )


def test_local_memory_is_ruled_out_when_asked(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_PTXAS_CHECK", "0")
    image = cubin_for(LOCAL_MEMORY)
    monkeypatch.setenv("DG_JIT_PTXAS_CHECK", "1")
    fault = "^probe.cu uses 256 bytes of local memory a thread, which DG_JIT_PTXAS_CHECK=1 rules out.\n"
    for forget in (dict, compiler._memory.clear):  # from memory; from disk
        forget()
        with pytest.raises(CompileError, match=fault) as caught:
            cubin_for(LOCAL_MEMORY)
        assert "256 bytes stack frame" in caught.value.log and caught.value.source_path
    with pytest.raises(CompileError, match=fault):
        compiler.compile(LOCAL_MEMORY)
    assert cubin_for(PROBE)
    monkeypatch.setenv("DG_JIT_PTXAS_CHECK", "0")
    assert cubin_for(LOCAL_MEMORY) == image


def test_line_information(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    assert b".debug_line" not in cubin_for(PROBE)
    monkeypatch.setenv("DG_JIT_WITH_LINEINFO", "0")
    assert b".debug_line" not in cubin_for(PROBE)
    monkeypatch.setenv("DG_JIT_WITH_LINEINFO", "1")
    assert b".debug_line" in cubin_for(PROBE)
    assert len(entries_of(fresh)) == 2


@pytest.mark.parametrize("value", ["0", "1"])
@pytest.mark.parametrize(
    "name, files",
    [
        ("DG_JIT_DUMP_PTX", {"kernel.ptx"}),
        ("DG_JIT_DUMP_SASS", {"kernel.sass"}),
        ("DG_JIT_DUMP_ASM", {"kernel.ptx", "kernel.sass"}),
    ],
)
def test_dumps(name: str, value: str, files: set[str], fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sass, "disassemble", lambda image: f"QGMMA in {len(image)} bytes")
    image = cubin_for(PROBE)
    monkeypatch.setenv(name, value)
    assert cubin_for(PROBE) == image
    (entry,) = entries_of(fresh)
    found = {path.name: path.read_text() for path in entry.iterdir() if path.suffix in (".ptx", ".sass")}
    assert found.keys() == (files if value == "1" else set())
    assert "wgmma.mma_async" in found.get("kernel.ptx", "wgmma.mma_async")
    assert found.get("kernel.sass", "QGMMA").startswith("QGMMA")


def test_a_dump_without_a_disassembler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_DUMP_SASS", "1")
    monkeypatch.setattr(tools.shutil, "which", lambda program, path=None: None)
    monkeypatch.setattr(tools.importlib.metadata, "files", lambda package: [])
    with pytest.raises(MissingDependencyError, match=r"^nvdisasm is neither .*: pip install nvidia-cuda-nvdisasm$"):
        cubin_for(PROBE)


# The way through the cache


def test_an_entry_says_what_it_is(fresh: Path):
    image = cubin_for(PROBE)
    (entry,) = entries_of(fresh)
    assert entry.name.startswith("probe.") and len(entry.name) == len("probe.") + 32
    assert (entry / "kernel.cubin").read_bytes() == image
    text = (entry / "kernel.cu").read_text()
    assert text.index(PROBE.headers[0][1]) < text.index(PROBE.text)
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["sha256"]["kernel.cubin"] == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        Source("other.cu", PROBE.text, PROBE.headers),
        Source("probe.cu", PROBE.text + "\n", PROBE.headers),
        Source("probe.cu", PROBE.text, (("ptx/wgmma.cuh", PROBE.headers[0][1] + "\n"),)),
        Source("probe.cu", PROBE.text, (*PROBE.headers, ("b", ""))),
    ],
)
def test_the_key_covers_the_source(other: Source):
    assert compiler._Job(PROBE).key != compiler._Job(other).key


def test_the_key_covers_options_and_compiler_and_nothing_else(
    fresh: Path, tmp_path: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch
):
    key = compiler._Job(PROBE).key
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    assert compiler._Job(PROBE).key == key
    monkeypatch.setenv("DG_JIT_WITH_LINEINFO", "1")
    assert compiler._Job(PROBE).key != key
    monkeypatch.delenv("DG_JIT_WITH_LINEINFO")
    monkeypatch.setattr(compiler, "_load_nvrtc", lambda: (None, "NVRTC 99.1"))
    assert compiler._Job(PROBE).key != key
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    key_of_nvcc = compiler._Job(PROBE).key
    assert key_of_nvcc != key
    moved = Path(shutil.copy(fake_nvcc, tmp_path / "nvcc"))
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(moved))
    assert compiler._Job(PROBE).key == key_of_nvcc
    moved = Path(shutil.copy(fake_nvcc, tmp_path / "nvcc-newer"))
    moved.write_text(FAKE_NVCC.replace("V99.1.42", "V99.1.43"))
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(moved))
    assert compiler._Job(PROBE).key != key_of_nvcc


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are compiled from now on."""
    texts: list[str] = []
    build = compiler._nvrtc

    def count(source: Source, options: tuple[str, ...]) -> tuple[bytes, str, str]:
        texts.append(source.text)
        return build(source, options)

    monkeypatch.setattr(compiler, "_nvrtc", count)
    return texts


def test_memory_then_disk_then_compiler(monkeypatch: pytest.MonkeyPatch):
    compiled = counted(monkeypatch)
    first = obtain(PROBE)
    assert obtain(PROBE) == first
    compiler._memory.clear()
    assert obtain(PROBE) == first
    assert len(compiled) == 1


def test_a_flipped_byte_is_never_loaded(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    compiled = counted(monkeypatch)
    image = cubin_for(PROBE)
    (entry,) = entries_of(fresh)
    content = bytearray(image)
    content[len(content) // 2] ^= 1
    (entry / "kernel.cubin").write_bytes(content)
    compiler._memory.clear()
    assert cubin_for(PROBE) == image
    compiler._memory.clear()
    assert cubin_for(PROBE) == image
    assert len(compiled) == 2 and len(warnings_of(caplog)) == 1


def test_a_moved_cache_still_hits(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled = counted(monkeypatch)
    image = cubin_for(PROBE)
    shutil.move(fresh, tmp_path / "moved")
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "moved"))
    compiler._memory.clear()
    assert cubin_for(PROBE) == image
    assert len(compiled) == 1


def test_where_nothing_can_be_written_memory_serves(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    compiled = counted(monkeypatch)
    fresh.write_text("in the way")
    for _ in range(2):
        assert cubin_for(PROBE)[:4] == b"\x7fELF"
        assert cubin_for(numbered(1))[:4] == b"\x7fELF"
    assert len(compiled) == 2
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"deep_gemm: the kernel cache {fresh} cannot be written (")


def test_compile_many(monkeypatch: pytest.MonkeyPatch):
    compiled = counted(monkeypatch)
    sources = [numbered(number % 3) for number in range(9)]  # each three times: one compilation per key
    done: list[tuple[Source, Cubin]] = []
    cubins = compile_many(sources, jobs=9, on_done=lambda source, cubin: done.append((source, cubin)))
    assert len(compiled) == 3
    assert cubins == [obtain(source) for source in sources]
    assert sorted(source.text for source, _ in done) == sorted(source.text for source in sources)
    assert all(cubin == obtain(source) for source, cubin in done)
    assert compile_many([]) == []
    assert compile_many(sources, jobs=None) == cubins
    with pytest.raises(CompileError):
        compile_many([PROBE, WRONG, numbered(4)])


def test_a_fork_in_mid_compile():
    """A child is born while a thread that it does not have holds the lock of the very kernel that it needs."""
    identity = compiler._Job(PROBE).identity
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with compiler._locks.setdefault(identity, threading.Lock()):
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(cubin_for(PROBE)[:4] != b"\x7fELF")
    assert os.waitpid(child, 0)[1] == 0
    over.set()
    thread.join()


# Folders of kernels, and strict processes


@pytest.fixture
def folder(fresh: Path, tmp_path: Path) -> Path:
    """With PROBE in it, as `deep-gemm compile --output` makes them; and nothing in memory or in the cache."""
    made = tmp_path / "folder"
    obtain(PROBE, output=made)
    (made / compiler.COMPILER_FILE).write_text(compiler.default_compiler() + "\n")
    assert not compiler._memory and not fresh.exists()
    return made


def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MissingDependencyError("no NVRTC")

    monkeypatch.setattr(compiler, "_load_nvrtc", refuse)


def test_a_folder_is_looked_in_first_whatever_compiler_there_is(
    folder: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Nothing is compiled, no compiler is loaded, and nothing is written."""
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", f"{folder.parent / 'nowhere'}{os.pathsep}{folder}")
    monkeypatch.setenv("DG_JIT_STRICT", "1")
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    without_nvrtc(monkeypatch)
    files = sorted(folder.rglob("*"))
    (image,) = folder.glob("*/kernel.cubin")
    assert cubin_for(PROBE) == image.read_bytes()
    assert capfd.readouterr().err.startswith(f"deep_gemm: hit: {folder}/probe.")
    assert sorted(folder.rglob("*")) == files and not fresh.exists()
    with pytest.raises(MissingKernelError, match=r"^the kernel probe is not in .*\. no NVRTC$"):
        cubin_for(numbered(1))
    monkeypatch.setenv("DG_JIT_STRICT", "0")
    with pytest.raises(MissingDependencyError, match="no NVRTC"):
        cubin_for(numbered(1))


def test_the_sources_win(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Over a kernel of another text, of other options, of another compiler that was asked for by name."""
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    compiled = counted(monkeypatch)
    cubin_for(PROBE)
    assert compiled == []
    cubin_for(numbered(1))
    monkeypatch.setenv("DG_JIT_WITH_LINEINFO", "1")
    cubin_for(PROBE)
    assert compiled == [numbered(1).text, PROBE.text]


def test_a_folder_does_not_stand_in_for_nvcc(folder: Path, fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(fake_nvcc))
    assert cubin_for(PROBE) == b"image"


def test_a_folder_that_names_no_compiler_is_of_this_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As a copy of somebody's cache is."""
    (folder / compiler.COMPILER_FILE).unlink()
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    compiled = counted(monkeypatch)
    cubin_for(PROBE)
    assert compiled == []
    compiler._memory.clear()
    monkeypatch.setattr(compiler, "_load_nvrtc", lambda: (None, "NVRTC 99.1"))
    monkeypatch.setattr(compiler, "_nvrtc", lambda source, options: (b"image", "", "log"))
    monkeypatch.setattr(sass, "interleave", lambda image: image)
    assert cubin_for(PROBE) == b"image"


@pytest.mark.parametrize("driver, loads", [(12090, False), (13000, True), (13050, True), (14000, True)])
def test_a_folder_of_a_compiler_that_is_newer_than_the_driver(
    driver: int, loads: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such kernels do not load: then they are compiled by what is installed."""
    cuda = type(sys)("cuda.bindings.driver")
    cuda.cuDriverGetVersion = lambda: (0, driver)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    (folder / compiler.COMPILER_FILE).write_text("NVRTC 13.4\n")
    monkeypatch.setattr(compiler, "_load_nvrtc", lambda: (None, "NVRTC 12.9"))
    compiler._driver_loads.cache_clear()
    job = compiler._Job(PROBE)
    places = [(job.cache, job.key)]
    if loads:
        places.insert(0, (Cache(folder), job.key_of("NVRTC 13.4")))
    assert list(job.places()) == places
    compiler._driver_loads.cache_clear()


@pytest.mark.parametrize("odd", ["nowhere", "x" * 300, "file"])
def test_a_folder_that_is_none_is_told_of_once(
    odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(tmp_path / odd))
    for number in (1, 2):
        cubin_for(numbered(number))
    (warning,) = warnings_of(caplog)
    assert warning == f"deep_gemm: {tmp_path / odd} of DG_JIT_READ_ONLY_CACHE_DIRS is no folder"


def test_a_folder_whose_compiler_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Is taken for one of this compiler's, and nothing waits for a FIFO."""
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    compiled = counted(monkeypatch)
    name = folder / compiler.COMPILER_FILE
    for make in (name.mkdir, lambda: os.mkfifo(name), lambda: name.write_bytes(b"\xff\xfe")):
        name.rmdir() if name.is_dir() else name.unlink()
        make()
        compiler._memory.clear()
        cubin_for(PROBE)
    assert compiled == []


def test_kernels_that_the_package_brings(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Are the last folder, and as good as the code beside them, whoever may write there."""
    folder.chmod(0o777)
    monkeypatch.setattr(compiler, "READY_MADE", folder)
    compiled = counted(monkeypatch)
    cubin_for(PROBE)
    assert compiled == []


def test_a_folder_that_others_can_write_to_is_refused_unless_that_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder.chmod(0o777)
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(folder))
    monkeypatch.setenv("DG_JIT_STRICT", "1")
    with pytest.raises(MissingKernelError, match=re.escape(str(folder)) + r".*DG_JIT_ALLOW_SHARED_CACHE"):
        cubin_for(PROBE)
    assert len(warnings_of(caplog)) == 1
    monkeypatch.setenv("DG_JIT_ALLOW_SHARED_CACHE", "1")
    cubin_for(PROBE)


def test_what_is_compiled_into_a_folder(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Is copied from the cache where that has it, can be read by all, and is found there alone."""
    compiled = counted(monkeypatch)
    made = tmp_path / "made"
    image = cubin_for(PROBE)
    assert obtain(PROBE, output=made).image == obtain(PROBE, output=made).image == image
    assert obtain(numbered(1), output=made).image[:4] == b"\x7fELF"
    assert compiled == [PROBE.text, numbered(1).text]
    assert len(entries_of(made)) == 2 and len(entries_of(fresh)) == 1
    modes = {path.stat().st_mode & 0o777 for path in made.rglob("*") if not path.name.endswith(".lock")}
    assert modes == {0o755, 0o644}
    assert compiler.find(PROBE) == (fresh / entries_of(fresh)[0].name, True)
    assert compiler.find(numbered(1))[1] is False
    assert compiler.find(numbered(1), made)[1] is True


def test_strict(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    """What is not there is an error that says what to do; what is in memory, or on disk, serves."""
    monkeypatch.setenv("DG_JIT_STRICT", "1")
    compiled = counted(monkeypatch)
    with pytest.raises(MissingKernelError) as caught:
        cubin_for(replace(PROBE, kernel="128x256 probe"))
    assert caught.value.kernel == "128x256 probe"
    assert caught.value.command == "python -m deep_gemm compile --kernel '128x256 probe'"
    assert str(caught.value) == (
        f"the kernel 128x256 probe is not in {fresh}, and DG_JIT_STRICT=1 rules out compiling it now: run "
        f"`{caught.value.command}` with the same DG_ variables (without --kernel it compiles all), or unset "
        "DG_JIT_STRICT"
    )
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.kernel, copy.command) == (str(caught.value), caught.value.kernel, caught.value.command)
    assert compiled == [] and not fresh.exists()
    compile_many([PROBE])  # who asks for it compiles
    assert cubin_for(PROBE)
    compiler._memory.clear()
    assert cubin_for(PROBE)
    compiler._memory.clear()
    (entry,) = entries_of(fresh)
    os.truncate(entry / "kernel.cubin", 7)
    with pytest.raises(MissingKernelError):
        cubin_for(PROBE)
    monkeypatch.setenv("DG_JIT_STRICT", "0")
    assert cubin_for(PROBE)
    assert compiled == [PROBE.text] * 2


# Many processes

WORKER = """
import hashlib, sys
import probe
from deep_gemm.runtime.compiler import cubin_for
for number in map(int, sys.argv[1:]):
    print(hashlib.sha256(cubin_for(probe.numbered(number))).hexdigest())
"""

SLOW_WORKER = """
import probe
from deep_gemm.runtime.compiler import cubin_for
cubin_for(probe.SLOW)
"""


def start(script: str, tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"DG_JIT_DEBUG": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ALONE + script, *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sixteen_cold_processes_compile_each_kernel_once(fresh: Path, tmp_path: Path):
    numbers = ["1", "2", "3"]
    workers = [start(WORKER, tmp_path, *(numbers[i % 3 :] + numbers[: i % 3])) for i in range(16)]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 16
    digests = {tuple(sorted(out.split())) for out, _ in results}
    assert len(digests) == 1 and len(entries_of(fresh)) == 3
    assert sum(line.startswith("deep_gemm: probe.cu: ") for _, err in results for line in err.splitlines()) == 3
    assert not any("damaged" in err or "written" in err for _, err in results)


KILLED = """
import itertools, logging, os, random, signal, sys, time
import probe
from deep_gemm.runtime import cache
from deep_gemm.runtime.compiler import cubin_for

root, rng, said = cache.Path(sys.argv[1]), random.Random(7), []
logging.getLogger("deep_gemm").addFilter(said.append)
cubin_for(probe.numbered(-1))  # once, so that children spend no time on getting the compiler ready

def sound():
    # Every entry that can be seen loads, of whichever kernel.
    entries = list(cache.Cache(root).entries())
    assert not [entry for entry in entries if entry.fault], entries
    return len(entries)

def child(kernels):
    pid = os.fork()
    if not pid:
        for number in kernels:
            cubin_for(probe.numbered(number))
        os._exit(len(said))
    return pid

taken = 0.1
for round in range(200):
    for entry in list(cache.Cache(root).entries()):
        cache.Cache(root).remove(entry.path)
    pid = child(itertools.count(1000 * round))
    time.sleep(rng.uniform(0, 2 * taken))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    made, begun = sound(), time.perf_counter()
    assert os.waitpid(child([1000 * round + made]), 0)[1] == 0  # the next run, which needs what was under way
    taken = min(0.5, time.perf_counter() - begun)  # for one, however busy the machine is
    assert sound() == made + 1 and not said
    print(made)
"""


def test_two_hundred_kills_at_random_moments(fresh: Path, tmp_path: Path):
    """Of processes that compile one kernel after the other: no broken entry is ever seen, and the next run succeeds."""
    with start(KILLED, tmp_path, str(fresh)) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    made = [int(line) for line in out.split()]
    assert len(made) == 200
    assert made.count(0) < 200 and sum(made) > 20  # some were killed before they had made any, and others after


def test_a_kill_in_mid_compile_breaks_nothing(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with start(SLOW_WORKER, tmp_path) as worker:
        while not list(fresh.glob(".*.lock")):
            assert worker.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        assert worker.poll() is None
        worker.kill()
    assert entries_of(fresh) == []
    compiled = counted(monkeypatch)
    monkeypatch.setattr(compiler, "_nvrtc", lambda source, options: compiled.append("") or (b"image", "", "log"))
    monkeypatch.setattr(sass, "interleave", lambda image: image)
    begun = time.monotonic()
    assert cubin_for(SLOW) == b"image"
    assert len(compiled) == 1 and time.monotonic() - begun < 5
    assert len(entries_of(fresh)) == 1
