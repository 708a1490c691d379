"""What first calls cost on this GPU: in a fresh process, of shapes that it has never seen, and of a compile-mode sweep.

    python -m bench.cold --package FOLDER    # a folder that a wheel was installed into: `make wheel`, then
                                             # pip install --no-deps --target FOLDER dist/*.whl

Every figure is of a process of its own with an empty cache and DG_JIT_STRICT=1, so a kernel that is not in the wheel is
an error. Prints, and writes <date>-<gpu>-first-calls.json to a folder if asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.run import commit, machine, on_hopper, slug, versions

# Operands of each kind; functions of rows, N and K that make one call.
CALLS = """
import json, random, sys, time, torch
begun = time.perf_counter()
import deep_gemm
imported_ms = (time.perf_counter() - begun) * 1e3
from deep_gemm.runtime import compiler, driver

def values(*shape):
    return torch.randint(0, 126, shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)

def blocks(k):
    return -(-k // 128)

def scales(*shape):
    return torch.rand(shape, device="cuda")

def dense(m, n, k):
    a, b = (values(m, k), scales(m, blocks(k))), (values(n, k), scales(blocks(n), blocks(k)))
    d = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    return lambda: deep_gemm.fp8_gemm_nt(a, b, d)

def contiguous(m, n, k, groups=8):
    m = -(-m // 128) * 128
    a, b = (values(m, k), scales(m, blocks(k))), (values(groups, n, k), scales(groups, blocks(n), blocks(k)))
    d = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    layout = (torch.arange(m, device="cuda") // 128 * groups // max(1, m // 128)).int().clamp(max=groups - 1)
    return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout)

def masked(m, n, k, groups=8):
    a = values(groups, 256, k), scales(groups, 256, blocks(k))
    b = values(groups, n, k), scales(groups, blocks(n), blocks(k))
    d = torch.empty(groups, 256, n, dtype=torch.bfloat16, device="cuda")
    counts = torch.full((groups,), min(m, 256), dtype=torch.int32, device="cuda")
    return lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, counts, min(m, 256))

def k_grouped(m, n, k, groups=4):
    ks = [-(-k // 128) * 128] * groups
    a, b = ((values(sum(ks) * x), scales(x, sum(ks) // 128)) for x in (m, n))
    d = torch.empty(groups, m, n, device="cuda")
    layout = torch.tensor(ks, dtype=torch.int32, device="cuda")
    return lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, layout)

KINDS = {"dense, 1 row": lambda: dense(1, 2112, 7168), "dense": lambda: dense(4096, 2112, 7168),
         "contiguous": lambda: contiguous(4096, 4096, 7168), "masked": lambda: masked(20, 4096, 7168),
         "k_grouped": lambda: k_grouped(768, 4096, 512)}

def ms_of(call):
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return [round((returned - begun) * 1e3, 3), round((time.perf_counter() - begun) * 1e3, 3)]

built = []
build = compiler._Job.compile
compiler._Job.compile = lambda job: built.append(job.source.label) or build(job)
loads = {}
load = driver.load
def timed(image, entry, name):
    begun = time.perf_counter()
    kernel = load(image, entry, name)
    loads[name] = round((time.perf_counter() - begun) * 1e3, 3)
    return kernel
for module in (sys.modules["deep_gemm.runtime.launch"], sys.modules["deep_gemm.runtime.transpose"]):
    module.load = timed
"""

FIRST = (
    CALLS
    + """
call = KINDS[sys.argv[1]]()
first, second = ms_of(call), ms_of(call)
print(json.dumps({"import_ms": round(imported_ms, 1), "first_ms": first, "second_ms": second, "compiled": built}))
"""
)

SHAPES = (
    CALLS
    + """
rng = random.Random(0)
every, kinds = [], [dense, dense, contiguous, masked, k_grouped]
dense(64, 64, 128)()  # the process has begun
for _ in range(100):
    kind = rng.choice(kinds)
    m, n, k = int(2 ** rng.uniform(0, 12)), 8 * int(2 ** rng.uniform(0, 9)), 128 * int(2 ** rng.uniform(0, 5))
    every.append([kind.__name__, m, n, k, *ms_of(kind(m, n, k))])
print(json.dumps({"calls": every, "loads_ms": loads, "compiled": built}))
"""
)

# As SGLang does for one N and K.
SWEEP = (
    CALLS
    + """
deep_gemm.set_compile_mode(1)
taken = {}
a, a_scales, b = values(16384, 2048), scales(16384, 16), (values(8, 4096, 2048), scales(8, 32, 16))
d = torch.empty(16384, 4096, dtype=torch.bfloat16, device="cuda")
layout, counts = torch.zeros(16384, dtype=torch.int32, device="cuda"), torch.zeros(8, dtype=torch.int32, device="cuda")
a3, a_scales3, d3 = a.view(8, 2048, 2048), a_scales.view(8, 2048, 16), d.view(8, 2048, 4096)
for turn in ("first", "warm"):  # as a server does that has started before; and with nothing left to load
    for name in ("dense", "contiguous", "masked"):
        begun = time.perf_counter()
        step = 128 if name == "contiguous" else 1  # groups are padded
        for m in range(step, 16385, step):
            if name == "dense":
                deep_gemm.fp8_gemm_nt((a[:m], a_scales[:m]), (b[0][0], b[1][0]), d[:m])
            elif name == "contiguous":
                deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a[:m], a_scales[:m]), b, d[:m], layout[:m])
            else:
                deep_gemm.m_grouped_fp8_gemm_nt_masked((a3, a_scales3), b, d3, counts, m)
        taken[f"{name}, {turn}"] = round(time.perf_counter() - begun, 3)
print(json.dumps({"sweep_s": taken, "compiled": built}))
"""
)


def asked(script: str, package: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints, in a fresh process that has that package, and no cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"DG_JIT_CACHE_DIR": cache, "DG_JIT_STRICT": "1", "PYTHONPATH": str(package)}
        command = (sys.executable, "-c", script, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
        if done.returncode:
            raise RuntimeError(done.stderr)
        assert os.listdir(cache) == [], "the cache was written"
        return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser("bench.cold", description="Times first calls of a package that brings kernels.")
    parser.add_argument("--package", type=Path, required=True, help="a folder that a wheel was installed into")
    parser.add_argument("--output", type=Path, help="folder for the results (default: none are kept)")
    args = parser.parse_args()
    if not on_hopper("cold"):
        return 1
    started, gpu = datetime.now(timezone.utc), machine()
    about: dict[str, Any] = {"time": started.isoformat(timespec="seconds"), "machine": gpu, "versions": versions()}
    about |= commit()
    kinds = ("dense, 1 row", "dense", "contiguous", "masked", "k_grouped")
    about["kernels_of"] = (args.package / "deep_gemm" / "ready" / "COMPILER").read_text().strip()
    about["first_call_of_a_process"] = {kind: asked(FIRST, args.package, kind) for kind in kinds}
    about["hundred_shapes"] = shapes = asked(SHAPES, args.package)
    about["compile_mode"] = asked(SWEEP, args.package)
    for kind, result in about["first_call_of_a_process"].items():
        print(f"{kind:14} first call {result['first_ms'][1]:7.1f} ms, second {result['second_ms'][1]:.2f} ms")
    every = [total for *_, total in shapes["calls"]]
    loads = list(shapes["loads_ms"].values())
    print(f"100 shapes     median {statistics.median(every):.2f} ms, worst {max(every):.2f} ms")
    print(f"{len(loads)} loads       median {statistics.median(loads):.2f} ms, worst {max(loads):.2f} ms")
    sweeps = about["compile_mode"]["sweep_s"]
    for turn in ("first", "warm"):
        seconds = {name: taken for name, taken in sweeps.items() if name.endswith(turn)}
        print(f"compile mode   {sum(seconds.values()):.2f} s in all: {seconds}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"{started:%Y-%m-%d}-{slug(gpu['gpu'])}-first-calls.json"
        path.write_text(json.dumps(about, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
