"""Calls that are launched at once because one like them came before, where a GPU carries them out: bits, graphs,
streams, threads, devices, forks and the end of a process."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import deep_gemm
from deep_gemm.runtime import launch

pytestmark = pytest.mark.gpu
GROUPS, N, K = 4, 264, 640


def quantised(*shape: int, block: bool = False, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(*shape, device=device)
    if block:
        return deep_gemm.per_block_cast_to_fp8(x, False)
    values, scales = deep_gemm.per_token_cast_to_fp8(x, False)
    return values, deep_gemm.get_mn_major_tma_aligned_tensor(scales)


class Call:
    """One multiplication of some kind, with operands of its own and the result that its first call gave."""

    def __init__(self, kind: str, m: int, device: str = "cuda") -> None:
        m = m if kind == "dense" else -(-m // 128) * 128
        self.function: Callable[..., None] = deep_gemm.fp8_gemm_nt
        shape, rest = (m, N), ()
        self.a = quantised(m, K, device=device)
        if kind == "dense":
            self.b = quantised(N, K, block=True, device=device)
        else:
            self.b = quantised(GROUPS, N, K, block=True, device=device)
        if kind == "contiguous":
            self.function = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
            rest = ((torch.arange(m, device=device) // 128 % GROUPS).sort().values.int(),)
        if kind == "masked":
            self.function = deep_gemm.m_grouped_fp8_gemm_nt_masked
            self.a, shape = quantised(GROUPS, m, K, device=device), (GROUPS, m, N)
            rest = (torch.full((GROUPS,), m, dtype=torch.int32, device=device), m // 2)
        self.rest, self.d = rest, torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.forget()
        self()
        self.want = self.d.clone()

    def forget(self) -> None:
        launch._thread.launchers.known.clear()
        launch._thread.launchers.last = None
        self.d.fill_(float("nan"))

    def __call__(self) -> None:
        self.function(self.a, self.b, self.d, *self.rest)

    def holds(self) -> bool:
        return torch.equal(self.d.view(torch.int16), self.want.view(torch.int16))


def calls(count: int, seed: int = 0, device: str = "cuda") -> list[Call]:
    rng = random.Random(seed)
    kinds = ("dense", "contiguous", "masked")
    return [Call(kinds[i % 3], rng.choice((1, 7, 64, 128, 200, 384)), device) for i in range(count)]


def test_any_order_gives_the_bits_of_the_first_call() -> None:
    every, rng = calls(24), random.Random(1)
    for _ in range(100):
        some = [rng.choice(every) for _ in range(20)]
        for call in some:
            call.d.fill_(float("nan"))
            call()
        assert all(call.holds() for call in some)


def test_nothing_is_allocated_and_nobody_waits() -> None:
    every = calls(6)
    for call in every:
        call()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for call in every:
                call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert all(call.holds() for call in every)


def test_known_calls_are_captured_and_replayed_with_new_contents() -> None:
    """Graphs of one stream run beside eager calls of the same kinds on another."""
    every, others = calls(9), calls(9, seed=0)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in every:
                call()
        graphs.append(graph)
    side = torch.cuda.Stream()
    for turn in range(10):
        for call, other in zip(every, others, strict=True):
            call.d.fill_(float("nan"))
            if turn % 2:  # what the graph reads changes
                for to, come in zip((*call.a, *call.b), (*other.a, *other.b), strict=True):
                    to.copy_(come)
                call.want = other.want
        torch.cuda.synchronize()
        graphs[turn % 2].replay()
        with torch.cuda.stream(side):
            for other in others:
                other()
        torch.cuda.synchronize()
        assert all(call.holds() for call in (*every, *others)), turn


def test_two_streams_at_once() -> None:
    every = [calls(12, seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in every]
    torch.cuda.synchronize()
    for _ in range(30):
        for one, two in zip(*every, strict=True):
            for call, stream in ((one, streams[0]), (two, streams[1])):
                with torch.cuda.stream(stream):
                    call.d.fill_(float("nan"))
                    call()
        torch.cuda.synchronize()
        assert all(call.holds() for some in every for call in some)


def test_threads_at_once() -> None:
    every = [calls(6, seed) for seed in range(8)]
    torch.cuda.synchronize()

    def work(some: list[Call]) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                for call in some:
                    call.d.fill_(float("nan"))
                    call()
                torch.cuda.current_stream().synchronize()
                if not all(call.holds() for call in some):
                    return False
        return True

    with ThreadPoolExecutor(len(every)) as pool:
        assert all(pool.map(work, every))


def test_two_devices_in_turn_and_in_threads() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    every = [calls(6, device=f"cuda:{i}") for i in range(2)]
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            for pair in zip(*every, strict=True):
                for call in pair:
                    call.d.fill_(float("nan"))
                    call()
            for i in range(2):
                torch.cuda.synchronize(i)
            assert torch.cuda.current_device() == current
            assert all(call.holds() for some in every for call in some)

    def work(index: int) -> bool:
        torch.cuda.set_device(index)
        for _ in range(20):
            for call in every[index]:
                call.d.fill_(float("nan"))
                call()
            torch.cuda.synchronize()
        return all(call.holds() for call in every[index])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks(mode: str) -> None:
    """With CUDA graphs of PyTorch's own making, and new operands every time."""
    b = quantised(N, K, block=True)

    def block(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        d = torch.empty(values.shape[0], N, dtype=torch.bfloat16, device="cuda")
        deep_gemm.fp8_gemm_nt((values, scales), b, d)
        return d.float() * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(6):
        a = quantised(96, K)
        assert torch.equal(compiled(*a).clone(), block(*a))


def casts(seed: int) -> list[tuple[Callable[..., Any], dict[str, Any], Any]]:
    """Casts, what they take, and what they give on a CPU."""
    generator, cases = torch.Generator().manual_seed(seed), []
    for cast in (deep_gemm.per_token_cast_to_fp8, deep_gemm.per_block_cast_to_fp8, deep_gemm.swiglu_cast_to_fp8):
        for shape in ((1, 256), (100, 512), (3, 128, 1024)):
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(shape, generator=generator).to(dtype)
                cases.append((cast, {"x": x.cuda(), "use_ue8m0": bool(seed % 2)}, cast(x, bool(seed % 2))))
    return cases


def cast_right(got: Any, want: Any) -> bool:
    (values, scales), (wanted, wanted_scales) = got, want
    same = torch.equal(values.cpu().view(torch.uint8), wanted.view(torch.uint8))
    return same and torch.equal(scales.cpu(), wanted_scales) and scales.stride() == wanted_scales.stride()


def test_casts_like_those_before() -> None:
    """In threads and on streams of their own, and captured, to be replayed with other contents."""

    def work(seed: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            cases = casts(seed)
            for _ in range(5):
                results = [cast(**options) for cast, options, _ in cases]
                torch.cuda.current_stream().synchronize()
                if not all(cast_right(got, want) for got, (_, _, want) in zip(results, cases, strict=True)):
                    return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    cases, others, graph = casts(10), casts(12), torch.cuda.CUDAGraph()
    for cast, options, _ in cases * 2:
        cast(**options)
    with torch.cuda.graph(graph):
        results = [cast(**options) for cast, options, _ in cases]
    for now in (cases, others):
        for (_, options, _), (_, come, _) in zip(cases, now, strict=True):
            options["x"].copy_(come["x"].clone())
        graph.replay()
        assert all(cast_right(got, want) for got, (_, _, want) in zip(results, now, strict=True))


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=150)


SETUP = """
import atexit, os, threading, time, torch, deep_gemm
def operands(m, device="cuda"):
    values = lambda *shape: torch.ones(shape, device=device).to(torch.float8_e4m3fn)
    a = values(m, 256), torch.ones(2, m, device=device).t()
    b = values(64, 256), torch.ones(1, 2, device=device)
    return a, b, torch.empty(m, 64, dtype=torch.bfloat16, device=device)
def right(d):
    return bool((d.float() == 256).all())
"""


def test_a_fork_of_a_process_that_uses_the_gpu_is_told_so() -> None:
    """It cannot use it any more. Its parent can."""
    done = run("""
args = operands(64)
for _ in range(3): deep_gemm.fp8_gemm_nt(*args)
child = os.fork()
if not child:
    try:
        deep_gemm.fp8_gemm_nt(*args)
    except RuntimeError as error:
        assert "forked subprocess" in str(error), error
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for _ in range(3): deep_gemm.fp8_gemm_nt(*args)
assert right(args[2])
print("fine")
""")
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_a_fork_before_the_first_use_of_the_gpu() -> None:
    """After CPU calls in several threads; parent and child both go on to the GPU."""
    done = run("""
threads = [threading.Thread(target=lambda: deep_gemm.fp8_gemm_nt(*operands(8, "cpu"))) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
child = os.fork()
for m in (64, 64, 1, 64):
    args = operands(m)
    deep_gemm.fp8_gemm_nt(*args)
    assert right(args[2])
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("fine")
""")
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.parametrize("last", ["at exit", "in a daemon thread", "in a destructor", "in a captured graph"])
def test_the_end_of_a_process(last: str) -> None:
    """Calls may come up to the very end, and launches may still be queued then."""
    end = {
        "at exit": "atexit.register(lambda: (deep_gemm.fp8_gemm_nt(*args), print('fine' * right(args[2]))))",
        "in a daemon thread": """
def forever():
    mine = operands(64)
    while True: deep_gemm.fp8_gemm_nt(*mine)
threading.Thread(target=forever, daemon=True).start()
time.sleep(1)
print("fine")""",
        "in a destructor": """
class Last:
    def __init__(self): self.args = operands(64); deep_gemm.fp8_gemm_nt(*self.args)
    def __del__(self): deep_gemm.fp8_gemm_nt(*self.args); print("fine")
last = Last()
atexit.register(lambda: globals().pop("last"))""",
        "in a captured graph": """
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph): deep_gemm.fp8_gemm_nt(*args)
graph.replay()
print("fine")""",
    }[last]
    done = run(f"args = operands(64)\nfor _ in range(100): deep_gemm.fp8_gemm_nt(*args)\n{end}\n")
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)
