"""Where the programs of a CUDA toolkit are."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from .. import settings
from ..errors import MissingDependencyError


def find(program: str, package: str, remedy: str) -> Path:
    """A program such as nvdisasm: from PATH, from CUDA_HOME, or out of a package of PyPI.

    Raises: MissingDependencyError, with the remedy.
    """
    toolkit = settings.get("CUDA_HOME")
    if found := shutil.which(program) or shutil.which(program, path=str(toolkit / "bin")):
        return Path(found).absolute()
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == program:
            return Path(str(file.locate()))
    raise MissingDependencyError(f"{program} is neither on PATH nor in CUDA_HOME ({toolkit}): {remedy}")
