"""From a kernel's text to a cubin: memory, then folders of kernels, then the cache, then NVRTC (or nvcc, when asked).

Nothing is included but what a Source carries, so no toolkit and no headers need to be installed, and the hash of text,
options and compiler says all about a cubin.

Folders of kernels are those of DG_JIT_READ_ONLY_CACHE_DIRS, and the one that the package may bring (`make wheel`). One
that `deep-gemm compile --output` has made says which compiler it is of, and serves where there is another, or none.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import CompileError, InvalidInputError, MissingDependencyError, MissingKernelError
from . import sass, tools
from .cache import Cache, say_once

_ARCH = "90a"
READY_MADE = Path(__file__).parents[1] / "ready"  # kernels that the package brings, if it was built with them
COMPILER_FILE = "COMPILER"  # of a folder of kernels
_SLOW = re.compile(r"Potential Performance Loss|wait\S* is injected")  # numbers and details vary (docs/facts.md)

_memory: dict[tuple[str, str], dict[str, bytes]] = {}  # of a job -> the files of a cache entry
_locks: dict[tuple[str, str], threading.Lock] = {}
os.register_at_fork(after_in_child=_locks.clear)  # a thread that held one is not there any more


@dataclass(frozen=True)
class Source:
    """A translation unit, whole.

    name: its file name. headers: (name as included, text), and there are no others. kernel: what it is called.
    """

    name: str
    text: str
    headers: tuple[tuple[str, str], ...] = ()
    kernel: str = ""

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def label(self) -> str:
        return self.kernel or self.stem

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
    """The image of a source for a call that needs it now.

    Raises: as obtain; MissingKernelError if it would have to be compiled, and DG_JIT_STRICT rules that out.
    """
    return obtain(source, strict=settings.get("DG_JIT_STRICT")).image


def obtain(source: Source, strict: bool = False, output: Path | None = None) -> Cubin:
    """The cubin of a source, from memory, from disk or compiled now. Threads and processes wait for one another.

    The cubin of a cache entry has PTX only where DG_JIT_DUMP_PTX put it there. strict: nothing is compiled. output: a
    folder of kernels for all to read that gets it, whatever other places have it; from the cache it is copied.

    Raises: CompileError; MissingDependencyError if there is no compiler; MissingKernelError.
    """
    job = _Job(source, output)
    with _locks.setdefault(job.identity, threading.Lock()):
        files = {} if output else _memory.get(job.identity, {})
        if job.wanted <= files.keys():
            _say("DG_JIT_DEBUG", f"in memory: {source.label}")
        else:
            files = job.from_disk_or_compiler(strict)
            if not output:
                _memory[job.identity] = files
    return job.checked(
        Cubin(files["kernel.cubin"], files.get("kernel.ptx", b"").decode(), files["kernel.log"].decode())
    )


def find(source: Source, output: Path | None = None) -> tuple[Path, bool]:
    """Where on disk the kernel is, or would be if it were compiled now (as obtain does); and whether it is."""
    job = _Job(source, output)
    compiler = compiler_of(output) if output else None
    for cache, key in [(job.cache, job.key_of(compiler))] if compiler else job.places():
        if job.load(cache, key):
            return cache.entry(source.stem, key), True
    return job.cache.entry(source.stem, job.key_of(compiler or job.compiler)), False


def compile_many(
    sources: Iterable[Source],
    jobs: int | None = None,
    on_done: Callable[[Source, Cubin], None] | None = None,
    output: Path | None = None,
) -> list[Cubin]:
    """obtain() for each source, in `jobs` threads (None: one per core). on_done is called here as each gets ready.

    Raises: the first error. Compilations under way are then waited for, the others dropped.
    """
    pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)))
    try:
        futures = {pool.submit(obtain, source, output=output): source for source in sources}
        for future in as_completed(futures):
            cubin = future.result()
            if on_done:
                on_done(futures[future], cubin)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def default_compiler() -> str:
    """The name of what kernels would be compiled with now. Raises: MissingDependencyError."""
    return _Job(Source("empty.cu", "")).compiler


class _Job:
    """One source, and how the settings of this moment say to compile it."""

    def __init__(self, source: Source, output: Path | None = None) -> None:
        nvcc = settings.get("DG_JIT_NVCC_COMPILER")
        if not nvcc and not settings.get("DG_JIT_USE_NVRTC"):
            remedy = "set CUDA_HOME to a CUDA toolkit, or unset DG_JIT_USE_NVRTC to compile without one"
            nvcc = tools.find("nvcc", "nvidia-cuda-nvcc", remedy)
        self.source, self.nvcc = source, nvcc
        self.build = functools.partial(_nvcc, nvcc) if nvcc else _nvrtc
        self.options = ("-std=c++17", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
        if settings.get("DG_JIT_WITH_LINEINFO"):
            self.options += ("-lineinfo",)
        self.interleave = not settings.get("DG_DISABLE_FFMA_INTERLEAVE")
        parts = (source.name, source.text, source.headers, self.options, _ARCH)
        if self.interleave and sass.can_read():
            parts += ("interleaved", sass.YIELDS, sass.YIELDS_BESIDE_MORE, sass.FEW, sass.YIELDS_OF_FEW)
        self.content = _digest(parts)
        self.identity = self.content, str(nvcc or "")
        trusted = settings.get("DG_JIT_ALLOW_SHARED_CACHE")
        self.cache = self.copied_from = Cache(settings.get("DG_JIT_CACHE_DIR"), trusted, public=trusted)
        self.folders: list[Cache] = []  # that are looked in before
        if output:
            self.cache = Cache(output, trusted, public=True)
        else:
            self.folders = [Cache(path, trusted) for path in settings.get("DG_JIT_READ_ONLY_CACHE_DIRS") or ()]
            self.folders.append(Cache(READY_MADE, trusted=True))  # like the code beside it
        self.wants_ptx = settings.get("DG_JIT_DUMP_PTX") or settings.get("DG_JIT_DUMP_ASM")
        self.wants_sass = settings.get("DG_JIT_DUMP_SASS") or settings.get("DG_JIT_DUMP_ASM")

    @functools.cached_property
    def compiler(self) -> str:
        """Its name and version. Loads it, which is not free."""
        return _nvcc_version(self.nvcc) if self.nvcc else _load_nvrtc()[1]

    @functools.cached_property
    def key(self) -> str:
        return self.key_of(self.compiler)

    def key_of(self, compiler: str) -> str:
        return _digest((self.content, compiler))

    @property
    def wanted(self) -> set[str]:
        """The files that an entry must have to be a hit."""
        dumps = ["kernel.ptx"] * self.wants_ptx + ["kernel.sass"] * self.wants_sass
        return {"kernel.cubin", "kernel.cu", "kernel.log", *dumps}

    def places(self) -> Iterator[tuple[Cache, str]]:
        """Where the kernel may be, and by which key."""
        for folder in self.folders:
            if not os.path.isdir(folder.root):
                if folder.root != READY_MADE:
                    say_once(folder.root, f"deep_gemm: {folder.root} of DG_JIT_READ_ONLY_CACHE_DIRS is no folder")
                continue
            compiler = None if self.nvcc else compiler_of(folder.root)  # who names nvcc wants nvcc's
            compiler = compiler or self.compiler
            if _driver_loads(compiler):
                yield folder, self.key_of(compiler)
        yield self.cache, self.key

    def load(self, cache: Cache, key: str) -> dict[str, bytes] | None:
        files = cache.load(self.source.stem, key)
        return files if files and self.wanted <= files.keys() else None

    def from_disk_or_compiler(self, strict: bool) -> dict[str, bytes]:
        try:
            for cache, key in self.places():
                if files := self.load(cache, key):
                    _say("DG_JIT_DEBUG", f"hit: {cache.entry(self.source.stem, key)}")
                    return files
        except MissingDependencyError as error:
            if not strict:
                raise
            raise self._missing(f". {error}") from error
        if strict:
            raise self._missing()
        _say("DG_JIT_DEBUG", f"miss: {self.cache.entry(self.source.stem, self.key)}")
        with self.cache.lock(self.source.stem, self.key):
            if files := self.load(self.cache, self.key):
                return files  # another process was at it
            files = (self.cache != self.copied_from and self.load(self.copied_from, self.key)) or self.compiled()
            about = {"kernel": self.source.label, "compiler": self.compiler, "arch": f"sm_{_ARCH}"}
            self.cache.store(self.source.stem, self.key, files, about | {"options": " ".join(self.options)})
            return files

    def compiled(self) -> dict[str, bytes]:
        """The files of an entry."""
        cubin = self.compile()
        text = "\n".join(f"// ======== {name} ========\n{text}" for name, text in self.source.files)
        files = {"kernel.cubin": cubin.image, "kernel.cu": text.encode(), "kernel.log": cubin.log.encode()}
        if self.wants_ptx:
            files["kernel.ptx"] = cubin.ptx.encode()
        if self.wants_sass:
            files["kernel.sass"] = sass.disassemble(cubin.image).encode()
        return files

    def _missing(self, why: str = "") -> MissingKernelError:
        kernel = self.source.label
        command = f"python -m deep_gemm compile --kernel {shlex.quote(kernel)}"
        caches = [cache for cache in (*self.folders, self.cache) if cache.root != READY_MADE or READY_MADE.is_dir()]
        places = ", ".join(str(cache.root) for cache in caches)
        refused = [reason for cache in caches if (reason := cache.refusal())]
        return MissingKernelError(
            f"the kernel {kernel} is not in {places}, and DG_JIT_STRICT=1 rules out compiling it now: run `{command}` "
            "with the same DG_ variables (without --kernel it compiles all), or unset DG_JIT_STRICT"
            + "".join(f". {reason}" for reason in refused)
            + why,
            kernel=kernel,
            command=command,
        )

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


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compiler_of(folder: Path) -> str | None:
    """What a folder of kernels was compiled with, if it says so."""
    path = folder / COMPILER_FILE
    try:
        return path.read_text(encoding="utf-8").strip()[:100] or None if path.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


@functools.cache
def _driver_loads(compiler: str) -> bool:
    """Whether the driver, if there is one, is new enough for that compiler's cubins: of the same major version."""
    found = re.search(r"(\d+)\.", compiler)
    try:
        code, version = importlib.import_module("cuda.bindings.driver").cuDriverGetVersion()
    except (ImportError, RuntimeError):
        return True
    return bool(int(code)) or not found or version // 1000 >= int(found[1])


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
