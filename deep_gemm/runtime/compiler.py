"""From a kernel's text to a cubin: memory, then disk, then NVRTC (or nvcc, when asked).

Nothing is included but what a Source carries, so no toolkit and no headers need to be installed, and the hash of text,
options and compiler says all about a cubin.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import CompileError, InvalidInputError, MissingDependencyError
from . import sass, tools
from .cache import Cache

_ARCH = "90a"
_SLOW = re.compile(r"Potential Performance Loss|wait\S* is injected")  # numbers and details vary (docs/facts.md)

_memory: dict[str, dict[str, bytes]] = {}  # key -> the files of a cache entry
_locks: dict[str, threading.Lock] = {}
os.register_at_fork(after_in_child=_locks.clear)  # a thread that held one is not there any more


@dataclass(frozen=True)
class Source:
    """A translation unit, whole. name: its file name. headers: (name as included, text), and there are no others."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        return (*self.headers, (self.name, self.text))

    def write(self, folder: Path) -> Path:
        """Lays the files out as the includes expect them, and returns the path of the main one."""
        for name, text in self.files:
            (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return folder / self.name


@dataclass(frozen=True)
class Cubin:
    """What the compiler made: the ELF image, the PTX before it, and all that the compiler said."""

    image: bytes
    ptx: str
    log: str

    @property
    def local_bytes(self) -> int:
        """Local memory of a thread: spilled registers, and arrays with computed indices."""
        return sum(map(int, re.findall(r"(\d+) bytes stack frame", self.log)))

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.log.splitlines() if "warning" in line or _SLOW.search(line)]

    @property
    def performance_warnings(self) -> list[str]:
        """Those about serialised wgmmas (C7510, C7514, C7515, C7517) and an ignored setmaxnreg (C7508)."""
        return [line for line in self.warnings if _SLOW.search(line)]


def compile(source: Source) -> Cubin:
    """Compiles, whatever the cache holds. Raises: CompileError; MissingDependencyError if there is no compiler."""
    job = _Job(source)
    return job.checked(job.compile())


def cubin_for(source: Source) -> bytes:
    """The image of obtain(source)."""
    return obtain(source).image


def obtain(source: Source) -> Cubin:
    """The cubin of a source, from memory, from disk or compiled now. Threads and processes wait for one another.

    The cubin of a cache entry has PTX only where DG_JIT_DUMP_PTX put it there.

    Raises: CompileError; MissingDependencyError if there is no compiler.
    """
    job = _Job(source)
    with _locks.setdefault(job.key, threading.Lock()):
        files = _memory.get(job.key, {})
        if job.wanted <= files.keys():
            _say("DG_JIT_DEBUG", f"in memory: {source.stem}.{job.key[:32]}")
        else:
            files = _memory[job.key] = job.from_disk_or_compiler()
    return job.checked(
        Cubin(files["kernel.cubin"], files.get("kernel.ptx", b"").decode(), files["kernel.log"].decode())
    )


def compile_many(
    sources: Iterable[Source], jobs: int | None = None, on_done: Callable[[Source, Cubin], None] | None = None
) -> list[Cubin]:
    """obtain() for each source, in `jobs` threads (None: one per core). on_done is called here as each gets ready.

    Raises: the first error. Compilations under way are then waited for, the others dropped.
    """
    pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)))
    try:
        futures = {pool.submit(obtain, source): source for source in sources}
        for future in as_completed(futures):
            cubin = future.result()
            if on_done:
                on_done(futures[future], cubin)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


class _Job:
    """One source, and how the settings of this moment say to compile it."""

    def __init__(self, source: Source) -> None:
        nvcc = settings.get("DG_JIT_NVCC_COMPILER")
        if not nvcc and not settings.get("DG_JIT_USE_NVRTC"):
            remedy = "set CUDA_HOME to a CUDA toolkit, or unset DG_JIT_USE_NVRTC to compile without one"
            nvcc = tools.find("nvcc", "nvidia-cuda-nvcc", remedy)
        self.source = source
        self.build = functools.partial(_nvcc, nvcc) if nvcc else _nvrtc
        self.compiler = _nvcc_version(nvcc) if nvcc else _load_nvrtc()[1]
        self.options = ("-std=c++17", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
        if settings.get("DG_JIT_WITH_LINEINFO"):
            self.options += ("-lineinfo",)
        self.interleave = not settings.get("DG_DISABLE_FFMA_INTERLEAVE")
        parts = (source.name, source.text, source.headers, self.options, self.compiler, _ARCH)
        if self.interleave and sass.can_read():
            parts += ("interleaved", sass.YIELDS, sass.YIELDS_BESIDE_MORE, sass.FEW, sass.YIELDS_OF_FEW)
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.cache = Cache(settings.get("DG_JIT_CACHE_DIR"))
        self.wants_ptx = settings.get("DG_JIT_DUMP_PTX") or settings.get("DG_JIT_DUMP_ASM")
        self.wants_sass = settings.get("DG_JIT_DUMP_SASS") or settings.get("DG_JIT_DUMP_ASM")

    @property
    def wanted(self) -> set[str]:
        """The files that an entry must have to be a hit."""
        dumps = ["kernel.ptx"] * self.wants_ptx + ["kernel.sass"] * self.wants_sass
        return {"kernel.cubin", "kernel.cu", "kernel.log", *dumps}

    def from_disk_or_compiler(self) -> dict[str, bytes]:
        entry = self.cache.entry(self.source.stem, self.key)
        if files := self._from_disk():
            _say("DG_JIT_DEBUG", f"hit: {entry}")
            return files
        _say("DG_JIT_DEBUG", f"miss: {entry}")
        with self.cache.lock(self.source.stem, self.key):
            if files := self._from_disk():
                return files  # another process was at it
            cubin = self.compile()
            text = "\n".join(f"// ======== {name} ========\n{text}" for name, text in self.source.files)
            files = {"kernel.cubin": cubin.image, "kernel.cu": text.encode(), "kernel.log": cubin.log.encode()}
            if self.wants_ptx:
                files["kernel.ptx"] = cubin.ptx.encode()
            if self.wants_sass:
                files["kernel.sass"] = sass.disassemble(cubin.image).encode()
            self.cache.store(self.source.stem, self.key, files)
            return files

    def _from_disk(self) -> dict[str, bytes] | None:
        files = self.cache.load(self.source.stem, self.key)
        return files if files and self.wanted <= files.keys() else None

    def compile(self) -> Cubin:
        start = time.perf_counter()
        image, ptx, log = self.build(self.source, self.options)
        _say("DG_JIT_DEBUG", f"{self.source.name}: {self.compiler} took {time.perf_counter() - start:.2f} s")
        _say("DG_JIT_PTXAS_VERBOSE", f"{self.source.name}: the compiler says\n{log}")
        if not image:
            raise self._error("does not compile", log)
        return Cubin(self._interleaved(image), ptx, log)

    def _interleaved(self, image: bytes) -> bytes:
        try:
            result = sass.interleave(image) if self.interleave else image
        except (MissingDependencyError, IndexError, KeyError, ValueError, struct.error) as error:
            warnings.warn(
                f"the FFMAs of {self.source.name} stay as the compiler made them, which may cost some speed: its "
                f"output cannot be read ({error!r}; {self.compiler}). DG_DISABLE_FFMA_INTERLEAVE=1 silences this",
                RuntimeWarning,
                stacklevel=2,
            )
            return image
        if settings.get("DG_PRINT_REG_REUSE"):
            after = sass.ffma_bits(result)
            for kernel, before in sass.ffma_bits(image).items():
                change = "as compiled" if result == image else f"interleaved to {after[kernel]}"
                _say("DG_PRINT_REG_REUSE", f"{kernel}: {before}, {change}")
        return result

    def checked(self, cubin: Cubin) -> Cubin:
        prints = "printf(" in self.source.text  # which puts its arguments into local memory
        if settings.get("DG_JIT_PTXAS_CHECK") and cubin.local_bytes and not prints:
            fault = f"uses {cubin.local_bytes} bytes of local memory a thread, which DG_JIT_PTXAS_CHECK=1 rules out"
            raise self._error(fault, cubin.log)
        return cubin

    def _error(self, fault: str, log: str) -> CompileError:
        path = self._keep(log)
        message = f"{self.source.name} {fault}.\nCompiler: {self.compiler}\nOptions: {' '.join(self.options)}\n"
        message += f"Source: {path or 'not kept, for nothing can be written'}\n{log}"
        return CompileError(message, log=log, options=self.options, source_path=path)

    def _keep(self, log: str) -> Path | None:
        """Keeps a source that failed where people can look at it: in the cache, or else in a temporary folder."""
        name = f"{self.source.stem}.{self.key[:32]}"
        for folder in (lambda: self.cache.root / "failed" / name, lambda: Path(tempfile.mkdtemp(prefix=f"{name}."))):
            with contextlib.suppress(OSError):
                path = self.source.write(folder())
                path.with_suffix(".log").write_text(log, encoding="utf-8")
                return path
        return None


@functools.cache
def _load_nvrtc() -> tuple[Any, str]:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"NVRTC, which compiles the kernels, cannot be loaded ({str(error).splitlines()[0]}): "
            "pip install cuda-bindings nvidia-cuda-nvrtc; "
            "for CUDA 12, pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12"
        ) from error
    return nvrtc, f"NVRTC {major}.{minor}"


def _nvrtc(source: Source, options: tuple[str, ...]) -> tuple[bytes, str, str]:
    """Image, PTX and log; no image where there is an error. Other threads run meanwhile."""
    nvrtc, version = _load_nvrtc()

    def read(kind: str) -> bytes:
        _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
        content = bytearray(size)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, content)
        return bytes(content)

    # What comes out of NVRTC's own cache (since 12.9, where there is a driver) is another process's, log and all.
    no_cache = ("--no-cache",) if nvrtc.nvrtcVersion()[1:] >= (12, 9) else ()
    options = (f"--gpu-architecture=sm_{_ARCH}", *options, *no_cache)
    _say("DG_JIT_PRINT_COMPILER_COMMAND", f"{version}: {shlex.join(options)} {source.name}")
    names = [name.encode() for name, _ in source.headers]
    texts = [text.encode() for _, text in source.headers]
    result, program = nvrtc.nvrtcCreateProgram(source.text.encode(), source.name.encode(), len(names), texts, names)
    if int(result):
        return b"", "", f"nvrtcCreateProgram: {nvrtc.nvrtcResult(int(result)).name}"
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = read("ProgramLog").decode(errors="replace").strip("\0\n ")
        if int(result):
            return b"", "", f"{log}\n{nvrtc.nvrtcResult(int(result)).name}".strip()
        return read("CUBIN"), read("PTX").decode().rstrip("\0"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _nvcc_version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = re.search(r"Cuda compilation tools.* (V\S+)", done.stdout)
    if not found:
        raise InvalidInputError(
            f"{nvcc} --version says {done.stdout[:200]!r}, expected an nvcc: "
            "set DG_JIT_NVCC_COMPILER to one, or unset it to compile without"
        )
    return f"nvcc {found[1]}"


def _nvcc(nvcc: Path, source: Source, options: tuple[str, ...]) -> tuple[bytes, str, str]:
    """As _nvrtc, by a program."""
    with tempfile.TemporaryDirectory(prefix="deep_gemm.") as name:
        folder = Path(name)
        source.write(folder)
        target = (f"-gencode=arch=compute_{_ARCH},code=sm_{_ARCH}", "-cubin", "--keep", "-I.", "-o", "kernel.cubin")
        command = ("env", "TMPDIR=.", str(nvcc), *target, *options, source.name)  # else errors litter /tmp
        _say("DG_JIT_PRINT_COMPILER_COMMAND", shlex.join(command))
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            return b"", "", done.stdout.strip()
        ptx = (folder / f"{source.stem}.ptx").read_text(encoding="utf-8")
        return (folder / "kernel.cubin").read_bytes(), ptx, done.stdout.strip()


def _say(setting: settings.Flag, message: str) -> None:
    if settings.get(setting):
        print(f"deep_gemm: {message}", file=sys.stderr, flush=True)
