"""How long `deep-gemm compile` takes from nothing, on this machine: python -m bench.precompile --model config.json

Each figure is of a process of its own with an empty cache: the whole set, and a model with --ep 32 and --tp 8. Prints,
and writes <date>-compile.json to a folder if asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.run import commit, versions
from bench.table import ROOT
from deep_gemm.runtime.compiler import default_compiler


def run(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"DG_JIT_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        begun = time.perf_counter()
        command = (sys.executable, "-m", "deep_gemm", "compile", *arguments)
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        whole_s = time.perf_counter() - begun
    made = re.search(r"made (\d+) kernels in ([\d.]+) s", said)
    assert made, said
    shown = " ".join(Path(x).name for x in arguments)
    return {
        "arguments": shown,
        "kernels": int(made[1]),
        "seconds": float(made[2]),
        "process_seconds": round(whole_s, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser("bench.precompile", description="Times deep-gemm compile from nothing.")
    parser.add_argument("--model", type=Path, help="the config.json of a model with experts")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for the results (default: none are kept)")
    args = parser.parse_args()
    model = [["--model", str(args.model), *split] for split in (("--ep", "32"), ("--tp", "8"))] if args.model else []
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    started = datetime.now(timezone.utc)
    machine = {"cpu": names[0], "hardware_threads": len(os.sched_getaffinity(0)), "gpu": None}
    about = {"time": started.isoformat(timespec="seconds"), "machine": machine, "versions": versions(), **commit()}
    about["compiler"] = default_compiler()
    about["runs"] = runs = [run(*arguments) for _ in range(args.turns) for arguments in ([], *model)]
    for each in runs:
        print(each)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{started:%Y-%m-%d}-compile.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
