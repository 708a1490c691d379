"""Runs a script under compute-sanitizer; tests of a GPU give it scripts that end by printing "ran"."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def check(tool: str, script: str, kernel: str = "fp8_gemm") -> None:
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on PATH")
    # cuda-bindings looks for functions that a driver may not have; that is no error of ours.
    options = ["--error-exitcode", "9", "--kernel-name", f"kns={kernel}", "--report-api-errors", "no"]
    # `timeout` ends what the tool has started, too.
    command = ["timeout", "-k", "5", "300", "compute-sanitizer", "--tool", tool, *options, sys.executable, "-c", script]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
