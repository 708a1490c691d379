"""What goes wrong, by name, and what each error carries. Every error of this package is a DeepGemmError."""

from __future__ import annotations

from pathlib import Path


class DeepGemmError(Exception):
    """The base of every error that this package raises on purpose."""


class InvalidInputError(DeepGemmError, ValueError):
    """An operand or setting that cannot be used. The message says what came, what was expected, and the remedy."""


class UnsupportedDeviceError(DeepGemmError, RuntimeError):
    """A device that is older or newer than Hopper."""


class MissingDependencyError(DeepGemmError, ImportError):
    """A package or program that is not installed. The message names the command that brings it."""


class CompileError(DeepGemmError, RuntimeError):
    """A kernel that does not compile, or compiled in a way that was ruled out (DG_JIT_PTXAS_CHECK).

    Attributes:
        log: all that the compiler said.
        options: what it was called with.
        source_path: where the source was kept, if it could be.
    """

    def __init__(
        self, message: str, *, log: str = "", options: tuple[str, ...] = (), source_path: Path | None = None
    ) -> None:
        super().__init__(message)
        self.log = log
        self.options = options
        self.source_path = source_path


class MissingKernelError(DeepGemmError, RuntimeError):
    """A kernel that would have to be compiled while DG_JIT_STRICT rules that out.

    Attributes:
        kernel: its name.
        command: what compiles it.
    """

    def __init__(self, message: str, *, kernel: str = "", command: str = "") -> None:
        super().__init__(message)
        self.kernel = kernel
        self.command = command


class LaunchError(DeepGemmError, RuntimeError):
    """A call of the CUDA driver that failed.

    Attributes:
        code: the CUresult.
        name: its name, such as CUDA_ERROR_INVALID_VALUE.
    """

    def __init__(self, message: str, *, code: int = 0, name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name
