"""Every environment variable: its name, older names, default and meaning. The only reader of the environment.

A variable is read when its value is needed, so setting it after the import works. Empty counts as not set; where a
variable has an older name, the new one wins.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, overload

from .errors import InvalidInputError

Value: TypeAlias = bool | Path | tuple[Path, ...] | None
Flag: TypeAlias = Literal[
    "DG_JIT_STRICT",
    "DG_JIT_ALLOW_SHARED_CACHE",
    "DG_JIT_DEBUG",
    "DG_PRINT_CONFIGS",
    "DG_JIT_USE_NVRTC",
    "DG_JIT_PRINT_COMPILER_COMMAND",
    "DG_JIT_PTXAS_VERBOSE",
    "DG_JIT_PTXAS_CHECK",
    "DG_JIT_WITH_LINEINFO",
    "DG_JIT_DUMP_ASM",
    "DG_JIT_DUMP_PTX",
    "DG_JIT_DUMP_SASS",
    "DG_JIT_PRINT_LOAD_TIME",
    "DG_DISABLE_FFMA_INTERLEAVE",
    "DG_PRINT_REG_REUSE",
    "DG_USE_NVIDIA_TOOLS",
]


@dataclass(frozen=True)
class Setting:
    """One variable: how its text is read, and what holds when it is not set."""

    name: str
    old_names: tuple[str, ...]
    parse: Callable[[str], Value]
    default: str
    meaning: str

    def read(self) -> Value:
        """The value now. Raises InvalidInputError where the text cannot be read."""
        name = next((name for name in (self.name, *self.old_names) if os.environ.get(name)), self.name)
        text = os.environ.get(name) or self.default
        try:
            return self.parse(text) if text else None
        except ValueError as error:
            raise InvalidInputError(f"{name} is {text!r}, expected {error}") from None


class Row(NamedTuple):
    """One line of describe()."""

    name: str
    old_names: tuple[str, ...]
    value: Value | str  # now; a str is the complaint about a bad one
    default: str
    meaning: str


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a path that needs no home directory, for there is none: set it to one") from None


def _folders(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(os.pathsep) if part)


def _program(text: str) -> Path:
    found = shutil.which(Path(text).expanduser())
    if not found:
        raise ValueError("a program that can be run: give its full path, or a name on PATH")
    return Path(found).absolute()


_TABLE = {
    setting.name: setting
    for setting in (
        Setting("DG_JIT_CACHE_DIR", ("DG_CACHE_DIR",), _path, "~/.deep_gemm", "where compiled kernels are kept"),
        Setting(
            "DG_JIT_READ_ONLY_CACHE_DIRS",
            (),
            _folders,
            "",
            f"folders of kernels that are looked in before, '{os.pathsep}' between them; nothing is written there",
        ),
        Setting(
            "DG_JIT_ALLOW_SHARED_CACHE",
            (),
            _flag,
            "0",
            "share kernels with other users: let them read ours, and use those in folders that they own or can write "
            "to, who can so run code in this process",
        ),
        Setting("DG_JIT_STRICT", (), _flag, "0", "a kernel that is not there is an error; no call compiles"),
        Setting(
            "DG_RECORD_SHAPES",
            (),
            _path,
            "",
            "a file that gets a line for each new problem, for `deep-gemm compile --recorded`",
        ),
        Setting(
            "DG_JIT_DEBUG",
            (),
            _flag,
            "0",
            "say on stderr what is compiled, how long it takes, hits and misses; limit the time kernels wait; "
            "print rows of grouped layouts that cannot be meant so (the GPU does, on stdout)",
        ),
        Setting("DG_PRINT_CONFIGS", (), _flag, "0", "print the plan chosen for each new problem"),
        Setting("DG_JIT_USE_NVRTC", (), _flag, "1", "compile with NVRTC; 0: with nvcc from PATH or CUDA_HOME"),
        Setting("DG_JIT_NVCC_COMPILER", ("DG_NVCC_COMPILER",), _program, "", "the nvcc to use instead of NVRTC"),
        Setting(
            "DG_JIT_PRINT_COMPILER_COMMAND",
            ("DG_JIT_PRINT_NVCC_COMMAND",),
            _flag,
            "0",
            "print the command or options of every compilation",
        ),
        Setting("DG_JIT_PTXAS_VERBOSE", ("DG_PTXAS_VERBOSE",), _flag, "0", "print what the compiler says"),
        Setting("DG_JIT_PTXAS_CHECK", (), _flag, "0", "a kernel that spills or uses local memory is an error"),
        Setting("DG_JIT_WITH_LINEINFO", (), _flag, "0", "compile with line numbers, for profilers"),
        Setting("DG_JIT_DUMP_ASM", (), _flag, "0", "keep both PTX and SASS beside the cubin"),
        Setting("DG_JIT_DUMP_PTX", (), _flag, "0", "keep the PTX beside the cubin"),
        Setting("DG_JIT_DUMP_SASS", (), _flag, "0", "keep the SASS beside the cubin; needs nvdisasm"),
        Setting("DG_JIT_PRINT_LOAD_TIME", (), _flag, "0", "print how long the driver takes to load each kernel"),
        Setting(
            "DG_DISABLE_FFMA_INTERLEAVE",
            (),
            _flag,
            "0",
            "leave the FFMAs of the promotion as the compiler makes them",
        ),
        Setting("DG_PRINT_REG_REUSE", (), _flag, "0", "print the yield and reuse bits of FFMAs of every compilation"),
        Setting(
            "DG_USE_NVIDIA_TOOLS",
            (),
            _flag,
            "0",
            "bench_kineto starts no profiler that would disturb one of NVIDIA's, and returns 1.0",
        ),
        Setting("CUDA_HOME", ("CUDA_PATH",), _path, "/usr/local/cuda", "the CUDA toolkit, where one is needed"),
    )
}


@overload
def get(name: Flag) -> bool: ...
@overload
def get(name: Literal["DG_JIT_CACHE_DIR", "CUDA_HOME"]) -> Path: ...
@overload
def get(name: Literal["DG_JIT_READ_ONLY_CACHE_DIRS"]) -> tuple[Path, ...] | None: ...
@overload
def get(name: Literal["DG_JIT_NVCC_COMPILER", "DG_RECORD_SHAPES"]) -> Path | None: ...
def get(name: str) -> Value:
    """The value of a variable, now.

    Raises: InvalidInputError, naming the variable, what it holds and what it may hold.
    """
    return _TABLE[name].read()


def describe() -> list[Row]:
    """Every variable with its value now, for `doctor` and the documentation. Raises nothing."""
    return [Row(s.name, s.old_names, _value_or_complaint(s), s.default, s.meaning) for s in _TABLE.values()]


def _value_or_complaint(setting: Setting) -> Value | str:
    try:
        return setting.read()
    except InvalidInputError as error:
        return str(error)
