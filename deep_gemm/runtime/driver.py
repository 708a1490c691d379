"""The CUDA driver: where it comes from, and what becomes of its errors."""

from __future__ import annotations

import sys
import threading
import time
from functools import cache
from importlib import import_module
from typing import Any

import torch

from .. import settings
from ..errors import LaunchError, MissingDependencyError


@cache
def driver() -> Any:
    """`cuda.bindings.driver`.

    Raises: MissingDependencyError with the command that brings it.
    """
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings is not installed: pip install cuda-bindings") from error


def check(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call. Raises: LaunchError, by the error's name."""
    code, *values = result
    if int(code):
        _, name = driver().cuGetErrorName(code)
        _, text = driver().cuGetErrorString(code)
        raise LaunchError(f"{doing}: {name.decode()}: {text.decode()}", code=int(code), name=name.decode())
    return values[0] if values else None


def load(image: bytes, entry: str, name: str) -> Any:
    """The kernel `entry` of a cubin, a CUkernel for every device. name: for messages. Raises: LaunchError."""
    cuda, start = driver(), time.perf_counter()
    library = check(cuda.cuLibraryLoadData(image, [], [], 0, [], [], 0), f"loading the kernel of {name}")
    kernel = check(cuda.cuLibraryGetKernel(library, entry.encode()), f"looking up {entry}")
    if settings.get("DG_JIT_PRINT_LOAD_TIME"):
        print(f"deep_gemm: loaded {name} in {(time.perf_counter() - start) * 1e3:.2f} ms", file=sys.stderr)
    return kernel


_thread = threading.local()


def bind_context() -> None:
    """Makes the current device's primary context current in a thread that has none yet; later changes are PyTorch's."""
    if hasattr(_thread, "bound"):
        return
    cuda = driver()
    if not int(check(cuda.cuCtxGetCurrent(), "reading the current context")):
        device = check(cuda.cuDeviceGet(torch.cuda.current_device()), "looking up the device")
        context = check(cuda.cuDevicePrimaryCtxRetain(device), "taking the device's context")
        check(cuda.cuCtxSetCurrent(context), "setting the context")
    _thread.bound = True
