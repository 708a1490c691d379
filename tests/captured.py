"""First calls inside a capture: a script in a new process that has compiled and loaded nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def check(script: str, loading: str, cache: Path) -> None:
    """Runs the script, which prints "ran" last, with an empty cache. loading: of CUDA's modules, LAZY or EAGER."""
    compiles = {"DG_JIT_CACHE_DIR": str(cache), "DG_JIT_STRICT": "0"}
    environment = os.environ | compiles | {"CUDA_MODULE_LOADING": loading}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0 and "ran" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
