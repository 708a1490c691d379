"""The kernel for few rows on a Hopper GPU: equal bits with the exact reference, which splits K as the plan does."""

from __future__ import annotations

import late
import pytest
import sanitizer
import torch
from test_gpu import differing, exact, guarded, operands

import deep_gemm
from deep_gemm import decode, heuristics
from deep_gemm.config import Config
from deep_gemm.gemm import plan_of
from deep_gemm.plan import Plan, Strip
from deep_gemm.problem import Pair, Problem, dense
from deep_gemm.runtime import device
from deep_gemm.runtime.compiler import Cubin, compile_many
from deep_gemm.runtime.launch import launch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def compiled():
    return compile_many([strip.source() for strip in decode.strips()])


@pytest.fixture(autouse=True)
def everything_restored():
    yield
    deep_gemm.set_batch_invariant(False)
    deep_gemm.set_pdl(False)


def plans(problem: Problem, pdl: bool = False) -> list[Plan]:
    """Of every strip that is legal, with every split and number of stages."""
    every = heuristics.ranked(problem, device.current(0), Config(pdl=pdl), every_split=True)
    return [plan for plan in every if isinstance(plan.tile, Strip)]


def test_every_strip_compiles_clean_with_the_compiler_of_this_machine(compiled: list[Cubin]):
    """tests/test_decode.py asks for more, of the compiler that the development environment has."""
    for strip, cubin in zip(decode.strips(), compiled, strict=True):
        assert (cubin.warnings, cubin.local_bytes) == ([], 0), strip


@pytest.mark.parametrize("kind", ["normal", "bits"])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 16, 16), (1, 2112, 7168), (3, 264, 400), (8, 200, 5008), (9, 1000, 1168), (16, 136, 16384)),
        *((17, 264, 2000), (32, 520, 1168), (33, 72, 640), (64, 328, 2176), (65, 264, 1168), (100, 136, 5008)),
        (120, 904, 784),  # where columns of scales begin in every run of columns that a strip of 112 has
    ],
    ids=str,
)
def test_every_variant_gives_the_exact_bits(shape: tuple[int, int, int], kind: str):
    a, b = operands(*shape, kind=kind)
    ran: set[str] = set()
    for pdl in (False, True):
        for plan in plans(Problem(*shape), pdl):
            d, untouched = guarded(*shape[:2])
            launch(plan, dense(a, b, d)[1])
            assert differing(d, exact(a, b, plan.split)) == 0, plan
            assert untouched(), plan
            ran.add(plan.tile.name)
    assert len(ran) >= (1 if shape[0] > 16 else 3)


def stress(plan: Plan, a: Pair, b: Pair, launches: int, replays: int) -> int:
    """How many of that many launches in CUDA graphs, one right after the other, give other bits than the reference."""
    want = exact(a, b, plan.split)
    ds = [torch.empty_like(want) for _ in range(launches)]
    launch(plan, dense(a, b, ds[0])[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for d in ds:
            launch(plan, dense(a, b, d)[1])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        for d in ds:
            d.fill_(float("nan"))
        graph.replay()
        wrong += sum((d.view(torch.int16) != want.view(torch.int16)).any().long() for d in ds)
    return int(wrong)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        *(((1, 2112, 7168), True), ((16, 4096, 7168), True), ((64, 2112, 7168), True), ((64, 7168, 16384), True)),
        *(((96, 7168, 2048), False), ((128, 7168, 2048), False), ((128, 7168, 16384), False)),
        *(((128, 2112, 7168), True), ((128, 4096, 7168), False)),
    ],
    ids=str,
)
def test_ten_thousand_repeats_give_equal_bits(shape: tuple[int, int, int], splits: bool, pdl: bool):
    """By the plan that is chosen."""
    deep_gemm.set_pdl(pdl)
    a, b = operands(*shape)
    plan = plan_of(Problem(*shape))
    assert isinstance(plan.tile, Strip) and (plan.split > 1) is splits
    assert stress(plan, a, b, launches=100, replays=100) == 0


@pytest.mark.parametrize("m", [1, 16, 32, 64, 128])
def test_stages_that_are_used_again_at_once(m: int):
    """Few stages, and CTAs in each other's way: loads of scales that are overtaken by the next copy show here."""
    shape = m, 7168, 8192 if m <= 64 else 4096
    a, b = operands(*shape)
    shallow = [plan for plan in plans(Problem(*shape)) if plan.stages <= 8]
    assert len(shallow) > 5
    for plan in shallow:
        assert stress(plan, a, b, launches=20, replays=5) == 0, plan


def test_debug_builds_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    """With a time limit on every wait."""
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    for m in (1, 16, 32, 64, 128):
        a, b = operands(m, 264, 2176)
        for plan in plans(Problem(m, 264, 2176)):
            d, untouched = guarded(m, 264)
            launch(plan, dense(a, b, d)[1])
            assert differing(d, exact(a, b, plan.split)) == 0 and untouched(), plan


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "shape", [(8, 2112, 7168), (8, 4096, 512), (16, 7168, 2048), (64, 576, 1168), (128, 7168, 2048)], ids=str
)
def test_early_launches_wait_for_their_producer(shape: tuple[int, int, int], captured: bool):
    """A kernel that lets ours start before it has written a, and after it ours twice. Nothing else runs; b is old.

    With few K blocks the first lets the second start at once. Both have brought the old a into L2 by then.
    """
    a, b = operands(*shape)
    a = a[0], deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    (d, untouched), again = guarded(*shape[:2]), torch.empty(*shape[:2], device="cuda", dtype=torch.bfloat16)
    want, values, fresh = exact(a, b), a[0].view(torch.uint8), a[0].view(torch.uint8).clone()
    produce = late.copier(values, fresh)

    def produce_and_multiply():
        produce()
        deep_gemm.fp8_gemm_nt(a, b, d)
        deep_gemm.fp8_gemm_nt(a, b, again)

    deep_gemm.set_pdl(True)
    deep_gemm.fp8_gemm_nt(a, b, d)  # is compiled
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            produce_and_multiply()
    for _ in range(20):
        values.fill_(0x7F)
        d.fill_(float("nan")), again.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay() if captured else produce_and_multiply()
        assert differing(d, want) == 0 and differing(again, want) == 0
    assert untouched()


def test_launches_that_overlap_follow_one_another():
    """Each multiplies what the one before has written, cast in between: eager, and in a graph; as without overlap."""
    weights = [operands(1, 1024, 1024, seed)[1] for seed in range(6)]
    start = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        x = start
        for b in weights:
            d = torch.empty(16, 1024, device="cuda", dtype=torch.bfloat16)
            scale = x.float().abs().amax().clamp(1e-4) / 448
            values = (x.float() / scale).to(torch.float8_e4m3fn)
            deep_gemm.fp8_gemm_nt((values, scale.expand(16, 8).contiguous()), b, d)
            x = d
        return x

    want = chain()
    deep_gemm.set_pdl(True)
    for _ in range(20):
        assert differing(chain(), want) == 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(20):
        got.fill_(float("nan"))
        graph.replay()
        assert differing(got, want) == 0


SANITIZED = """
import torch
from deep_gemm import heuristics
from deep_gemm.plan import Strip
from deep_gemm.problem import Problem, dense
from deep_gemm.runtime import device
from deep_gemm.runtime.launch import launch
done = set()
for m, n, k in ((1, 136, 1296), (9, 136, 1296), (20, 72, 1296), (64, 136, 1296), (128, 72, 1296)):
    # Copied from the host: initcheck knows of no other kernel that could have written them.
    a = torch.ones(m, k).to(torch.float8_e4m3fn).cuda(), torch.ones(-(-k // 128), (m + 3) // 4 * 4).cuda().t()[:m]
    b = torch.ones(n, k).to(torch.float8_e4m3fn).cuda(), torch.ones(-(-n // 128), -(-k // 128)).cuda()
    for plan in heuristics.ranked(Problem(m, n, k), device.current(0), every_split=True):
        if isinstance(plan.tile, Strip) and plan.stages <= 8 and (plan.tile, plan.split) not in done:
            done.add((plan.tile, plan.split))
            d = torch.zeros(m, n, dtype=torch.bfloat16).cuda()
            launch(plan, dense(a, b, d)[1])
            assert (d.cpu() == torch.tensor(float(k)).bfloat16()).all(), plan
assert len(done) > 15
print("ran")
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool: str):
    sanitizer.check(tool, SANITIZED)
